"""Every run config that is shipped can be read, and says at its top how to run it and what to expect."""

from __future__ import annotations

from pathlib import Path

import pytest

from deferral_train.commands.quickstart import CONFIG
from deferral_train.pipeline.config import read_config

ROOT = Path(__file__).resolve().parents[1]
RUNS = [CONFIG, *(ROOT / "configs" / name for name in ("multi30k.yaml", "speculative_cascades.yaml"))]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_run_config_is_readable(path):
    config = read_config(path)
    assert config.pair.train is not None or config.pair.drafter
    assert path.read_text(encoding="utf-8").startswith("#")


def test_overrides_replace_top_level_fields(tmp_path):
    config = read_config(CONFIG, out=str(tmp_path), seed=3)
    assert (config.out, config.seed) == (str(tmp_path), 3)
