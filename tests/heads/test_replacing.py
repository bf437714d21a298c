"""A head folder holds one head, whole: whatever write fails or is cut short, and whatever lies beside it."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from heads.distributions import every_head

from deferral_train import DeferralHead, cli
from deferral_train.errors import InputError
from deferral_train.heads import GapHead, artifact
from deferral_train.heads.artifact import certificate_problem
from deferral_train.heads.export import export_head, set_operating_point
from deferral_train.heads.fingerprint import weights_key
from deferral_train.heads.rules import parse_spec


def head(seed: int, alpha: float) -> GapHead:
    torch.manual_seed(seed)
    made = GapHead(["drafter_max", "verifier_max"], hidden=[4])
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    made.metadata = {"alpha": alpha}
    return made


def state(folder: Path) -> tuple[str, float]:
    found = DeferralHead.from_pretrained(folder)
    return weights_key(found), found.metadata["alpha"]


def fail_at(monkeypatch, number: int, name: str) -> list[int]:
    """The ``number``-th call of ``os.<name>`` finds the disk full."""
    real, calls = getattr(os, name), []

    def failing(*arguments, **named):
        calls.append(1)
        if len(calls) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **named)

    monkeypatch.setattr(os, name, failing)
    return calls


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_whichever_write_fails_a_whole_head_stays(tmp_path, monkeypatch, name):
    old, new = head(0, 0.1), head(1, 0.2)
    states = {(weights_key(old), 0.1), (weights_key(new), 0.2)}
    tried = 0
    for number in range(1, 40):
        folder = tmp_path / f"{name}{number}"
        old.save_pretrained(folder)
        calls = fail_at(monkeypatch, number, name)
        try:
            new.save_pretrained(folder)
            raised, said = False, str(folder)
        except OSError as error:
            raised, said = True, str(error)
        monkeypatch.undo()
        assert str(folder) in said
        assert state(folder) in states
        if not raised and len(calls) < number:
            break
        tried += 1
        new.save_pretrained(folder)  # once there is room again
        assert state(folder) == (weights_key(new), 0.2)
        assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert tried >= 4


def test_a_kill_between_the_renames_leaves_the_new_head_whole(tmp_path, monkeypatch):
    """Stopped behind the record that says all files are there: readers find the new head, the next writer tidies."""
    old, new = head(0, 0.1), head(1, 0.2)
    old.save_pretrained(tmp_path)
    real = os.replace

    def killed(source, target):
        if Path(target).name == "config.json":
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        new.save_pretrained(tmp_path)
    monkeypatch.undo()
    assert state(tmp_path) == (weights_key(new), 0.2)
    old.save_pretrained(tmp_path)
    assert state(tmp_path) == (weights_key(old), 0.1)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}


def test_stale_files_go_and_foreign_files_stay_and_are_named(tmp_path, capsys):
    head(0, 0.1).save_pretrained(tmp_path / "a")
    head(1, 0.2).save_pretrained(tmp_path / "out")
    (tmp_path / "out" / "model.onnx").write_bytes(b"of the head before")
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert cli.main(["export", "--checkpoint", str(tmp_path / "a"), "--out", str(tmp_path / "out")]) == 0
    assert "kept what is not of this head: thesis.txt" in capsys.readouterr().out
    assert not (tmp_path / "out" / "model.onnx").exists()
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"
    (tmp_path / "out" / "model.onnx").write_bytes(b"of this head")
    set_operating_point(tmp_path / "out", 0.3)  # the same weights: the graph is still theirs
    assert (tmp_path / "out" / "model.onnx").exists()


def test_a_models_folder_is_not_written_over(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(InputError, match="something else than a head; name another folder"):
        head(0, 0.1).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == b"weights"
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match="not of a head"):
        head(0, 0.1).save_pretrained(tmp_path)


def test_a_certificate_goes_with_its_weights_out_loud(tmp_path, capsys):
    old, new = head(0, 0.1), head(1, 0.2)
    old.save_pretrained(tmp_path / "out")
    set_operating_point(tmp_path / "out", 0.3, {"metric": "chrf", "limit": 0.02, "value": 0.3})
    certified = DeferralHead.from_pretrained(tmp_path / "out")
    assert certified.metadata["certificate"]["weights"] == weights_key(old)
    assert certificate_problem(certified) is None
    export_head(certified, tmp_path / "copy")
    assert "certificate" in DeferralHead.from_pretrained(tmp_path / "copy").metadata
    certified.load_state_dict(new.state_dict())  # trained on
    with pytest.warns(UserWarning, match="its certificate is dropped"):
        export_head(certified, tmp_path / "copy")
    assert "certificate" not in DeferralHead.from_pretrained(tmp_path / "copy").metadata
    new.save_pretrained(tmp_path / "new")
    assert cli.main(["export", "--checkpoint", str(tmp_path / "new"), "--out", str(tmp_path / "out")]) == 0
    assert (
        "(metric chrf, limit 0.02, value 0.3) was of another head or setting, and is gone"
        in capsys.readouterr().out
    )
    assert "certificate" not in DeferralHead.from_pretrained(tmp_path / "out").metadata


def test_weights_put_beside_anothers_certificate_are_seen(tmp_path):
    head(0, 0.1).save_pretrained(tmp_path / "a")
    set_operating_point(tmp_path / "a", 0.1, {"metric": "chrf"})
    head(1, 0.1).save_pretrained(tmp_path / "b")
    (tmp_path / "a" / "model.safetensors").write_bytes((tmp_path / "b" / "model.safetensors").read_bytes())
    assert "the certified ones" in certificate_problem(DeferralHead.from_pretrained(tmp_path / "a"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--alpha", "1e9"], "alpha is 1e+09"),
        (["--alpha", "nan"], "alpha"),
        (["--threshold", "0.5"], "threshold"),
    ],
)
def test_export_writes_no_head_that_cannot_be_loaded(tmp_path, capsys, words, said):
    head(0, 0.1).save_pretrained(tmp_path / "a")
    assert (
        cli.main(["export", "--checkpoint", str(tmp_path / "a"), "--out", str(tmp_path / "out"), *words]) == 2
    )
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_folder_of_digits_is_a_folder():
    assert parse_spec("learned:head=007,alpha=1")[1] == {"head": "007", "alpha": 1}
    assert parse_spec("judge:head=true")[1] == {"head": "true"}


@pytest.mark.parametrize("name", list(every_head()))
def test_the_key_of_weights_is_of_their_contents(name, tmp_path):
    made = every_head()[name]
    again = DeferralHead.from_pretrained(made.save_pretrained(tmp_path))
    assert weights_key(again) == weights_key(made)
    tensors = [value for value in again.state_dict().values() if value.is_floating_point() and value.numel()]
    with torch.no_grad():
        tensors[-1].view(-1)[-1] += 0.5
    assert weights_key(again) != weights_key(made)
    assert artifact.current_file(tmp_path, "config.json") == tmp_path / "config.json"
