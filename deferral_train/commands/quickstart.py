"""`deferral-train quickstart`: `run` on the embedded config. No network, no hub, no GPU."""

from __future__ import annotations

from pathlib import Path

CONFIG = Path(__file__).parents[1] / "pipeline" / "quickstart.yaml"


def run(*, out: str = "runs/quickstart", seed: int = 0, fresh: bool = False) -> int:
    """Train a small pair on the standard library's sources and take it through every stage.

    Args:
        out: the run folder.
        seed: of everything that draws.
        fresh: start over.
    """
    from deferral_train.pipeline.config import read_config
    from deferral_train.pipeline.run import run as run_stages

    run_stages(read_config(CONFIG, out=out, seed=seed), fresh=fresh)
    return 0
