"""A head class of the user's own goes all the way by its typed name, or is refused by `fit`."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from warm import Warm

ROOT = Path(__file__).resolve().parents[2]
MODULE = """
import torch
from deferral_train.heads import DeferralHead, GapHead

class TwoSidedHead(DeferralHead):
    head_type = "two_sided"

    @property
    def outputs(self):
        return 2

    def forward(self, x):
        cost, saving = torch.nn.functional.softplus(self.body(self.prepare(x))).unbind(-1)
        return {"gap": self.gate(x, cost - saving)}

class Nameless(GapHead):
    pass

class Wider(TwoSidedHead):
    head_type = "wider"

    def __init__(self, features, *, extra, **arguments):
        super().__init__(features, **arguments)
        self.more = torch.nn.Linear(extra, 1)

class Shifting(TwoSidedHead):
    head_type = "shifting"
    made = 0

    def __init__(self, features, **arguments):
        super().__init__(features, **arguments)
        Shifting.made += 1
        self.more = torch.nn.Linear(Shifting.made, 1)
"""
PROGRAM = """
import json, sys
from deferral_train.cli import main
codes = []
for words in json.loads(sys.argv[1]):
    print("##", flush=True)
    print("##", file=sys.stderr, flush=True)
    codes.append(main(words))
print("##" + json.dumps(codes))
"""


def run(warm: Warm, folder: Path, *commands: list[str]) -> tuple[list[int], list[str]]:
    """Exit codes of the commands and what each wrote to stderr; the folder is known to nobody but by being current."""
    (folder / "my_heads.py").write_text(MODULE)
    program = folder / "elsewhere" / "program.py"
    program.parent.mkdir(exist_ok=True)
    program.write_text(PROGRAM)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [warm.python, str(program), json.dumps(commands)],
        cwd=folder, env=env, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("##")[2]), done.stderr.split("##\n")[1:]


def fit(folders, kind: str, *more: str) -> list[str]:
    return [
        "fit",
        *("--model.head.class_path", f"my_heads.{kind}"),
        *("--model.head.init_args.features", "[drafter_max:logit,verifier_max,tv]"),
        *("--data.train", str(folders["train"]), "--data.val", str(folders["val"])),
        *("--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false", "--data.batch_size", "1000"),
        *("--model.figure_every", "0", "--out", f"runs/{kind}", *more),
    ]


@pytest.mark.timeout(290)
def test_fit_export_and_evaluate_by_the_same_name(folders, tmp_path, warm):
    best, own = "runs/TwoSidedHead/checkpoints/best.ckpt", "my_heads.TwoSidedHead"
    rule = "learned:head=head"
    evaluate = ["evaluate", "--traces", str(folders["val"]), "--bootstrap", "0", "--figures", "false"]
    codes, said = run(
        warm,
        tmp_path,
        fit(folders, "TwoSidedHead"),
        ["export", "--checkpoint", best, "--out", "head", "--alpha", "0.1", "--head-class", own],
        ["export", "--checkpoint", best, "--out", "other"],
        ["export", "--checkpoint", "head", "--out", "again", "--head-class", own.replace(".Two", ":Two")],
        [*evaluate, "--out", "scores", "--rules", "opt", f"{rule},class={own}"],
        [*evaluate, "--out", "none", "--rules", "opt", rule],
        ["export", "--checkpoint", best, "--out", "other", "--head-class", "my_heads.Absent"],
        ["export", "--checkpoint", best, "--out", "other", "--head-class", "os.path"],
    )
    assert codes == [0, 0, 2, 0, 0, 2, 2, 2], said
    for place in (2, 5):
        assert "'two_sided' is unknown" in said[place]
        assert "--head_class" in said[place]
        assert "class=MODULE.CLASS" in said[place]
    assert "my_heads.Absent" in said[6]
    assert "no DeferralHead" in said[7] or "cannot be imported" in said[7]
    assert json.loads((tmp_path / "head" / "config.json").read_text())["deferral_head_type"] == "two_sided"
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("head", "again")]
    assert weights[0] == weights[1]
    assert not (tmp_path / "other").exists()
    assert (tmp_path / "scores").is_dir()


@pytest.mark.timeout(290)
def test_a_class_that_could_not_be_loaded_again_is_refused_before_training(folders, tmp_path, warm):
    codes, said = run(
        warm,
        tmp_path,
        fit(folders, "Nameless"),
        fit(folders, "Wider", "--model.head.init_args.extra", "3"),
        fit(folders, "Shifting"),
        fit(folders, "Absent"),
    )
    assert codes == [2, 2, 2, 2], said
    assert "head_type is 'gap'; give the class a head_type of its own" in said[0]
    assert "Wider: cannot be built again from its config" in said[1]
    assert "extra" in said[1]
    assert "other weights" in said[2]
    assert "my_heads.Absent" in said[3]
    assert not list(tmp_path.rglob("*.ckpt"))
