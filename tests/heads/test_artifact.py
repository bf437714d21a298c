import json
import struct
import subprocess
import sys

import pytest
import torch
from heads.distributions import FEATURES, every_head, summary_of
from safetensors.torch import load_file, save_file

from deferral_train.errors import InputError
from deferral_train.heads import HEADS, DeferralHead, GapHead, JudgeHead, set_operating_point
from deferral_train.heads.export import export_head
from deferral_train.heads.rules import LearnedTokenRule, learned_rule, parse_spec, rule_from_spec
from deferral_train.rules.learned import LearnedRule


@pytest.fixture
def folder(tmp_path):
    head = every_head()["gap"]
    head.metadata = {"pair": {"tokenizer": "abc", "vocab_size": 9}, "training": {"rows": 10}}
    return head.save_pretrained(tmp_path / "head")


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", list(every_head()))
def test_round_trip_gives_the_same_numbers_and_config(name, tmp_path):
    head = every_head()[name]
    head.metadata = {"alpha": 0.25}
    again = DeferralHead.from_pretrained(head.save_pretrained(tmp_path))
    assert type(again) is HEADS[head.head_type]
    assert again.config == head.config
    assert not again.training
    summary = summary_of(40)
    if name == "cost_sensitive_draft":
        assert torch.equal(again.defer(summary, 0.3), head.defer(summary, 0.3))
    else:
        assert torch.equal(again.gap(summary), head.gap(summary))
    if head.head_type == "judge":  # serves another rule, tests/decoding/test_judge.py
        assert torch.equal(again.score(summary), head.score(summary))
        return
    rule = learned_rule(again)
    assert isinstance(rule, LearnedTokenRule if head.head_type == "token" else LearnedRule)
    assert rule.alpha == 0.25


def test_files_and_marks(folder):
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    config = json.loads((folder / "config.json").read_text())
    assert config["lossy"] is True
    assert config["deferral_head_type"] == "gap"
    assert config["schema_hash"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"deferral_head_type": "os.system"}, "unknown"),
        ({"deferral_head_type": 3}, "deferral_head_type"),
        ({"features": ["drafter_max"] * 10_000}, "features"),
        ({"features": "drafter_max"}, "features"),
        ({"features": ["drafter_max", "tv"]}, "feature 1 is 'drafter_max:logit' there, 'drafter_max' here"),
        ({"features": ["drafter_max:logit"]}, "feature 2 is 'verifier_max' there, none here"),
        ({"schema": {"version": 7}}, "schema: version '7', here 2"),
        ({"schema": {"features": "tv"}}, "no list"),
        ({"schema": {"features": [["drafter_max", "logit", 4]]}}, "'drafter_max:logit' of width 4 there"),
        ({"schema": []}, "schema"),
        ({"schema": {}, "features": ["tv"]}, "schema: hash"),
        ({"stage": "draft"}, "draft-stage"),
        ({"hidden": [10**12]}, "parameters"),
        ({"hidden": [8] * 100}, "hidden"),
        ({"hidden": [-3]}, "positive"),
        ({"hidden": [True]}, "hidden"),
        ({"hidden": [16]}, "tensor"),
        ({"widths": {"drafter_hidden": "4"}}, "widths"),
        ({"format_version": 99}, "format_version"),
        ({"schema_hash": "0" * 16}, "schema"),
        ({"alpha": "big"}, "alpha"),
        ({"loss": None}, "loss"),
    ],
)
def test_malformed_config_is_one_line(folder, changes, said):
    edit(folder, **changes)
    with pytest.raises(InputError, match=said) as caught:
        DeferralHead.from_pretrained(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "NaN", '{"a": NaN}', "[" * 100_000, "\x00", '"x"'])
def test_config_that_is_no_json_object(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError):
        DeferralHead.from_pretrained(folder)


def test_config_not_utf8(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(InputError):
        DeferralHead.from_pretrained(folder)


@pytest.mark.parametrize(
    "data",
    [b"", b"garbage", struct.pack("<Q", 1 << 60) + b"{}", struct.pack("<Q", 2) + b"{}", b"\x80\x04K\x01."],
)
def test_weights_that_are_no_safetensors(folder, data):
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(InputError):
        DeferralHead.from_pretrained(folder)


def test_weights_of_another_shape_dtype_or_not_finite(folder):
    path = folder / "model.safetensors"
    good = load_file(path)
    for change, said in (
        (good["mean"].double(), "float64"),
        (good["mean"][:2].clone(), r"\[2\]"),
        (torch.full_like(good["mean"], torch.inf), "finite"),
    ):
        save_file({**good, "mean": change}, path)
        with pytest.raises(InputError, match=said):
            DeferralHead.from_pretrained(folder)
    save_file({**good, "extra": good["mean"].clone()}, path)
    with pytest.raises(InputError, match="extra"):
        DeferralHead.from_pretrained(folder)


def test_missing_files_and_folders_are_named(folder, tmp_path):
    with pytest.raises(InputError, match="owner/name"):
        DeferralHead.from_pretrained(tmp_path / "nothing")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="incomplete"):
        DeferralHead.from_pretrained(folder)


