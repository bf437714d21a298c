"""doctor: the machine, a GPU beside a CPU-only torch, and things that cannot be used."""

from __future__ import annotations

import pytest
from tiny_models import save_tiny_pair

from deferral_train.commands import doctor


def levels(findings) -> dict[str, str]:
    return {finding.subject: finding.level for finding in findings}


def test_machine_is_described(tmp_path):
    found = levels(doctor.machine(tmp_path))
    assert {"python", "torch", "threads", "memory", "disk", "packages"} <= set(found)
    assert "no" not in found.values()


def test_gpu_beside_a_cpu_only_torch_is_reported(monkeypatch):
    monkeypatch.setattr(doctor, "has_nvidia_gpu", lambda: True)
    finding = doctor._device(cuda=None, available=False, version="2.13.0+cpu")
    assert finding.level == "note"
    assert "CPU-only build" in finding.text
    assert "TORCH_INDEX" in finding.text


def test_no_write_permission_is_a_no(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    assert doctor._disk(tmp_path).level == "no"


def test_usable_pair_and_half_a_pair(tmp_path, capsys):
    save_tiny_pair("llama", tmp_path)
    assert doctor.run(drafter=str(tmp_path / "drafter"), verifier=str(tmp_path / "verifier")) == 0
    assert "decoder-only" in capsys.readouterr().out
    assert doctor.run(drafter=str(tmp_path / "drafter")) == 2
    assert "name both" in capsys.readouterr().out


@pytest.mark.parametrize("subject", ["traces", "head"])
def test_wrong_folder_is_one_line_and_code_2(tmp_path, capsys, subject):
    assert doctor.run(**{subject: str(tmp_path)}) == 2
    lines = [line for line in capsys.readouterr().out.splitlines() if line.split()[1] == subject]
    assert len(lines) == 1
    assert lines[0].split()[0] == "no"
