"""Rows of one or several traces as one table sorted by prompt, read in blocks of whole prompts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from deferral_train.errors import InputError
from deferral_train.evaluation.losses import Losses, make_losses
from deferral_train.rules.offline import Candidates
from deferral_train.rules.summary import HIDDEN_FIELDS, TOKEN_FIELDS, Summary
from deferral_train.traces import Traces
from deferral_train.traces.schema import TOP_IDS, TOP_LOGPROBS

BLOCK_ROWS, BLOCK_CANDIDATES = 32768, 32768 * 64  # a block of rows, and of rows times logged candidates
_TIE = 1e-9  # nats; keeps "as likely as the likeliest" true after exp and log
# Read whatever the rules are: what a calibration of OPT and the emitted token of distribution rules need.
_ALWAYS = frozenset(
    {"tv", "drafter_max", "verifier_max", "drafter_argmax", "verifier_argmax", "verifier_at_drafter_argmax"}
    | TOKEN_FIELDS
)


@dataclass(frozen=True)
class PromptRows:
    """Where the rows of each prompt lie: rows are sorted by prompt, and by position within a prompt.

    Attributes:
        starts: [P] first row of each prompt.
        lengths: [P] rows of each prompt.
    """

    starts: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, prompt: np.ndarray) -> PromptRows:
        """From sorted prompt numbers [N]; every number from 0 to the last must occur."""
        starts = np.flatnonzero(np.r_[True, prompt[1:] != prompt[:-1]]) if len(prompt) else np.zeros(0, int)
        return cls(starts, np.diff(np.r_[starts, len(prompt)]))

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sums over the rows of each prompt: [.., N] to [.., P]."""
        return np.add.reduceat(values, self.starts, axis=-1)

    @cached_property
    def longest_first(self) -> np.ndarray:
        """Prompts in order of falling length, [P]."""
        return np.argsort(-self.lengths, kind="stable")


@dataclass(frozen=True)
class PromptBlock:
    """Consecutive rows of whole prompts; n rows, P' prompts.

    Attributes:
        summary: fields that the rules need, [n].
        tv: D_TV of the sampling distributions, float32 [n].
        losses: of both models, [n].
        layout: where each prompt's rows are, within the block.
        gold: [n] int64, -1 where there is none.
        candidates: logged top tokens, None where none are needed.
        rows, prompts: which of the table.
        temperature: of the sampling distributions.
        truth: of the losses.
    """

    summary: Summary
    tv: np.ndarray
    losses: Losses
    layout: PromptRows
    gold: torch.Tensor
    candidates: Candidates | None
    rows: slice
    prompts: slice
    temperature: float
    truth: str


