"""`deferral-train quickstart`: `run` on the embedded config. No network, no hub, no GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deferral_train.pipeline.config import RunConfig

CONFIG = Path(__file__).parents[1] / "pipeline" / "quickstart.yaml"


def run(*, out: str = "runs/quickstart", seed: int = 0, rounds: int = 0, fresh: bool = False) -> int:
    """Ask a small pair, trained on the spot, questions about Python's own library, and see what a cascade gains.

    A database is made of the standard library's sources; the pair learns to answer questions about it in SQL; whether
    an answer is right is found by running it. Every stage of a run follows, and a page.

    Args:
        out: the run folder.
        seed: of everything that draws.
        rounds: above 0, the head learns from whole answers, right or wrong, in so many rounds along the cascade's own
            text; takes some minutes a round longer.
        fresh: start over.
    """
    from deferral_train.pipeline.config import read_config
    from deferral_train.pipeline.run import run as run_stages

    config = seeded(read_config(CONFIG, out=out), seed)
    run_stages(replace(config, heads=replace(config.heads, rounds=rounds)), fresh=fresh)
    return 0


def seeded(config: RunConfig, seed: int) -> RunConfig:
    """The config with one seed for everything that draws, the pair's training included."""
    train = config.pair.train
    pair = config.pair if train is None else replace(config.pair, train=replace(train, seed=seed))
    return replace(config, seed=seed, pair=pair)
