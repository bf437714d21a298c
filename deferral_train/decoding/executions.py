"""The executions without drafted blocks: token, lazy and sequence cascades (Narasimhan et al. 2025).

- Token cascade, Algorithms 2 and 3: one decision per token. A draft-stage rule calls the verifier only where it defers;
  the tokens kept since its last call are then fed to it in the same pass. A rule that reads the verifier calls it at
  every token (the oracle cascade, Algorithm 3).
- Lazy cascade: a draft-stage rule decides, and what it keeps is emitted unverified. Where it defers, one pass of the
  verifier scores the drafted token and takes in every token emitted since the last pass; if the token stands, the same
  pass gives a bonus token. The target distribution is the token cascade's, except that bonus tokens follow the verifier
  (``bonus="exact"`` withholds them).
- Sequence cascade: the drafter writes the whole answer, then the rule decides once per row. SeqCascade[Chow] of the
  paper: leave the row to the verifier iff q(x | prompt) < 1 - alpha. A rule may read the mean entropy of the row, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deferral_train.decoding.cached_model import CachedModel
from deferral_train.decoding.checks import estimates_early
from deferral_train.decoding.distributions import Drafted
from deferral_train.decoding.state import DecodingState
from deferral_train.errors import InputError
from deferral_train.rules.base import PositionRule
from deferral_train.rules.distributions import Distributions
from deferral_train.rules.registry import make_rule
from deferral_train.rules.summary import Summary
from deferral_train.rules.verify import Origin, Verdict, verify_block

SEQUENCE_FIELDS = frozenset({"drafter_max", "drafter_entropy"})


def token_cascade(state: DecodingState) -> None:
    """Until all rows end: decide, then draw from the drafter's distribution or from the verifier's."""
    while state.running:
        token, deferred, called = _next_token(state)
        for row, was_deferred in zip(state.tokens.rows, deferred):
            _record(state, row, was_deferred, called)
        _emit_one(state, token)


def _emit_one(state: DecodingState, token: Tensor) -> None:
    """Append one token [B] per row."""
    state.tokens.write(0, token[:, None])
    counts, done = state.ends.cut(state.tokens, token[:, None].tolist(), [1] * len(token))
    state.advance(counts, done, state.spent)


def _next_token(state: DecodingState) -> tuple[Tensor, list[bool], bool]:
    """The token of each row [B], which rows deferred, and whether every row needed the verifier."""
    rule = state.rule
    if not rule.drafts or rule.is_lossless:
        return _verifier_token(state), [True] * len(state.tokens.rows), True
    decision, sampling = _logits_of(state, state.drafter, "drafter")
    drafted = state.distributions.draw_one(decision, sampling, state.generator)
    reads_verifier = rule.stage == "verify" and bool(rule.needs)
    if reads_verifier or (state.settings.max_request_loss is not None and not estimates_early(rule)):
        verifier, verifier_sampling = _logits_of(state, state.verifier, "verifier")
        temperature = state.distributions.temperature
        both = Distributions.of(decision, verifier, temperature, sampling, verifier_sampling)
        defer = _decide(state, both, drafted)
        theirs = state.distributions.draw_one(verifier, verifier_sampling, state.generator)
        return torch.where(defer, theirs, drafted), defer.tolist(), True
    defer = _decide_early(state, decision, sampling, drafted)
    deferred = defer.tolist()
    if any(deferred):
        drafted = torch.where(defer, _verifier_token(state), drafted)
    return drafted, deferred, False


def _verifier_token(state: DecodingState) -> Tensor:
    """A token [B] of the verifier's distribution behind every row's end."""
    decision, sampling = _logits_of(state, state.verifier, "verifier")
    return state.distributions.draw_one(decision, sampling, state.generator)


def _logits_of(state: DecodingState, model: CachedModel, role: str) -> tuple[Tensor, Tensor | None]:
    """Decision and sampling logits [B, V] of a model behind every row's end."""
    logits = model.feed().to(state.tokens.device)
    decision = state.distributions.decision(logits, state.tokens)
    if not bool(torch.isfinite(decision.amax(dim=-1)).all()):
        raise InputError(
            f"{role}'s logits are NaN or infinite, or every token is forbidden; check its weights, number format and "
            "logits processors"
        )
    sampling = state.distributions.sampling(logits, decision, state.tokens)
    return decision[:, 0], None if sampling is None else sampling[:, 0]