@dataclass(frozen=True)
class Positions:
    """Rows sorted by prompt, rows of a prompt in order of position; N rows, P prompts.

    Attributes:
        columns: stored columns [N, ..] by name, numpy.
        losses: of both models under the truth, [N].
        prompt: [N] 0..P-1, sorted.
        prompt_ids: [P].
        temperature: of the sampling distributions.
        loss, truth: of the losses, by name.
        with_candidates: blocks carry logged tokens.
        meta: what goes into a table's header.
    """

    columns: dict[str, np.ndarray]
    losses: Losses
    prompt: np.ndarray
    prompt_ids: list[str]
    temperature: float
    loss: str
    truth: str
    with_candidates: bool
    meta: dict[str, Any]

    @property
    def prompts(self) -> int:
        """Number of prompts P."""
        return len(self.prompt_ids)

    def __len__(self) -> int:
        return len(self.prompt)

    @cached_property
    def rows_per_prompt(self) -> np.ndarray:
        """[P]."""
        return np.bincount(self.prompt, minlength=self.prompts)

    def blocks(self) -> Iterator[PromptBlock]:
        """All rows in order, see :meth:`block`."""
        return map(self.block, self.spans())

    def spans(self) -> Iterator[slice]:
        """Prompts in pieces of limited memory; each piece has at least one whole prompt."""
        starts = self.layout.starts
        width = self.columns[TOP_IDS[0]].shape[1] if self.with_candidates else 1
        rows = min(BLOCK_ROWS, BLOCK_CANDIDATES // width)
        first = 0
        while first < self.prompts:
            end = starts[first] + rows
            last = max(int(np.searchsorted(starts, end, side="right")) - 1, first + 1)
            last = self.prompts if end >= len(self) else last
            yield slice(first, last)
            first = last

    @cached_property
    def layout(self) -> PromptRows:
        """Where each prompt's rows are."""
        return PromptRows.of(self.prompt)

    def summary(self, rows: slice = slice(None)) -> Summary:
        """The fields that the rules need, as float32 and int64 tensors."""
        stored = (name for name in self.columns if name not in {*TOP_IDS, *TOP_LOGPROBS, "gold"})
        return Summary({name: _tensor(self.columns[name][rows]) for name in stored})

    def block(self, prompts: slice) -> PromptBlock:
        """The rows of some prompts."""
        starts, lengths = self.layout.starts[prompts], self.layout.lengths[prompts]
        rows = slice(int(starts[0]), int(starts[-1] + lengths[-1]))
        return PromptBlock(
            self.summary(rows),
            self.columns["tv"][rows],
            self.losses.select(rows),
            PromptRows(starts - starts[0], lengths),
            _tensor(self.columns["gold"][rows]),
            self._candidates(rows) if self.with_candidates else None,
            rows,
            prompts,
            self.temperature,
            self.truth,
        )

    def _candidates(self, rows: slice) -> Candidates:
        ids = [_tensor(self.columns[name][rows]) for name in TOP_IDS]
        logprobs = [_tensor(self.columns[name][rows]) for name in TOP_LOGPROBS]
        # Stored in half precision; the likeliest token's is known better, and rules compare others with it.
        for place, model in enumerate(("drafter", "verifier", "drafter", "verifier")):
            best = _tensor(self.columns[f"{model}_max"][rows]).double().log() + _TIE
            own = ids[place // 2] == _tensor(self.columns[f"{model}_argmax"][rows]).unsqueeze(-1)
            logprobs[place] = torch.where(own, best.unsqueeze(-1), logprobs[place].double())
        return Candidates.union(ids[0], (logprobs[0], logprobs[1]), ids[1], (logprobs[2], logprobs[3]))


def read_positions(
    traces: Traces | Sequence[Traces],
    needs: Iterable[str],
    *,
    loss: str = "zero_one",
    truth: str = "reference",
    temperature: float | None = None,
    with_candidates: bool = False,
) -> Positions:
    """Read what a scan needs.

    Args:
        traces: one, or several of the same pair, prefixes and temperature.
        needs: summary fields that the rules read.
        with_candidates: also the logged candidates, for token and distribution rules.

    Raises:
        InputError: no rows, traces that do not belong together, fields that are not there.
    """
    parts = [traces] if isinstance(traces, Traces) else list(traces)
    check_same(parts)
    temperature = parts[0].manifest.temperature if temperature is None else float(temperature)
    with_candidates = with_candidates and parts[0].manifest.top_k > 0
    names = _ALWAYS | set(needs)
    columns = _joined([_columns(part, names, temperature, with_candidates) for part in parts])
    losses = [make_losses(part, loss, truth, temperature) for part in parts]
    prompt, order, ids = _numbered(parts)
    joined = Losses.joined(losses)
    if order is not None:
        columns = {name: values[order] for name, values in columns.items()}
        joined = joined.select(order)
    meta = {
        "temperature": temperature,
        "prefixes": parts[0].manifest.prefixes,
        "prompts": len(ids),
        "positions": len(prompt),
        "floor_hits": joined.floor_hits,
        "nonfinite": sum(part.nonfinite for part in parts),
        "pair": dict(parts[0].manifest.pair),
    }
    return Positions(columns, joined, prompt, ids, temperature, loss, truth, with_candidates, meta)


def check_same(parts: Sequence[Traces]) -> None:
    """Refuse traces that must not be scored as one."""
    if not parts or not sum(len(part) for part in parts):
        raise InputError("traces hold no rows; collect some prompts first")
    for name in ("pair", "prefixes", "temperature", "truth"):
        first = getattr(parts[0].manifest, name)
        for part in parts[1:]:
            other = getattr(part.manifest, name)
            if other != first:
                raise InputError(f"traces differ in {_difference(name, first, other)}; score each on its own")


def _difference(name: str, first: Any, second: Any) -> str:
    """Where two entries of a manifest part, as ``pair.drafter.config: abc and xyz``."""
    if isinstance(first, dict) and isinstance(second, dict):
        key = next(key for key in {**first, **second} if first.get(key) != second.get(key))
        return _difference(f"{name}.{key}", first.get(key), second.get(key))
    return f"{name}: {first!s:.60} and {second!s:.60}"


def _columns(
    part: Traces, names: set[str] | frozenset[str], temperature: float, top: bool
) -> dict[str, np.ndarray]:
    hidden = sorted(names & HIDDEN_FIELDS)
    summary = part.summary(sorted(names - HIDDEN_FIELDS), temperature)
    columns = {name: summary[name].numpy() for name in summary.names}
    stored = [*hidden, "gold", *((*TOP_IDS, *TOP_LOGPROBS) if top else ())]
    return columns | {name: part.column(name) for name in stored}


def _joined(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _numbered(parts: Sequence[Traces]) -> tuple[np.ndarray, np.ndarray | None, list[str]]:
    """Prompt numbers in order of appearance, the order that sorts rows by them (None: sorted already), the
    ids.
    """
    offsets = np.cumsum([0, *(len(part.manifest.prompt_ids) for part in parts)])
    every = [name for part in parts for name in part.manifest.prompt_ids]
    raw = np.concatenate([part.prompt_of_row.astype(np.int64) + start for part, start in zip(parts, offsets)])
    runs = raw[np.r_[True, raw[1:] != raw[:-1]]]
    present, first = np.unique(runs, return_index=True)
    by_appearance = present[np.argsort(first)]
    ids = [every[number] for number in by_appearance]
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise InputError(f"prompt id {twice!r} is in two of the traces; a prompt may count only once")
    number = np.empty(len(every), dtype=np.int64)
    number[by_appearance] = np.arange(len(by_appearance))
    prompt = number[raw]
    if len(runs) == len(present):
        return prompt, None, ids
    order = np.argsort(prompt, kind="stable")
    return prompt[order], order, ids


def _tensor(values: np.ndarray) -> torch.Tensor:
    """Half precision as float32, integers as int64."""
    tensor = torch.from_numpy(np.ascontiguousarray(values) if values.flags.writeable else np.array(values))
    return (
        tensor.float()
        if tensor.dtype == torch.float16
        else tensor.long()
        if not tensor.is_floating_point()
        else tensor
    )
