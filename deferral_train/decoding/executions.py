"""The ways to execute a cascade, by the name that users give."""

from __future__ import annotations

from collections.abc import Callable

from deferral_train.decoding.lazy import lazy_cascade
from deferral_train.decoding.loop import DecodingState, speculative
from deferral_train.decoding.proposing import ModelProposer
from deferral_train.decoding.sequence import sequence_cascade
from deferral_train.decoding.token_execution import token_cascade

EXECUTIONS: dict[str, Callable[[DecodingState], None]] = {
    "speculative": speculative,
    "token": token_cascade,
    "lazy": lazy_cascade,
    "sequence": sequence_cascade,
}


def execute(execution: str, state: DecodingState) -> None:
    """Run until every row has ended.

    The drafter alone needs no verification, whatever the execution: it runs as a token cascade that never defers.
    """
    alone = state.rule.name == "drafter_only" and state.settings.max_request_loss is None
    alone = alone and isinstance(state.proposer, ModelProposer)
    EXECUTIONS["token" if alone else execution](state)
