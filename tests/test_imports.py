"""What importing this package, loading a head and exporting one pull in: little."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = (
    "pytorch_lightning",
    "lightning",
    "transformers",
    "datasets",
    "sklearn",
    "pandas",
    "matplotlib",
    "scipy",
)
EXPORT = """
import torch
from deferral_train.commands import export
from deferral_train.heads import GapHead
head = GapHead(["drafter_max", "verifier_max"])
state = {"head." + name: tensor for name, tensor in head.state_dict().items()}
torch.save({"deferral_head": head.stored_config(), "state_dict": state}, "best.ckpt")
export.run(export.ExportConfig("best.ckpt", "head", alpha=0.25))
export.run(export.ExportConfig("head", "again"))
"""
PULLED = {
    "import deferral_train": ("torch", "numpy", "pyarrow", "jsonargparse", *HEAVY),
    "from deferral_train import DeferralHead, make_rule": ("pyarrow", "jsonargparse", *HEAVY),
    "from deferral_train import open_traces": ("jsonargparse", *HEAVY),
    "import deferral_train.cli": ("torch", "numpy", "jsonargparse", *HEAVY),
    # Defaults stand once, where --help can read them.
    "from deferral_train.commands import choose, collect, decode, evaluate, rounds, run": ("torch", *HEAVY),
    EXPORT: HEAVY,
}


@pytest.mark.parametrize("code", PULLED, ids=["package", "head", "traces", "cli", "commands", "export"])
def test_heavy_modules_stay_out(code, tmp_path):
    check = f"{code}\nimport sys\nfound = [m for m in {PULLED[code]!r} if m in sys.modules]\nassert not found, found"
    subprocess.run([sys.executable, "-W", "ignore", "-c", check], cwd=tmp_path, check=True, timeout=120)