def _decide_early(state: DecodingState, decision: Tensor, sampling: Tensor | None, drafted: Tensor) -> Tensor:
    """Decisions of a draft-stage rule on drafted tokens, bool [B]: True defers."""
    rule = state.rule
    if rule.is_lossless or not (rule.needs or state.settings.max_request_loss is not None):
        return torch.full((len(decision),), rule.is_lossless, device=decision.device)
    alone = Distributions.of(decision, decision, state.distributions.temperature, sampling, sampling)
    return _decide(state, alone, drafted)


def _decide(state: DecodingState, distributions: Distributions, drafted: Tensor) -> Tensor:
    """The rule's decision [B]; under a limit a token whose estimated loss does not fit is deferred too."""
    rule, limit = state.rule, state.settings.max_request_loss
    extra = rule.gap_needs if limit is not None else frozenset()
    summary = rule.read(distributions, drafted, _context(state), extra)
    assert isinstance(rule, PositionRule)  # checks.py refuses others
    if limit is None or state.spent is None:
        return rule.defer(summary).expand(len(drafted))
    gap = rule.estimated_gap(summary)
    cost = gap.to(state.spent).clamp(min=0.0)
    # Written so that a cost that is not a number never fits.
    defer = rule.defer_by_gap(summary, gap) | ~((state.spent < limit) & (state.spent + cost <= limit))
    state.spent = torch.where(defer, state.spent, state.spent + cost)
    return defer


def _context(state: DecodingState) -> Summary | None:
    """Context fields [B] of the next position; a token cascade has no block, so that every place is 0."""
    if not state.context_fields:
        return None
    given = {name: found[:, 0] for name, found in state.previous_tokens(1).items()}
    position = state.generated
    given |= {"draft_position": torch.zeros_like(position), "position": position}
    for name, model in (("drafter_hidden", state.drafter), ("verifier_hidden", state.verifier)):
        if name in state.context_fields:
            given[name] = model.hidden(1)[:, 0]
    return Summary({name: given[name] for name in state.context_fields})


def _record(state: DecodingState, row: int, deferred: bool, called: bool) -> None:
    stats, drafts = state.stats, int(state.rule.drafts and not state.rule.is_lossless)
    stats.emit(row, Origin.RESAMPLED if deferred else Origin.KEPT)
    stats.add(row, verifier_calls=int(called or deferred), drafter_calls=drafts, decided=1)
    if deferred:
        stats.add(row, resampled=1, deferred=1)
    else:
        stats.add(row, drafted=1, kept=1)


# Lazy cascade


def lazy_cascade(state: DecodingState) -> None:
    """Until all rows end: draft one token per row; check the deferred ones, emit the others as they are."""
    while state.running:
        decision, sampling = _logits_of(state, state.drafter, "drafter")
        drafted = state.distributions.draw_one(decision, sampling, state.generator)
        state.tokens.write(0, drafted[:, None])
        deferred = _decide_early(state, decision, sampling, drafted).tolist()
        verdict = _checked(state, drafted, decision, sampling) if any(deferred) else None
        _emit_checked(state, drafted, deferred, verdict)


def _checked(state: DecodingState, drafted: Tensor, decision: Tensor, sampling: Tensor | None) -> Verdict:
    """One verifier pass over everything pending and the drafted token; the deferred rows use its verdict."""
    distributions, tokens = state.distributions, state.tokens
    logits = state.verifier.feed(ahead=1, keep=2).to(tokens.device)
    place = (
        Drafted([1] * len(drafted), state.ends.are_eos(drafted.tolist())) if distributions.strict else None
    )
    verifier = distributions.decision(logits, tokens, 0, place)
    return verify_block(
        make_rule("lossless"),
        drafted[:, None],
        decision[:, None],
        verifier,
        temperature=distributions.temperature,
        drafter_sampling_logits=None if sampling is None else sampling[:, None],
        verifier_sampling_logits=distributions.sampling(logits, verifier, tokens, 0, place),
        bonus="verifier" if state.settings.bonus == "verifier" else "none",
        generator=state.generator,
    )


