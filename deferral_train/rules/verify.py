"""Verification of a drafted block for a whole batch: accepted length, next token, origin of each token.

Reading order: `verify_block`, then scoring.py (what the rule says), limit.py (the walk along the block), and
`_next_tokens` (correction or bonus).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.rules.base import Rule, named
from deferral_train.rules.block import BONUSES, Block
from deferral_train.rules.laws import Laws
from deferral_train.rules.limit import Walk, walk
from deferral_train.rules.sampling import draw, uniforms
from deferral_train.rules.scoring import score_block
from deferral_train.rules.summary import CONTEXT_FIELDS, TOKEN_FIELDS, Summary


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
    """

    accepted: Tensor
    next_token: Tensor
    origin: Tensor
    deferred: Tensor
    spent: Tensor | None


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
    context: Summary | None = None,
    max_request_loss: float | None = None,
    spent: Tensor | None = None,
) -> Verdict:
    """Verify a drafted block: draft + accept + residual of the rule's target law, for every row at once.

    Args:
        rule: decides; executed exactly (Narasimhan et al. 2025, Algorithms 1 and 4 to 6).
        drafted: [B, T] int64, drawn from the drafter's sampling law.
        drafter_logits: decision logits [B, T or T+1, V]; None for one-hot proposals (a draft without a law).
        verifier_logits: decision logits [B, T+1, V].
        temperature: the sampling law is softmax(decision logits / temperature); 0 is greedy and draws nothing
            from the generator.
        drafter_sampling_logits, verifier_sampling_logits: logits after temperature and truncation, of the
            shapes above, where the sampling law is another one; -inf = never.
        lengths: [B], drafted tokens per row; default T.
        bonus: after a block emitted whole, ``"verifier"`` draws from the verifier's law, ``"exact"`` from the
            rule's target law (drafter logits have T+1 rows), ``"none"`` withholds it.
        context: summary fields that logits do not give, [B, T, ..] (T+1 for an exact bonus).
        max_request_loss: B, a limit on the estimated loss per request, in the units of `rule.estimated_gap`
            (expected token errors, or the unit of a head's loss). A kept token costs max(gap, 0) and is kept
            only if spent < B and spent + cost <= B; otherwise its position is executed losslessly. B = 0 is
            lossless. Only kept tokens that are emitted are charged.
        spent: [B], what the request has spent before this block; default 0.

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
        numbers = None if block.temperature == 0 else uniforms(rows, drafts, generator, verifier_logits)
        with_gap = max_request_loss is not None
        scores = score_block(rule, block, with_gap)
        steps = walk(scores, block.lengths, None if numbers is None else numbers[0], max_request_loss, spent)
        last = None if numbers is None else numbers[1]
        next_token, steps = _next_tokens(rule, block, steps, bonus, last, max_request_loss)
        return Verdict(
            steps.accepted, next_token, _origins(steps, block, next_token), scores.deferred, steps.spent
        )


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


def _next_tokens(
    rule: Rule, block: Block, steps: Walk, bonus: str, uniform: Tensor | None, limit: float | None
) -> tuple[Tensor, Walk]:
    """The correction of rejected rows and the bonus of the others, row by row to bound memory."""
    next_token = torch.full_like(block.lengths, -1)
    rejected = (steps.accepted < block.lengths).tolist()
    spent = steps.spent
    for row, was_rejected in enumerate(rejected):
        index = torch.tensor([row], device=block.lengths.device)
        step, number = steps.accepted[index], None if uniform is None else uniform[index]
        if was_rejected:
            next_token[row] = _correction(rule, block, index, step, steps.allowed[index, step], number)[0]
        elif bonus != "none":
            token, cost = _bonus(rule, block, index, step, bonus, number, limit, spent)
            next_token[row] = token[0]
            spent = spent if cost is None or spent is None else spent.index_add(0, index, cost)
    return next_token, Walk(steps.accepted, steps.kept, steps.allowed, spent)


def _correction(
    rule: Rule, block: Block, batch: Tensor, step: Tensor, allowed: Tensor, uniform: Tensor | None
) -> Tensor:
    """A token from max(0, pi - q) at the rejected position, [1]."""
    laws, token = block.rows(batch, step), block.drafted[batch, step]
    if not bool(allowed):
        pi = laws.p
    else:
        pi = rule.step_law(laws, rule.read(laws, token, block.context_at(batch, step)), token)
    if uniform is None:
        return pi.argmax(dim=-1)
    excess = (pi - laws.q).clamp_(min=0.0)
    return draw(excess if bool(excess.any()) else pi, uniform)


def _bonus(
    rule: Rule,
    block: Block,
    batch: Tensor,
    step: Tensor,
    bonus: str,
    uniform: Tensor | None,
    limit: float | None,
    spent: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """A token after a block that was emitted whole [1], and its cost under a limit."""
    if bonus == "verifier" or rule.is_lossless:
        pi, cost = _verifier_row(block, batch, step), None
    else:
        pi, cost = _exact_bonus_law(rule, block, batch, step, limit, spent)
    return (pi.argmax(dim=-1) if uniform is None else draw(pi, uniform)), cost


def _verifier_row(block: Block, batch: Tensor, step: Tensor) -> Tensor:
    verifier = block.verifier_logits[batch, step]
    given = block.verifier_sampling_logits
    sampling = None if given is None else given[batch, step]
    return Laws.of(verifier, verifier, block.temperature, sampling, sampling).p


def _exact_bonus_law(
    rule: Rule, block: Block, batch: Tensor, step: Tensor, limit: float | None, spent: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """pi after the block, and its cost: charged in full where the position is not deferred."""
    drafter = block.drafter_logits
    if drafter is None or drafter.shape[1] <= block.drafted.shape[1]:
        raise InputError("bonus 'exact' needs drafter logits with T+1 rows: one more drafter step")
    if rule.needs & (TOKEN_FIELDS | {"verifier_hidden"}) - CONTEXT_FIELDS and rule.name == "judge":
        raise InputError("bonus 'exact' has no drafted token to judge; use bonus='verifier'")
    laws = block.rows(batch, step)
    summary = rule.read(
        laws, None, block.context_at(batch, step), rule.gap_needs if limit is not None else frozenset()
    )
    if limit is None or spent is None:
        return rule.law_from(laws, summary), None
    cost = rule.estimated_gap(summary).clamp(min=0.0).to(spent)
    before = spent[batch]
    if not bool((before < limit) & (before + cost <= limit)):
        return laws.p, None
    return rule.law_from(laws, summary), cost


def _origins(steps: Walk, block: Block, next_token: Tensor) -> Tensor:
    rows, drafts = block.drafted.shape
    origin = torch.zeros(rows, drafts + 1, dtype=torch.int8, device=block.drafted.device)
    emitted = torch.arange(drafts, device=origin.device) < steps.accepted.unsqueeze(1)
    origin[:, :drafts][emitted] = int(Origin.ACCEPTED)
    origin[:, :drafts][emitted & steps.kept] = int(Origin.KEPT)
    last = torch.where(steps.accepted < block.lengths, int(Origin.RESAMPLED), int(Origin.BONUS))
    last = torch.where(next_token < 0, int(Origin.NONE), last)
    return origin.scatter(1, steps.accepted.unsqueeze(1), last.to(torch.int8).unsqueeze(1))
