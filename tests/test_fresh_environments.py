"""What users install: wheels in empty environments, a head served by torch alone, its ONNX form without torch.

    pytest -m slow tests/test_fresh_environments.py

Needs the package index (a CPU build of torch, about 2 GB of disk in all, some minutes).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from heads.distributions import every_head, summary_of
from tiny_models import save_tiny_pair

from deferral_train.heads import DeferralHead
from deferral_train.heads.onnx import export_onnx
from deferral_train.rules.learned import LearnedRule

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ROOT = Path(__file__).resolve().parents[1]
ALPHA = -0.2  # some rows defer, some do not
PIP = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")


def run(*words: object, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    # What the shell adds to the path would be found in environments that should be empty.
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, capture_output=True, text=True, timeout=1500, env=clean
    )
    assert not check or done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


def pin(name: str) -> str:
    """The pinned version; torch's own stands in the Makefile, because its index is chosen there."""
    if name == "torch":
        return re.search(r"TORCH := (\S+)", (ROOT / "Makefile").read_text()).group(1)
    return re.search(rf"^{name}==\S+", (ROOT / "constraints.txt").read_text(), re.MULTILINE).group(0)


def environment(folder: Path, *installs: tuple[object, ...]) -> Path:
    """Python of an environment with nothing but these installs."""
    run(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    for install in installs:
        run(folder / "bin" / "python", *PIP, *install, cwd=folder.parent)
    return folder / "bin" / "python"


def installed(python: Path) -> set[str]:
    listed = run(python, "-m", "pip", "list", "--format=json", cwd=python.parent).stdout
    return {package["name"].lower() for package in json.loads(listed)}


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> dict[str, Path]:
    """Wheel and sdist, built as a release would be."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", out, ROOT, cwd=out)
    return {"wheel": next(out.glob("*.whl")), "sdist": next(out.glob("*.tar.gz"))}


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> tuple[Path, list[bool]]:
    """A folder with a head, its ONNX form and rows; and what torch here decides on them."""
    folder = tmp_path_factory.mktemp("served")
    head, summary = every_head()["gap"], summary_of(64)
    head.save_pretrained(folder)
    export_onnx(head, folder / "model.onnx")
    fields = {name: summary[name] for name in {*head.features, "tv"}}
    torch.save(fields, folder / "summary.pt")
    np.savez(folder / "rows.npz", columns=head.columns(summary).numpy(), tv=summary["tv"].numpy())
    decided = LearnedRule(head=DeferralHead.from_pretrained(folder), alpha=ALPHA).defer(summary).tolist()
    assert 0 < sum(decided) < len(decided)
    return folder, decided


def test_wheel_and_sdist_hold_the_package_and_no_more(packages):
    wheel = zipfile.ZipFile(packages["wheel"]).namelist()
    with tarfile.open(packages["sdist"]) as archive:
        sdist = [name.partition("/")[2] for name in archive.getnames()]
    listed = run("git", "ls-files", "deferral_train", cwd=ROOT).stdout.split()
    for names in (wheel, sdist):
        assert set(listed) <= set(names)
        assert not [name for name in names if name.split("/")[0] in ("tests", "data", "runs", "benchmarks")]
        assert not [name for name in names if name.endswith((".pyc", ".ckpt", ".safetensors", ".arrow"))]
    assert {"README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml"} <= set(sdist)
    assert any(name.endswith("licenses/LICENSE") for name in wheel)
    entry = next(name for name in wheel if name.endswith("entry_points.txt"))
    assert (
        "deferral-train = deferral_train.cli:main" in zipfile.ZipFile(packages["wheel"]).read(entry).decode()
    )


def test_the_sdist_installs_in_an_empty_environment(packages, tmp_path):
    """Built there from its own files; what it needs besides is the same as the wheel's."""
    python = environment(tmp_path / "env", ("--no-deps", packages["sdist"]))
    assert installed(python) <= {"pip", "setuptools", "deferral-train"}
    command = tmp_path / "env" / "bin" / "deferral-train"
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert run(command, "--version", cwd=tmp_path).stdout.split()[-1] == version
    assert "usage: deferral-train" in run(command, "--help", cwd=tmp_path).stdout


TORCH_ALONE = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
from deferral_train import DeferralHead, make_rule
from deferral_train.rules.summary import Summary
head = DeferralHead.from_pretrained(sys.argv[1])
rule = make_rule("learned", head=head, alpha=float(sys.argv[3]))
print(json.dumps(rule.defer(Summary(torch.load(sys.argv[2], weights_only=True))).tolist()))
"""


def test_head_decides_the_same_with_torch_and_safetensors_alone(packages, served, tmp_path):
    folder, decided = served
    wheel = packages["wheel"]
    installs = (pin("torch"),), (pin("safetensors"),), ("--no-deps", wheel)
    python = environment(tmp_path / "env", *installs)
    assert not installed(python) & {"transformers", "pytorch-lightning", "pyarrow", "numpy", "scikit-learn"}
    found = run(python, "-c", TORCH_ALONE, folder, folder / "summary.pt", ALPHA, cwd=tmp_path).stdout
    assert json.loads(found) == decided


ONNX_ALONE = """
import json, sys
import numpy, onnxruntime
rows = numpy.load(sys.argv[1] + "/rows.npz")
session = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx", providers=["CPUExecutionProvider"])
columns = json.loads(session.get_modelmeta().custom_metadata_map["deferral.columns"])
assert rows["columns"].shape[1] == len(columns), columns
whole = session.run(["gap"], {"columns": rows["columns"]})[0]
single = numpy.concatenate([session.run(["gap"], {"columns": row[None]})[0] for row in rows["columns"]])
for gap in (whole, single):
    print(json.dumps((gap > float(sys.argv[2]) * rows["tv"]).tolist()))
"""


def test_onnx_form_decides_the_same_with_numpy_and_onnxruntime_alone(served, tmp_path):
    folder, decided = served
    python = environment(tmp_path / "env", (pin("numpy"), pin("onnxruntime")))
    assert not installed(python) & {"torch", "deferral-train", "safetensors", "onnx"}
    found = run(python, "-c", ONNX_ALONE, folder, ALPHA, cwd=tmp_path).stdout
    assert [json.loads(line) for line in found.splitlines()] == [decided, decided]


def readme_example() -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.search(r"## In Python\n.*?\n\n```python\n(.*?)```", text, re.DOTALL).group(1)


@pytest.mark.parametrize("extra", ["", "[train]"])
def test_wheel_in_an_empty_environment_runs_the_readme(extra, packages, served, tmp_path):
    """The base install serves heads and traces and names the extra that the example needs; [train] runs it."""
    constraints = ("-c", ROOT / "constraints.txt")
    python = environment(tmp_path / "env", (pin("torch"),), (*constraints, f"{packages['wheel']}{extra}"))
    save_tiny_pair("llama", tmp_path / "runs" / "quickstart" / "pair")
    done = run(python, "-c", readme_example(), cwd=tmp_path, check=False)
    if extra:
        assert done.returncode == 0, done.stderr[-3000:]
        assert float(done.stdout.split()[-1]) >= 1.0
    else:
        assert "transformers" not in installed(python)
        assert "pip install 'deferral-train[train]'" in done.stderr.splitlines()[-1]
        folder, decided = served
        found = run(python, "-c", TORCH_ALONE, folder, folder / "summary.pt", ALPHA, cwd=tmp_path).stdout
        assert json.loads(found) == decided
    command = tmp_path / "env" / "bin" / "deferral-train"
    assert "usage: deferral-train" in run(command, "--help", cwd=tmp_path).stdout
    rules = run(command, "rules", cwd=tmp_path, check=False)
    assert rules.returncode == (0 if extra else 2)
    assert extra or "pip install 'deferral-train[train]'" in rules.stderr
