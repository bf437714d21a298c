"""A checkpoint that names code to run is refused, and nothing of it runs."""

from __future__ import annotations

import pickle
import zipfile

import pytest
import torch

from deferral_train.errors import InputError
from deferral_train.training.checkpoint import read_checkpoint


class Trap:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("how", ["torch", "pickle", "zip"])
def test_a_trap_does_not_spring(how, tmp_path):
    path, sprung = tmp_path / "best.ckpt", tmp_path / "sprung"
    value = {"deferral_head": Trap(sprung), "state_dict": {}}
    if how == "torch":
        torch.save(value, path)
    elif how == "pickle":
        path.write_bytes(pickle.dumps(value))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(value))
            archive.writestr("archive/version", "3")
    with pytest.raises(InputError, match="no checkpoint of deferral-train fit"):
        read_checkpoint(path)
    assert not sprung.exists()
