"""The breakdowns that a run makes of its test traces: those that cost no model pass and no second of a small run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from deferral_train.evaluation.bootstrap import Redraws
from deferral_train.evaluation.breakdowns import Breakdowns, make_breakdowns, read_part
from deferral_train.pairs.load import load_tokenizer
from deferral_train.pipeline.config import RunConfig
from deferral_train.rules.base import Rule
from deferral_train.traces import Traces

NAMES = ("position", "copy_rate", "max_gram")


def break_down(
    traces: Traces, prompts: Path, verifier: str, chosen: Mapping[str, Rule], config: RunConfig
) -> Breakdowns:
    """Acceptance and deferral of lossless and the chosen point by draft index and copy rate; Max-Gram's failures.

    Args:
        prompts: what the traces were collected from. verifier: a checkpoint with the tokenizer.
    """
    part = read_part(traces, "test", prompts, [load_tokenizer(verifier)])
    return make_breakdowns(
        [part],
        NAMES,
        chosen,
        num_draft_tokens=config.decode.num_draft_tokens,
        redraws=Redraws(config.bootstrap, config.seed),
    )