def _emit_checked(
    state: DecodingState, drafted: Tensor, deferred: list[bool], verdict: Verdict | None
) -> None:
    block = torch.stack([drafted, torch.full_like(drafted, state.tokens.pad_token_id)], dim=1)
    offered, passed = [1] * len(deferred), [True] * len(deferred)
    if verdict is not None:
        checked = torch.tensor(deferred, device=drafted.device)
        following = verdict.next_token.clamp(min=0)
        stands = (verdict.accepted == 1) | ~checked
        block[:, 0] = torch.where(stands, drafted, following)
        block[:, 1] = torch.where(stands & checked, following, block[:, 1])
        passed = stands.tolist()
        withheld = (verdict.next_token < 0).tolist()
        offered = [1 + int(d and p and not w) for d, p, w in zip(deferred, passed, withheld)]
    state.tokens.write(0, block)
    counts, done = state.ends.cut(state.tokens, block.tolist(), offered, state.together)
    for row, was_deferred, stood, count in zip(state.tokens.rows, deferred, passed, counts):
        _record_lazily(state, row, was_deferred, stood, count)
    state.advance(counts, done, state.spent)


def _record_lazily(state: DecodingState, row: int, deferred: bool, stood: bool, count: int) -> None:
    stats = state.stats
    stats.add(row, drafted=1, decided=1, drafter_calls=1)
    if not deferred:
        stats.add(row, unverified=1)
        stats.emit(row, Origin.UNVERIFIED)
        return
    stats.add(row, deferred=1, verifier_calls=1)
    if not stood:
        stats.add(row, rejected=1, resampled=1)
        stats.emit(row, Origin.RESAMPLED)
        return
    stats.add(row, accepted=1, bonus=count - 1)
    stats.emit(row, Origin.ACCEPTED)
    if count == 2:
        stats.emit(row, Origin.BONUS)


# Sequence cascade


def sequence_cascade(state: DecodingState) -> None:
    """Draft every row to its end, decide, and let the verifier write the deferred rows anew."""
    if not state.rule.needs <= SEQUENCE_FIELDS:
        raise InputError(
            f"execution='sequence': rule {state.rule.name} reads {', '.join(sorted(state.rule.needs))}; "
            "a whole row has a probability and a mean entropy only (chow, chow_log)"
        )
    rows = list(range(len(state.tokens.ids)))
    state.active = [state.drafter]
    logprob, entropy = _draft_rows(state)
    counts = [state.tokens.final_lengths[row] - state.tokens.prompt_length for row in rows]
    mean = entropy / torch.tensor(counts, dtype=entropy.dtype, device=entropy.device)
    summary = Summary({"drafter_max": logprob.exp(), "drafter_entropy": mean})
    assert isinstance(state.rule, PositionRule)  # checks.py refuses others
    deferred = state.rule.defer(summary).tolist()
    for row, count, was_deferred in zip(rows, counts, deferred):
        _record_drafted(state, row, count, was_deferred)
    _rewrite(state, [row for row, was_deferred in zip(rows, deferred) if was_deferred])


def _draft_rows(state: DecodingState) -> tuple[Tensor, Tensor]:
    """Let the drafter write all rows; log q(x | prompt) and the summed entropy of each, [R], float64."""
    rows = len(state.tokens.ids)
    logprob = torch.zeros(rows, dtype=torch.float64, device=state.tokens.device)
    entropy = torch.zeros_like(logprob)
    while state.running:
        decision, sampling = _logits_of(state, state.drafter, "drafter")
        token = state.distributions.draw_one(decision, sampling, state.generator)
        distribution = torch.log_softmax(decision.double(), dim=-1)
        index = state.tokens.index
        logprob[index] += distribution.gather(1, token[:, None])[:, 0]
        entropy[index] += torch.special.entr(distribution.exp()).sum(dim=-1)
        _emit_one(state, token)
    return logprob, entropy


def _record_drafted(state: DecodingState, row: int, count: int, deferred: bool) -> None:
    state.stats.add(row, drafted=count, decided=count, drafter_calls=count)
    if deferred:
        state.stats.add(row, rejected=count, deferred=count)
        return
    state.stats.add(row, kept=count)
    for _ in range(count):
        state.stats.emit(row, Origin.KEPT)


def _rewrite(state: DecodingState, rows: list[int]) -> None:
    """The verifier alone writes ``rows`` from their prompts."""
    if not rows:
        return
    state.active = [state.verifier]
    state.tokens.restart(rows)
    state.verifier.start_over()
    while state.running:
        token = _verifier_token(state)
        for row in state.tokens.rows:
            state.stats.add(row, resampled=1, verifier_calls=1)
            state.stats.emit(row, Origin.RESAMPLED)
        _emit_one(state, token)
