"""Rounds of learning: the head of every round, decoded on the validation prompts, against that of the first.

    python -m benchmarks.studies.label_rounds --rounds runs/rounds-fr [--out FILE]

Reads what ``deferral-train rounds`` left: nothing is decoded anew. chrF, BLEU and TER at the wished share of lossless's
verifier calls are linear between a head's settings; differences to round 0 with 95% paired intervals over 1,000 redraws
of prompts. What the labels of a round predicted that the cascade before it loses stands beside what it did lose.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import keep, study_flags
from benchmarks.sequence_labels import LOSSLESS, SCORES, against, at_calls, counts_of, finite, redrawn
from deferral_train import provenance
from deferral_train.decoding.outputs import OUTPUTS, read_lines
from deferral_train.evaluation.bootstrap import PromptBootstrap


def settings_of(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Lines of a folder of decoded texts by rule."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in read_lines(folder / OUTPUTS):
        found.setdefault(row["rule"], []).append(row)
    return found


def main() -> int:
    parser = study_flags(__doc__, "runs/label-rounds")
    parser.add_argument("--rounds", type=Path, required=True, help="folder of deferral-train rounds")
    options = parser.parse_args()
    content = provenance.read_object(options.rounds / "rounds.json", "name a folder of rounds")
    assert content is not None
    lossless = settings_of(options.rounds / LOSSLESS)[LOSSLESS]
    weights = np.vstack([np.ones(len(lossless)), PromptBootstrap(len(lossless), 1000).weights])
    cache: dict[tuple[str, str], Any] = {}
    best = redrawn(counts_of(lossless, cache), weights)
    calls = content["settings"]["calls"] * best["calls"]
    first: dict[str, np.ndarray] = {}
    rows = []
    for record in content["rounds"]:
        folder = Path(record["best"]).parent
        folder = options.rounds / folder.parent.name / folder.name / "decode"
        known = [redrawn(counts_of(lines, cache), weights) for lines in settings_of(folder).values()]
        values = {score: at_calls(known, score, calls) for score in (*SCORES, "words")}
        first = first or values
        row = {"round": record["round"], "labelled": record["labelled"], "predicted": record.get("predicted")}
        row["length"] = float(values["words"][0] / best["words"][0])
        row |= {
            score: {"value": float(values[score][0]), **against(values[score], first[score])}
            for score in SCORES
        }
        rows.append(row)
        told = [f"{s} {row[s]['value']:.2f} ({row[s]['difference']:+.2f} [{row[s]['low']:+.2f}, {row[s]['high']:+.2f}])"
                for s in SCORES]  # fmt: skip
        print(
            f"round {row['round']}, {row['labelled']:,} labels: {', '.join(told)}, length {row['length']:.3f}"
        )
    result = {
        "study": "label_rounds", "settings": content["settings"], "prompts": len(lossless), "rounds": rows,
        "lossless": {name: float(values[0]) for name, values in best.items()},
    }  # fmt: skip
    keep(options, finite(provenance.plain(result)), {"seed": 0})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
