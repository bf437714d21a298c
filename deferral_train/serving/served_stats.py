"""Counts of requests that an engine served, in the form of the loop's: from its steps, and the plug-in's verdicts.

R requests, T drafted positions of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from deferral_train.decoding.block import VerifiedBlock
from deferral_train.decoding.stats import GenerationStats, StatsRecorder
from deferral_train.rules import Origin


@dataclass
class Steps:
    """Steps of one request, as an engine told of them.

    Attributes:
        tokens: emitted ids. deltas: how many of them each step emitted, cut at the request's end.
        finish: why it ended. drafted, accepted: of each step that had drafts, before the cut.
    """

    tokens: list[int] = field(default_factory=list)
    deltas: list[int] = field(default_factory=list)
    finish: str = ""
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    def take(self, output: Any) -> None:
        """Take in a ``CompletionOutput`` that holds what is new."""
        new = list(output.token_ids)
        self.tokens += new
        if new:
            self.deltas.append(len(new))
        self.finish = str(output.finish_reason or self.finish)
        metrics = getattr(output, "spec_decode_metrics", None)
        if metrics is not None:
            self.drafted, self.accepted = list(metrics.per_step_drafted), list(metrics.per_step_accepted)

    def infer(self, drafts: int) -> None:
        """Fill in the blocks of a request that ended by a stop string, of which the engine gives no account: every step
        but the first had ``drafts`` drafted tokens.
        """
        if not self.drafted:
            self.accepted = [delta - 1 for delta in self.deltas[1:]]
            self.drafted = [drafts] * len(self.accepted)

    def cut(self, length: int) -> None:
        """Keep the first ``length`` tokens."""
        del self.tokens[length:]
        kept, left = [], length
        for delta in self.deltas:
            if left > 0:
                kept.append(min(delta, left))
            left -= delta
        self.deltas = kept


@dataclass
class ServedBlocks:
    """The plug-in's verdicts on one request's blocks, in order; empty where the engine alone decided.

    Attributes:
        accepted: drafted tokens that stand. kept: of each place, True where the rule let the token stand.
        deferred: of each place, True where it was left to the verifier. loss: estimated, of the kept tokens.
    """

    accepted: list[int] = field(default_factory=list)
    kept: list[list[bool]] = field(default_factory=list)
    deferred: list[list[bool]] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, verdicts: Sequence[tuple[Any, int]]) -> ServedBlocks:
        """From a step's `Outcome` on the host and the request's row in it, one pair for each block."""
        found = cls()
        for outcome, row in verdicts:
            if not int(outcome.lengths[row]):  # every draft was withdrawn: no block
                continue
            found.accepted.append(int(outcome.accepted[row]))
            found.kept.append((outcome.origin[row] == int(Origin.KEPT)).tolist())
            found.deferred.append(outcome.deferred[row].tolist())
            found.loss.append(float(outcome.loss[row]))
        return found


def served_stats(
    requests: Sequence[Steps], blocks: Sequence[ServedBlocks], depth: int, passes: int
) -> GenerationStats:
    """Counts of all requests, the same as the loop's of the same texts and blocks.

    A request's first token comes with its prompt and no draft, and counts as a bonus.

    Args:
        depth: T. passes: steps of the engine.

    Raises:
        RuntimeError: verdicts and steps do not agree (a defect, never of the input).
    """
    recorder = StatsRecorder(len(requests), depth)
    for row, (steps, verdicts) in enumerate(zip(requests, blocks)):
        at = 0
        for place, delta in enumerate(steps.deltas):
            drafts = _drafts_of(steps, at, delta, place)
            if drafts is None and delta > 1:
                raise RuntimeError(f"{delta} tokens of a step without drafts: {steps}")
            if drafts is None:
                block = VerifiedBlock([0], [0], [[]], [[int(Origin.BONUS)]], [[]], [0])
                recorder.block([row], [1], [0], block)
                continue
            recorder.block([row], [delta], [drafts], _block(steps, verdicts, at))
            at += 1
    return recorder.finish(passes, passes * depth)


def drafter_stats(requests: Sequence[Steps], passes: int) -> GenerationStats:
    """Counts of texts that the drafter wrote alone, as the loop counts them: every token is kept.

    Args:
        passes: steps of the engine.
    """
    recorder = StatsRecorder(len(requests), 1)
    for row, steps in enumerate(requests):
        count = len(steps.tokens)
        recorder.add(row, drafted=count, kept=count, decided=count, drafter_calls=count)
        for _ in range(count):
            recorder.emit(row, Origin.KEPT)
    return recorder.finish(0, passes)


def _drafts_of(steps: Steps, at: int, delta: int, place: int) -> int | None:
    """Drafted tokens of a step that emitted ``delta`` tokens; None where it had no drafts.

    Steps with and without drafts are told apart by what they emitted: those with drafts come in their order.
    """
    if place == 0 or at >= len(steps.drafted):
        return None
    last = place == len(steps.deltas) - 1
    whole = steps.accepted[at] + 1
    return steps.drafted[at] if delta == whole or (last and delta < whole) else None


def _block(steps: Steps, verdicts: ServedBlocks, at: int) -> VerifiedBlock:
    """One block, by the plug-in's verdict where it gave one; the engine itself holds every draft to the exact check."""
    drafted, accepted = steps.drafted[at], steps.accepted[at]
    kept, deferred = [False] * drafted, [True] * drafted
    if verdicts.accepted:
        if at >= len(verdicts.accepted) or verdicts.accepted[at] != accepted:
            raise RuntimeError(
                f"block {at}: the engine counts {accepted} accepted tokens, the plug-in {verdicts.accepted}"
            )
        kept, deferred = verdicts.kept[at][:drafted], verdicts.deferred[at][:drafted]
    origins = [int(Origin.KEPT if stands else Origin.ACCEPTED) for stands in kept[:accepted]]
    origins.append(int(Origin.RESAMPLED if accepted < drafted else Origin.BONUS))
    return VerifiedBlock([drafted], [accepted], [[]], [origins], [deferred], [0])
