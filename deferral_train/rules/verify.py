"""Verification of a drafted block for a whole batch: accepted length, next token, origin of each token.

Reading order: `verify_block`, then scoring.py (what the rule says), limit.py (the walk along the block), and
`_corrections` and `_bonuses` (the next token). rowwise.py does the first three at once for large vocabularies on a
CPU, dense.py the first in one graph on CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.rules import dense
from deferral_train.rules.base import PositionRule, Rule, named
from deferral_train.rules.block import BONUSES, Block
from deferral_train.rules.learned import Judge
from deferral_train.rules.limit import Walk, walk
from deferral_train.rules.rowwise import applies, verify_rows
from deferral_train.rules.sampling import draw, given_numbers, uniforms
from deferral_train.rules.scoring import score_block
from deferral_train.rules.summary import Summary


class Origin(IntEnum):
    """Where an emitted token came from."""

    NONE = 0
    KEPT = 1  # drafted, not deferred
    ACCEPTED = 2  # drafted, deferred, passed the check
    RESAMPLED = 3  # correction after a rejection
    BONUS = 4  # after a block that was emitted whole
    UNVERIFIED = 5  # drafted and never scored by the verifier (lazy execution)


@dataclass(frozen=True)
class Verdict:
    """What happens to a drafted block.

    Attributes:
        accepted: [B] int64, drafted tokens emitted (kept + accepted).
        next_token: [B] int64, correction or bonus; -1 where the bonus is withheld.
        origin: [B, T+1] int8, one Origin per emitted token, NONE after.
        deferred: [B, T] bool, the decision at each drafted position (token rule: drafted token not kept; law
            rule: drafted token held to the exact check or a stricter one). False where nothing was drafted.
        spent: [B] running estimated loss under max_request_loss, else None.
        fault: [B] integer, 0 where the row's input was fine, else a code for `raise_fault`; such a row's other entries
            mean nothing.
    """

    accepted: Tensor
    next_token: Tensor
    origin: Tensor
    deferred: Tensor
    spent: Tensor | None
    fault: Tensor


def verify_block(
    rule: Rule,
    drafted: Tensor,
    drafter_logits: Tensor | None,
    verifier_logits: Tensor,
    *,
    temperature: float = 1.0,
    drafter_sampling_logits: Tensor | None = None,
    verifier_sampling_logits: Tensor | None = None,
    lengths: Tensor | None = None,
    bonus: str = "verifier",
    generator: torch.Generator | None = None,
    numbers: Tensor | None = None,
    context: Summary | None = None,
    max_request_loss: float | None = None,
    spent: Tensor | None = None,
    check: bool = True,
) -> Verdict:
    """Verify a drafted block: draft + accept + residual of the rule's target law, for every row at once.

    Args:
        rule: decides; executed exactly (Narasimhan et al. 2025, Algorithms 1 and 4 to 6).
        drafted: [B, T] int64, drawn from the drafter's sampling law.
        drafter_logits: decision logits [B, T or T+1, V]; None for one-hot proposals (a draft without a law).
        verifier_logits: decision logits [B, T+1, V]; with bonus ``"none"`` T rows will do.
        temperature: the sampling law is softmax(decision logits / temperature); 0 is greedy and draws nothing
            from the generator.
        drafter_sampling_logits, verifier_sampling_logits: logits after temperature and truncation, of the
            shapes above, where the sampling law is another one; -inf = never.
        lengths: [B], drafted tokens per row; default T.
        bonus: after a block emitted whole, ``"verifier"`` draws from the verifier's law, ``"exact"`` from the
            rule's target law (drafter logits have T+1 rows), ``"none"`` withholds it.
        numbers: [B, T+1] in [0, 1), in place of the generator's: one per check, then the next token's (for callers
            whose rows have a random stream each).
        context: summary fields that logits do not give, [B, T, ..] (T+1 for an exact bonus).
        max_request_loss: B, a limit on the estimated loss per request, in the units of `rule.estimated_gap`
            (expected token errors, or the unit of a head's loss). A kept token costs max(gap, 0) and is kept
            only if spent < B and spent + cost <= B; otherwise its position is executed losslessly. B = 0 is
            lossless. Only kept tokens that are emitted are charged.
        spent: [B], what the request has spent before this block; default 0.
        check: raise at once for what only the data tells (one copy to the host). With False the caller copies
            ``Verdict.fault`` with the rest of the verdict and hands it to `raise_fault`.

    Raises:
        InputError: naming the rule and what to mend: shapes or vocabularies that differ, NaN or infinite
            logits, a drafted token that the drafter's law forbids, a rule that reads the drafter's confidence
            where there is no drafter law.
    """
    with named(rule):
        _check_request(rule, drafter_logits, bonus, max_request_loss)
        block = Block.of(
            drafted, drafter_logits, verifier_logits, temperature,
            drafter_sampling_logits, verifier_sampling_logits, lengths, context,
        )  # fmt: skip
        rows, drafts = drafted.shape
        if bonus != "none" and verifier_logits.shape[1] == drafts:
            raise InputError(
                f"verifier_logits has shape {list(verifier_logits.shape)}; a bonus needs T+1 = {drafts + 1} rows"
            )
        limited = max_request_loss is not None
        uniform: Tensor | None = None
        last: Tensor | None = None
        if block.temperature > 0 and numbers is not None:
            uniform, last = given_numbers(numbers, rows, drafts)
        elif block.temperature > 0:
            uniform, last = uniforms(rows, drafts, generator, verifier_logits)
        if uniform is not None and last is not None and applies(rule, block, limited):
            found = verify_rows(rule, block, uniform, last)
            deferred, next_token = found.deferred, found.correction
            steps = Walk(found.accepted, found.kept, torch.ones_like(found.kept), None)
        else:
            if uniform is not None and dense.applies(rule, block, limited):
                scores = dense.score_dense(rule, block, limited, uniform)
            else:
                scores = score_block(rule, block, limited, uniform)
            steps = walk(scores, block.lengths, uniform, max_request_loss, spent)
            deferred = scores.deferred
            next_token = _corrections(rule, block, steps, deferred, last)
        next_token, spent = _bonuses(rule, block, steps, next_token, bonus, last, max_request_loss)
        fault = torch.zeros_like(steps.accepted)
        return Verdict(steps.accepted, next_token, _origins(steps, block, next_token), deferred, spent, fault)


FAULTS = (
    "drafter_logits has NaN, +inf or only -inf; logits must be finite, with -inf only for masked tokens",
    "verifier_logits has NaN, +inf or only -inf; logits must be finite, with -inf only for masked tokens",
    "drafted holds ids outside the vocabulary",
    "drafted token has probability 0 under the drafter's sampling distribution; pass the logits that it was drawn from",
    "lengths must lie between 0 and the number of drafted tokens",
    "spent must hold one number >= 0 per row",
)


def raise_fault(rule: Rule, faults: Sequence[int]) -> None:
    """Raise the InputError of the first row whose `Verdict.fault` is not 0, naming the rule, the row and the remedy.

    Args:
        faults: `Verdict.fault` on the host.
    """
    for row, fault in enumerate(faults):
        if fault:
            raise InputError(f"rule {rule.name}: row {row}: {FAULTS[(int(fault) - 1) % len(FAULTS)]}")


def _check_request(rule: Rule, drafter_logits: Tensor | None, bonus: str, limit: float | None) -> None:
    if bonus not in BONUSES:
        raise InputError(f"bonus is {bonus!r}; use one of {', '.join(BONUSES)}")
    if drafter_logits is None and rule.reads_drafter_confidence and not rule.is_lossless:
        raise InputError(
            "it reads the drafter's confidence, and these proposals come without a drafter law (one-hot); "
            "use a rule that reads the verifier only, such as opt_verifier, token_v3 or lossless"
        )
    if drafter_logits is None and bonus == "exact":
        raise InputError("bonus 'exact' needs the drafter's law after the block; these proposals have none")
    if limit is not None and not 0 <= float(limit) < float("inf"):
        raise InputError(f"max_request_loss is {limit}; use a finite number >= 0")


def _corrections(rule: Rule, block: Block, steps: Walk, deferred: Tensor, uniform: Tensor | None) -> Tensor:
    """The correction of rejected rows [B]; -1 elsewhere."""
    next_token = torch.full_like(block.lengths, -1)
    own = steps.allowed
    if isinstance(rule, PositionRule):
        own = own & ~deferred  # where it defers, its law is the verifier's
    rows = (steps.accepted < block.lengths).nonzero(as_tuple=True)[0]
    for batch, step in block.chunks(rows, steps.accepted[rows]):
        number = None if uniform is None else uniform[batch]
        next_token[batch] = _correction(rule, block, batch, step, own[batch, step], number)
    return next_token


def _bonuses(
    rule: Rule,
    block: Block,
    steps: Walk,
    next_token: Tensor,
    bonus: str,
    uniform: Tensor | None,
    limit: float | None,
) -> tuple[Tensor, Tensor | None]:
    """next_token [B] with the bonus of rows that were emitted whole, and what is spent with it."""
    spent = steps.spent
    rows = (steps.accepted == block.lengths).nonzero(as_tuple=True)[0]
    for batch, step in block.chunks(rows, block.lengths[rows]) if bonus != "none" else ():
        if bonus == "verifier" or rule.is_lossless:
            pi = block.verifier_row(batch, step).p
        else:
            pi, spent = _exact_bonus_law(rule, block, batch, step, limit, spent)
        next_token[batch] = pi.argmax(dim=-1) if uniform is None else draw(pi, uniform[batch])
    return next_token, spent


def _correction(
    rule: Rule, block: Block, batch: Tensor, step: Tensor, own: Tensor, uniform: Tensor | None
) -> Tensor:
    """A token from max(0, pi - q) at the rejected positions, [R]; from pi where nothing is left.

    Args:
        own: where pi is the rule's law, [R]; elsewhere it is the verifier's.
    """
    laws, token = block.rows(batch, step), block.drafted[batch, step]
    pi = laws.p
    if not rule.is_lossless and bool(own.any()):
        law = rule.step_law(laws, rule.read(laws, token, block.context_at(batch, step)), token)
        pi = torch.where(own.unsqueeze(1), law, pi)
    if uniform is None:
        return pi.argmax(dim=-1)
    excess = (pi - laws.q).clamp_(min=0.0)
    nothing = excess.sum(dim=-1, keepdim=True) <= 0
    return draw(torch.where(nothing, pi, excess) if bool(nothing.any()) else excess, uniform)


def _exact_bonus_law(
    rule: Rule, block: Block, batch: Tensor, step: Tensor, limit: float | None, spent: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """pi after the block [R, V]; under a limit it is charged in full, and is p where it does not fit."""
    drafter = block.drafter_logits
    if drafter is None or drafter.shape[1] <= block.drafted.shape[1]:
        raise InputError("bonus 'exact' needs drafter logits with T+1 rows: one more drafter step")
    if rule.needs & {"verifier_hidden", "verifier_hidden_at_token"} and isinstance(rule, Judge):
        raise InputError("bonus 'exact' has no drafted token to judge; use bonus='verifier'")
    laws = block.rows(batch, step)
    extra = frozenset() if limit is None else rule.gap_needs
    summary = rule.read(laws, None, block.context_at(batch, step), extra)
    pi = rule.law_from(laws, summary)
    if limit is None or spent is None:
        return pi, spent
    cost = rule.estimated_gap(summary).clamp(min=0.0).to(spent)
    fits = (spent[batch] < limit) & (spent[batch] + cost <= limit)
    spent = spent.index_add(0, batch, torch.where(fits, cost, torch.zeros_like(cost)))
    return torch.where(fits.unsqueeze(1), pi, laws.p), spent


def _origins(steps: Walk, block: Block, next_token: Tensor) -> Tensor:
    rows, drafts = block.drafted.shape
    origin = torch.zeros(rows, drafts + 1, dtype=torch.int8, device=block.drafted.device)
    emitted = torch.arange(drafts, device=origin.device) < steps.accepted.unsqueeze(1)
    drafted = torch.where(steps.kept, int(Origin.KEPT), int(Origin.ACCEPTED))
    origin[:, :drafts] = torch.where(emitted, drafted, int(Origin.NONE))
    last = torch.where(steps.accepted < block.lengths, int(Origin.RESAMPLED), int(Origin.BONUS))
    last = torch.where(next_token < 0, int(Origin.NONE), last)
    return origin.scatter(1, steps.accepted.unsqueeze(1), last.to(torch.int8).unsqueeze(1))
