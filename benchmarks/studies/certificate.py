"""Is the certificate of `choose` valid on real outputs? Violations over many calibration sets of a known population.

    python -m benchmarks.studies.certificate --outputs runs/pool --metric chrf --out results.json
    python -m benchmarks.studies.certificate --outputs runs/pool --keep tests/evaluation/pool.json

The prompts of a `decode` folder (lossless, and one rule at several settings) are treated as the population, so that
the mean loss of every setting is known. Calibration sets are drawn from them with replacement; a violation is a
certified setting whose population mean breaks the limit. The limit is put just below the mean of each setting in
turn, the worst case for the guarantee.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binom

from benchmarks.common import flags, keep
from deferral_train import provenance
from deferral_train.decoding.outputs import OUTPUTS, read_lines
from deferral_train.evaluation.certificate import fixed_sequence
from deferral_train.evaluation.quality import per_prompt
from deferral_train.evaluation.settings import in_order, setting_of

TOLERANCE = 0.99


def read_pool(folder: Path, metric: str) -> tuple[list[str], np.ndarray]:
    """Labels in the order of the dial and their losses against lossless, [S, n]."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for row in read_lines(folder / OUTPUTS):
        if row["repetition"] == 0:
            rows.setdefault(row["rule"], {})[row["id"]] = row
    ids = sorted(rows["lossless"])

    def scores(label: str) -> np.ndarray:
        own = [rows[label][name] for name in ids]
        return per_prompt(metric, [row["text"] for row in own], [row["reference"] for row in own])

    settings = [setting_of(label) for label in rows]
    labels = [setting.label for setting in in_order([s for s in settings if s is not None])]
    base = scores("lossless")
    return labels, np.stack([base - scores(label) for label in labels])


def violations(
    losses: np.ndarray, limit: float, size: int, confidence: float, draws: int, seed: int
) -> dict[str, Any]:
    """Draw calibration sets of ``size`` prompts from ``losses`` [settings, prompts]; count the draws that certify a
    setting whose mean is above the limit.
    """
    means = losses.mean(axis=1)
    generator = np.random.default_rng(seed)
    broken = useful = 0
    for _ in range(draws):
        sample = losses[:, generator.integers(0, losses.shape[1], size=size)]
        certified = fixed_sequence(sample, limit, confidence, low=-1, high=1).certified
        broken += bool((means[:certified] > limit).any())
        useful += certified > 0
    allowed = int(binom.ppf(TOLERANCE, draws, 1 - confidence))
    return {
        "limit": limit,
        "size": size,
        "confidence": confidence,
        "draws": draws,
        "violations": broken,
        "allowed": allowed,
        "certified_something": useful,
        "valid": broken <= allowed,
    }


def main() -> int:
    parser = flags(__doc__, ("cpu",), threads=None)
    parser.add_argument("--outputs", type=Path, required=True, help="folder of a decode run")
    parser.add_argument("--metric", default="chrf")
    parser.add_argument("--size", type=int, default=300, help="prompts of a calibration set")
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--keep", type=Path, help="write the pool of losses here")
    options = parser.parse_args()
    labels, losses = read_pool(options.outputs, options.metric)
    if options.keep is not None:
        pool = {"metric": options.metric, "labels": labels, "losses": np.round(losses, 4).tolist()}
        provenance.write_text(options.keep, json.dumps(pool))
    found = [
        # Just below the mean of a setting that loses: the worst case for the guarantee.
        {"label": label, **violations(losses, mean - 1e-9, options.size, confidence, options.draws, risky)}
        for risky, (label, mean) in enumerate(zip(labels, losses.mean(axis=1).tolist()))
        for confidence in (0.95, 0.8)
        if mean > 0
    ]
    for row in found:
        print(
            f"limit at {row['label']} ({row['limit']:.4f}), confidence {row['confidence']:g}: {row['violations']} "
            f"violations of {row['draws']} (at most {row['allowed']} by chance), certified {row['certified_something']}"
        )
    keep(options, {"prompts": losses.shape[1], "metric": options.metric, "rows": found})
    return 0 if all(row["valid"] for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
