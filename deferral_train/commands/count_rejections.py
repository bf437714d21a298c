"""`deferral-train count-rejections`: which of the drafter's tokens were rejected for which, and how often."""

from __future__ import annotations

from dataclasses import dataclass, field

from deferral_train.errors import InputError


@dataclass(frozen=True)
class CountRejectionsConfig:
    """Count the pairs of greedy tokens that differ in traces: the table of rule csd.

    Attributes:
        traces: trace folders of one pair of models.
        out: file to write (safetensors).
        shown: most frequent pairs to print.
    """

    traces: list[str] = field(default_factory=list)
    out: str = "runs/rejected_pairs.safetensors"
    shown: int = 10


# The command line takes every field of the config as a flag and a YAML key.
SETTINGS = CountRejectionsConfig


def run(config: CountRejectionsConfig) -> int:
    """Count, write the table and print its most frequent pairs as token ids."""
    from deferral_train.heads.rejected_pairs import count_rejections, write_rejected_pairs
    from deferral_train.rules.rejected_pairs import MOST_TOKENS
    from deferral_train.traces import open_traces

    if config.shown < 0:
        raise InputError(f"shown is {config.shown}; give a number of pairs, 0 for none")
    pairs = count_rejections([open_traces(folder) for folder in config.traces])
    write_rejected_pairs(pairs, config.out)
    found = pairs.metadata
    print(
        f"{found['rejections']} of {found['positions']} drafted tokens were rejected, in {len(pairs.keys)} pairs: "
        f"{config.out}"
    )
    order = pairs.counts.argsort(descending=True, stable=True)[: config.shown]
    for key, count in zip(pairs.keys[order].tolist(), pairs.counts[order].tolist()):
        print(f"  {count:>7} times {key % MOST_TOKENS} for {key // MOST_TOKENS}")
    return 0
