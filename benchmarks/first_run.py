"""The quickstart over several seeds, none left out: gain, certified loss, and whether the wish was met.

Usage: python -m benchmarks.first_run [--seeds 0 1 2 3 4] [--style house] [--out runs/first_run]. Settings are those of
the embedded config, fixed beforehand; with one house style nothing about writing is left to disagree on, which is the
control. Each seed is a whole run (minutes); finished ones are read again. Writes STYLE.json and prints Markdown.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from deferral_train import provenance
from deferral_train.commands.quickstart import CONFIG, seeded
from deferral_train.pipeline.config import read_config
from deferral_train.pipeline.run import run

GAIN = 1.4  # of lossless's tokens a verifier call
COLUMNS = (
    "seed",
    "verifier",
    "drafter",
    "chosen",
    "tokens/call lossless",
    "tokens/call",
    "gain",
    "right",
    "certified",
    "met",
)


def row_of(folder: Path, seed: int, limit: float) -> dict[str, Any]:
    """What a finished run found, read from its files alone."""
    verdict = json.loads((folder / "verdict.json").read_text(encoding="utf-8"))
    answers = json.loads((folder / "evaluation" / "answers.json").read_text(encoding="utf-8"))
    rules = json.loads((folder / "decode" / "summary.json").read_text(encoding="utf-8"))["rules"]
    chosen = verdict["chosen"]
    lengths = [rules[name]["mean_acceptance_length"] for name in ("lossless", chosen["label"])]
    certificate = chosen["certificate"]
    gain = lengths[1] / lengths[0]
    return {
        "seed": seed,
        "verifier": answers["right"]["verifier_only"],
        "drafter": answers["right"]["drafter_only"],
        "chosen": f"{chosen['name']} {chosen['parameter']}={chosen['value']:.3g}",
        "tokens/call lossless": lengths[0],
        "tokens/call": lengths[1],
        "gain": gain,
        "right": answers["right"][chosen["label"]],
        "certified": None if certificate is None else certificate["limit"],
        "met": certificate is not None and certificate["limit"] <= limit and gain >= GAIN,
    }


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table as it goes into the docs."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(_cell(row[column]) for column in COLUMNS) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def main(words: Sequence[str] | None = None) -> None:
    """Run the seeds that are not finished and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--style", default="drawn")
    parser.add_argument("--out", default="runs/first_run")
    asked = parser.parse_args(words)
    rows = []
    for seed in asked.seeds:
        folder = Path(asked.out) / f"{asked.style}-{seed}"
        config = seeded(read_config(CONFIG, out=str(folder)), seed)
        assert config.text.questions is not None
        questions = replace(config.text.questions, style=asked.style)
        config = replace(config, text=replace(config.text, questions=questions))
        run(config)
        rows.append(row_of(folder, seed, config.point.max_loss or 0.0))
    met = sum(row["met"] for row in rows)
    table = {"rows": rows, "met": met, "gain": GAIN, "provenance": provenance.collect({"seeds": asked.seeds})}
    provenance.write_json(Path(asked.out) / f"{asked.style}.json", table)
    print(markdown(rows))
    print(
        f"{met} of {len(rows)} seeds reach {GAIN} times lossless's tokens per verifier call at the certified loss"
    )


if __name__ == "__main__":
    main()