def test_a_class_of_ones_own_loads_its_own_type_only(folder, tmp_path):
    class Mine(GapHead):
        head_type = "mine"

    mine = Mine(FEATURES, hidden=(8,))
    saved = mine.save_pretrained(tmp_path / "mine")
    assert isinstance(Mine.from_pretrained(saved), Mine)
    with pytest.raises(InputError, match="mine"):
        DeferralHead.from_pretrained(saved)
    with pytest.raises(InputError, match="mine"):
        Mine.from_pretrained(folder)


def test_operating_point_and_its_certificate_replace_the_former(folder):
    set_operating_point(folder, 0.3, {"metric": "exact_match", "max_loss": 0.01})
    head = DeferralHead.from_pretrained(folder)
    assert head.metadata["alpha"] == 0.3
    assert head.metadata["certificate"]["max_loss"] == 0.01
    assert head.metadata["pair"]["vocab_size"] == 9
    assert "exact" in (folder / "README.md").read_text()
    set_operating_point(folder, 0.1)
    assert "certificate" not in DeferralHead.from_pretrained(folder).metadata


def test_another_threshold_drops_the_certificate_of_the_former(tmp_path):
    head = JudgeHead(["drafter_max"])
    head.metadata = {"threshold": 0.5, "certificate": {"value": 0.5}}
    export_head(head, tmp_path / "same")
    assert DeferralHead.from_pretrained(tmp_path / "same").metadata["certificate"] == {"value": 0.5}
    export_head(head, tmp_path / "other", threshold=0.9)
    found = DeferralHead.from_pretrained(tmp_path / "other").metadata
    assert found["threshold"] == 0.9
    assert "certificate" not in found


def test_card_escapes_what_it_was_told(tmp_path):
    head = every_head()["gap"]
    hostile = "<script>alert(1)</script> | `x`\n---\n[a](javascript:b)"
    head.metadata = {
        "certificate": {"metric": hostile},
        "evaluation": {"dataset": hostile, "metrics": {"regret": 0.1}},
    }
    card = (head.save_pretrained(tmp_path) / "README.md").read_text()
    body = card.split("\n---\n", 1)[1]
    assert "<script>" not in body
    assert "[a](" not in body.replace("\\[a\\](", "")
    assert card.count("\n---\n") == 1
    assert "model-index" in card


def test_specs():
    assert parse_spec("opt") == ("opt", {})
    assert parse_spec("opt:alpha=0.2") == ("opt", {"alpha": 0.2})
    assert parse_spec("a.b:C") == ("a.b:C", {})
    assert parse_spec("a.b:C:alpha=1,flag=true") == ("a.b:C", {"alpha": 1, "flag": True})
    assert parse_spec("learned:head=org/name,alpha=-0.5") == ("learned", {"head": "org/name", "alpha": -0.5})
    for bad in ("alpha=1", "opt:alpha", "opt:=3,a=1", "learned:alpha=1", "learned:head=x,beta=1"):
        with pytest.raises(InputError):
            rule_from_spec(bad)


def test_spec_of_a_stored_head(folder):
    rule = rule_from_spec(f"learned:head={folder},alpha=0.1")
    assert rule.defer(summary_of(10)).shape == (10,)
    with pytest.raises(InputError, match="alpha"):
        rule_from_spec(f"learned:head={folder}")


def test_a_spec_from_a_file_names_no_code(tmp_path, monkeypatch):
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for spec in ("trap:Rule", "trap:Rule:alpha=1", "learned:head=trap:Rule", "opt:trap:Rule=1"):
        with pytest.raises(InputError):
            rule_from_spec(spec)
        with pytest.raises(InputError):
            rule_from_spec(spec, typed=["opt", "other:Rule"])
    with pytest.raises(SystemExit):
        rule_from_spec("trap:Rule:alpha=1", typed=["trap:Rule"])


LOADED = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(name + " is absent", name=name)

ABSENT = {"pytorch_lightning", "transformers", "datasets", "sklearn", "numpy", "pyarrow", "huggingface_hub", "yaml"}
sys.meta_path.insert(0, Absent())
from deferral_train import DeferralHead, make_rule
from deferral_train.rules.summary import Summary
head = DeferralHead.from_pretrained(sys.argv[1])
import torch
columns = torch.load(sys.argv[2], weights_only=True)
rule = make_rule("learned", head=head, alpha=-0.2)
print(rule.defer(Summary(columns)).tolist())
"""


def test_a_head_decides_the_same_where_only_torch_and_safetensors_are_installed(folder, tmp_path):
    """Other packages cannot be imported; tests/heads/test_fresh.py does it in environments without them."""
    head = DeferralHead.from_pretrained(folder)
    summary = summary_of(64)
    wanted = LearnedRule(head=head, alpha=-0.2).defer(summary).tolist()
    assert 0 < sum(wanted) < len(wanted)
    columns = {name: summary[name] for name in {*head.features, "tv"}}
    torch.save(columns, tmp_path / "columns.pt")
    command = [sys.executable, "-W", "ignore", "-c", LOADED, str(folder), str(tmp_path / "columns.pt")]
    found = subprocess.run(command, check=True, timeout=120, capture_output=True, text=True).stdout
    assert json.loads(found.lower()) == wanted
