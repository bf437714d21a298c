"""Requests that bring the uniform numbers which their tokens are drawn with: texts that share their random numbers.

vLLM's own seeds give two requests the same noise only while their texts agree. A logits processor of the documented
interface, for both model runners: it draws by the inverse of the cumulative distribution, as labels do without an
engine, and leaves the drawn token alone. The request itself is greedy. V vocabulary, R rows that are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor as ProcessorV1
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as ProcessorV2

from deferral_train.rules.sampling import draw

NUMBERS = "deferral_numbers"  # a request's extra argument: the fields of `Numbers`


@dataclass(frozen=True)
class Numbers:
    """The numbers of a request, and how they are read.

    Attributes:
        temperature: of the distribution.
        each: a uniform number for every token, in order.
        prompt: tokens before the first of them.
    """

    temperature: float
    each: Sequence[float]
    prompt: int

    @classmethod
    def of(cls, params: Any) -> Numbers | None:
        """From a request's sampling parameters; None where it brings none."""
        given = (params.extra_args or {}).get(NUMBERS)
        return None if given is None else cls(**given)


class NumberedDraws(ProcessorV1, ProcessorV2):
    """Leaves the drawn token alone in the rows of requests that bring numbers.

    Args: of vLLM's configuration and, by runner, a device and whether memory is pinned, or the requests' state.
    """

    def __init__(self, vllm_config: Any, *_: Any) -> None:
        # By row of the batch on V1, with what was written so far; by slot of the request on V2.
        self._written: dict[int, tuple[Numbers, list[int]]] = {}
        self._slots: dict[int, Numbers] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        """V1: requests that came, went or moved."""

        def brought(
            params: Any, prompt: list[int] | None, written: list[int]
        ) -> tuple[Numbers, list[int]] | None:
            own = Numbers.of(params)
            return None if own is None else (own, written)

        process_dict_updates(self._written, batch_update, brought)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """V2: a request takes a slot."""
        own = Numbers.of(sampling_params)
        self._slots.pop(req_idx, None)
        if own is not None:
            self._slots[req_idx] = own
        return own is not None

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """Put all but the drawn token of each row at minus infinity, in place."""
        if ctx is None:
            rows = [(row, own, len(written)) for row, (own, written) in self._written.items()]
        else:
            lengths = ctx.seq_lens_upper_bound_np
            rows = [
                (row, self._slots[slot], int(lengths[row]) - self._slots[slot].prompt)
                for row, slot in enumerate(ctx.idx_mapping_np.tolist())
                if slot in self._slots
            ]
        # A prompt that is still being read has a row, too; nothing that is drawn of it counts.
        rows = [(row, own, place) for row, own, place in rows if 0 <= place < len(own.each)]
        if rows:
            _leave_drawn(logits, rows)
        return logits


def _leave_drawn(logits: Tensor, rows: Sequence[tuple[int, Numbers, int]]) -> None:
    """``rows``: row of the logits [N, V], what its request brought, and how many tokens it has written."""
    device = logits.device
    at = torch.tensor([row for row, _, _ in rows], device=device)
    numbers = torch.tensor([own.each[place] for _, own, place in rows], dtype=torch.float64, device=device)
    temperatures = torch.tensor([own.temperature for _, own, _ in rows], device=device)
    chosen = logits.index_select(0, at).float()
    token = draw((chosen / temperatures[:, None]).softmax(-1), numbers)
    logits[at] = -torch.inf
    logits[at, token] = 0.0
