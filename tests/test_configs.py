"""Every run config that is shipped can be read, and says at its top how to run it and what to expect."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from deferral_train.commands.quickstart import CONFIG
from deferral_train.pipeline.config import read_config

ROOT = Path(__file__).resolve().parents[1]
PAPER = sorted((ROOT / "configs" / "paper").glob("*.yaml"))
OWN = ("multi30k.yaml", "smollm2.yaml", "speculative_cascades.yaml")
RUNS = [CONFIG, *(ROOT / "configs" / name for name in OWN), *PAPER]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_run_config_is_readable(path):
    config = read_config(path)
    assert config.pair.train is not None or config.pair.drafter
    assert path.read_text(encoding="utf-8").startswith("#")


def test_overrides_replace_top_level_fields(tmp_path):
    config = read_config(CONFIG, out=str(tmp_path), seed=3)
    assert (config.out, config.seed) == (str(tmp_path), 3)


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.name)
def test_configs_of_the_papers_pairs_ask_for_its_figures_and_say_what_was_not_run(path):
    config, text = read_config(path), path.read_text(encoding="utf-8")
    assert "# Not run:" in text
    assert f"configs/paper/{path.name}" in text
    assert config.out == f"runs/paper/{path.stem}"
    gemma = path.name.startswith("gemma")
    assert config.decode.num_draft_tokens == (1 if gemma else 5)
    assert config.frontier.temperatures == ((1.0,) if gemma else (1.0, 0.0, 0.5))
    assert {"chow", "diff", "opt", "token_v3", "lossy"} <= set(config.frontier.rules)
    parts = [config.text.fit, config.text.validation, config.text.calibration]
    ends = [(part.start, part.start + part.limit) for part in parts]
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(ends))
    assert config.text.test.split != config.text.fit.split


def test_there_is_a_config_for_every_pair_of_the_paper():
    assert {path.stem.rpartition("-")[0] for path in PAPER} == {
        "t5-small-large", "t5-small-xl", "gemma2-2b-9b", "gemma2-2b-27b"
    }  # fmt: skip
