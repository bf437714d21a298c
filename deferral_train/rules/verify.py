"""Verification of a drafted block for a whole batch: accepted length, next token, origin of each token.

`verify_block` is the whole of it, on any device and without a copy to the host but the one that looks for faults.
What a rule does at a position is in its `step` (base.py), drawing a token in sampling.py. B batch, T drafted
positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property

import torch
from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.rules.base import BlockRule, PositionRule, Rule, RuleStep, named
from deferral_train.rules.distributions import (
    MODELS,
    Distributions,
    as_float,
    check_temperature,
    gather_token,
)
from deferral_train.rules.emission import onto_support
from deferral_train.rules.learned import Judge
from deferral_train.rules.sampling import draw, uniforms
from deferral_train.rules.summary import Summary

_LOGITS = ("verifier_logits", "drafter_logits", "drafter_sampling_logits", "verifier_sampling_logits")
BONUSES = ("verifier", "exact", "none")
FAULTS = (
    "drafter_logits has NaN, +inf or only -inf; logits must be finite, with -inf only for masked tokens",
    "verifier_logits has NaN, +inf or only -inf; logits must be finite, with -inf only for masked tokens",
    "drafted holds ids outside the vocabulary",
    "a drafted token has probability 0 under the drafter's sampling distribution; pass the logits it was drawn from",
    "lengths must lie between 0 and the number of drafted tokens",
    "spent must hold one number >= 0 per row",
)


VERIFICATIONS = ("token", "block")
LEFT = 1e-30  # part of pi in the weights of a correction: felt only where rounding leaves nothing of max(0, pi - q)


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
    """A verified block, on the device of its logits.

    Attributes:
        accepted: [B] int64, drafted tokens emitted (kept + accepted).
        next_token: [B] int64, correction or bonus; -1 where the bonus is withheld.
        kept: [B, T] bool, the drafted token stands by the rule's leave rather than by the exact check.
        deferred: [B, T] bool, the decision at each drafted position (token rule: drafted token not kept;
            distribution rule: drafted token held to the exact check or a stricter one). False where nothing was
        drafted. lengths: tokens that were drafted, [B] int64, or T where every row drafted T.
        spent: [B] running estimated loss under max_request_loss, else None.
        fault: [B] int64, 0 where the row's input was fine, else a code for `raise_fault`; the other entries of such a
            row mean nothing.
    """

    accepted: Tensor
    next_token: Tensor
    kept: Tensor
    deferred: Tensor
    lengths: Tensor | int
    spent: Tensor | None
    fault: Tensor

    @cached_property
    def origin(self) -> Tensor:
        """[B, T+1] int8, one `Origin` per emitted token, NONE after. Worked out when it is first read."""
        steps = torch.arange(self.kept.shape[1] + 1, device=self.kept.device)
        stands = Origin.ACCEPTED - torch.nn.functional.pad(self.kept.view(torch.int8), (0, 1))
        whole = self.accepted == self.lengths
        last = Origin.RESAMPLED + whole.view(torch.int8)  # BONUS after a block that was emitted whole
        last = last * (self.next_token >= 0)
        origin = stands * (steps < self.accepted.unsqueeze(1))
        return origin.scatter(1, self.accepted.unsqueeze(1), last.unsqueeze(1))


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
    max_request_loss: float | Tensor | None = None,
    spent: Tensor | None = None,
    verification: str = "token",
    check: bool = True,
) -> Verdict:
    """Verify a drafted block: draft + accept + residual of the rule's target, for every row at once.

    Args:
        rule: decides; executed exactly (Narasimhan et al. 2025, Algorithms 1 and 4 to 6).
        drafted: [B, T] int64, drawn from the drafter's sampling distribution.
        drafter_logits: decision logits [B, T or T+1, V]; None for one-hot proposals (a draft without a distribution).
        verifier_logits: decision logits [B, T+1, V]; with bonus ``"none"`` T rows will do.
        temperature: the sampling distribution is softmax(decision logits / temperature); 0 is greedy: it compares
            argmaxes and draws nothing from the generator.
        drafter_sampling_logits, verifier_sampling_logits: logits after temperature and truncation, of the same
            shapes, where the sampling distribution is not softmax(decision / temperature); -inf = never.
        lengths: [B], drafted tokens per row; default T. Positions beyond may hold anything.
        bonus: token after a block that was emitted whole: ``"verifier"`` draws it from the verifier, ``"exact"`` from
            the rule's target (drafter logits have T+1 rows), ``"none"`` withholds it (next_token = -1).
        generator: of the random numbers; their count depends on the shape alone.
        numbers: [B, T+1] in [0, 1), the caller's own in place of the generator's.
        context: summary fields [B, T, ..] that logits do not give (hidden states, positions).
        max_request_loss: limit B on the estimated loss per request (`rule.estimated_gap`, cut at 0). A token is kept
            only if spent < B and spent + cost <= B; otherwise its position is executed losslessly. B = 0 is lossless.
            Only kept tokens that are emitted are charged. A tensor [B] gives each row its own; a row whose limit is no
            number >= 0 is lossless.
        spent: [B], what the request has spent before this block; default 0.
        verification: ``"token"`` checks each token by itself; ``"block"`` checks them together (`_accept_together`),
            which emits the same distribution and lets longer drafts stand. At temperature 0 both are one.
        check: raise at once for what only the data tells (one copy to the host). With False the caller copies
            ``Verdict.fault`` with the rest of the verdict and hands it to `raise_fault`.

    Raises:
        InputError: naming the rule and what to mend: shapes or vocabularies that differ, NaN or infinite logits, a
            drafted token that the drafter's distribution forbids, a rule that reads the drafter's confidence where
            there is none, what `check_together` refuses.
    """
    with named(rule):
        block = _Given(
            rule, drafted, drafter_logits, verifier_logits, drafter_sampling_logits, verifier_sampling_logits,
            check_temperature(temperature), lengths, bonus, context, max_request_loss, spent, verification,
        ).block()  # fmt: skip
        if not block.positions:
            return block.nothing()
        checks, last = block.uniforms(generator, numbers)
        lossless = rule.is_lossless or not drafted.shape[1]  # of an empty block nobody needs to know anything
        if lossless:
            step, gap = block.lossless_step(), None
        else:
            summary = block.read(rule, max_request_loss is not None)
            gap = None if max_request_loss is None else rule.estimated_gap(summary)
            if isinstance(rule, PositionRule):
                deferred = rule.defer(summary) if gap is None else rule.defer_by_gap(summary, gap)
                step = RuleStep.of_deferral(deferred, block.distributions, block.token)
            elif isinstance(rule, BlockRule):
                step = block.forgiving_step(rule, summary, checks)
            else:
                step = rule.step(block.distributions, summary, block.token)
        if verification == "block" and checks is not None:
            step = block.with_target(step, lossless)
            standing = _accept_together(block, step, checks)
        else:
            standing = _accept_each(block, step, checks, gap, max_request_loss)
        rejected, spent = standing.accepted < block.lengths, standing.spent
        next_token = block.target_at(step, standing)
        if last is not None:
            checked = rejected if lossless else block.checked_at(step, standing, rejected)
            next_token = draw(block.weights(next_token, standing, checked), last)
        if bonus == "exact" and not rule.is_lossless:
            beyond, spent = block.exact_bonus(rule, last, rejected, spent, max_request_loss)
            next_token = torch.where(rejected, next_token, beyond)
        elif bonus == "none":
            next_token = torch.where(rejected, next_token, -1)
        kept, deferred, fault = block.inside(standing.kept), block.inside(step.deferred), block.fault()
        verdict = Verdict(standing.accepted, next_token, kept, deferred, block.lengths, spent, fault)
    if check:
        raise_fault(rule, fault.tolist())
    return verdict


def check_together(rule: Rule, verification: str, bonus: str, limit: float | Tensor | None) -> None:
    """Refuse what a rule cannot do with a way of verifying, a bonus and a limit; messages do not name the rule.

    Raises:
        InputError: naming the remedy.
    """
    if verification not in VERIFICATIONS:
        raise InputError(f"verification is {verification!r}; use one of {', '.join(VERIFICATIONS)}")
    if verification == "block" and limit is not None:
        raise InputError(
            "max_request_loss with verification 'block': what a request has spent depends on which of its tokens were "
            "kept, so that its target is not fixed by the text; use verification 'token'"
        )
    if rule.is_lossless:
        return
    if verification == "block" and not rule.checks_target:
        raise InputError(
            "verification 'block' needs a check against one target distribution of each place, and this rule's check "
            "depends on the tokens that were drafted; use verification 'token'"
        )
    if bonus == "exact" and isinstance(rule, BlockRule):
        raise InputError("bonus 'exact' is drawn from a rule's target, and it has none; use bonus 'verifier'")


def raise_fault(rule: Rule, faults: Sequence[int]) -> None:
    """Raise the InputError of the first row whose `Verdict.fault` is not 0, naming the rule, the row and the remedy.

    Args:
        faults: `Verdict.fault` on the host.
    """
    for row, fault in enumerate(faults):
        if fault:
            raise InputError(f"rule {rule.name}: row {row}: {FAULTS[int(fault) - 1]}")


def _passes(block: _Block, step: RuleStep, checks: Tensor | None) -> Tensor:
    """Drafted tokens that stand, each by itself: kept, or with probability min(1, pi(x) / q(x)); bool [B, T]."""
    distributions, token = block.distributions, block.token
    if step.passes is not None:
        return step.passes
    if checks is None:
        if step.target is not None:
            return block.inside(token == step.target)
        return block.inside(step.kept | (token == distributions.verifier(distributions.best)))
    q, p = distributions.sampled_of(token)
    if step.probability is None:
        return block.inside(accepts(p, q, checks, step.kept))
    return block.inside(accepts(step.probability, q, checks))


def accepts(pi: Tensor, q: Tensor, uniform: Tensor, kept: Tensor | None = None) -> Tensor:
    """Drafted tokens [B, T] that stand: kept, or u < pi(x) / q(x) with u uniform in [0, 1), bool."""
    stands = uniform * q < pi
    return stands if kept is None else kept | stands


@dataclass(frozen=True)
class _Standing:
    """How much of each row's draft stands.

    Attributes:
        accepted: tokens that stand, [B]. kept: as the rule's step has it, and where a limit allowed it, [B, T].
        allowed: places where a limit allowed the rule, [B, T]; None without a limit.
        spent: under a limit, with this block, [B], else None.
        scale: of pi in a correction, [B, 1], where tokens were checked together; else None.
    """

    accepted: Tensor
    kept: Tensor
    allowed: Tensor | None = None
    spent: Tensor | None = None
    scale: Tensor | None = None


def _accept_each(
    block: _Block,
    step: RuleStep,
    checks: Tensor | None,
    gap: Tensor | None,
    limit: float | Tensor | None,
) -> _Standing:
    """Accept along each row, one token after another, until one does not pass."""
    passes = _passes(block, step, checks)
    if gap is None or limit is None or block.spent is None:
        return _Standing(passes.cumprod(dim=1).sum(dim=1), step.kept, spent=block.spent)
    exact = _passes(block, block.lossless_step(), checks)
    accepted, allowed, spent = _walk(passes, exact, step.kept, gap, block.spent, limit)
    return _Standing(accepted, step.kept & allowed, allowed, spent)


def _accept_together(block: _Block, step: RuleStep, checks: Tensor) -> _Standing:
    """Block verification (Sun et al. 2024, arXiv 2403.10444, Algorithm 2), with the rule's target in place of p.

    With w_0 = 1 and w_t = min(1, w_{t-1} pi(x_t)/q(x_t)), the first t tokens stand if any of the coins t..L falls: coin
    t < L with probability Z/(Z + 1 - w_t), Z = sum_v max(0, w_t pi(v) - q(v)) at the place behind them, coin L with
    w_L. So t tokens or more stand with probability w_t, never less than the product of the single checks, and what
    follows t tokens is drawn from max(0, w_t pi - q). What is emitted follows pi exactly as long as everything up to
    a place fixes pi and q there.
    """
    q, _ = block.distributions.sampled_of(block.token)
    assert step.target is not None
    assert step.probability is not None
    steps = torch.arange(1, q.shape[1] + 1, device=q.device)
    # The products that start anew wherever they pass 1, as a sum less its highest so far.
    log = torch.nn.functional.pad((step.probability.double() / q.double()).log().cumsum(dim=1), (1, 0))
    reached = (log - log.cummax(dim=1).values).exp()
    scale = reached[:, :-1].to(q.dtype).unsqueeze(2)
    behind = (scale * step.target - block.distributions.q).clamp_(min=0.0).sum(dim=2) + LEFT
    coins = torch.cat([(behind / (behind + (1 - reached[:, :-1])))[:, 1:], reached[:, -1:]], dim=1)
    if not isinstance(block.lengths, int):
        coins = torch.where(steps == block.lengths.unsqueeze(1), reached[:, 1:], coins)
    stand = block.inside(accepts(coins, torch.ones_like(coins), checks))
    accepted = torch.nn.functional.pad(stand * steps, (1, 0)).amax(dim=1)
    return _Standing(accepted, step.kept, scale=reached.gather(1, accepted.unsqueeze(1)))


def _walk(
    passes: Tensor, exact: Tensor, kept: Tensor, cost: Tensor, spent: Tensor, limit: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Accept along each row under a limit on the loss: accepted [B], where the rule was in force [B, T], spent [B].

    Args:
        passes, exact: drafted tokens that stand under the rule, and under lossless execution, bool [B, T].
        cost: estimated loss of keeping, [B, T]. limit: of all rows, or [B].
    """
    cost = cost.double().clamp(min=0.0)
    alive = torch.ones_like(passes[:, 0])
    accepted, allowed = torch.zeros_like(alive, dtype=torch.int64), []
    for t in range(passes.shape[1]):
        # A cost that is not a number is never within the limit.
        fits = (spent < limit) & (spent + cost[:, t] <= limit)
        alive = alive & torch.where(fits, passes[:, t], exact[:, t])
        spent = torch.where(alive & kept[:, t] & fits, spent + cost[:, t], spent)
        accepted = accepted + alive
        allowed.append(fits)
    return accepted, torch.stack(allowed, dim=1), spent


@dataclass(frozen=True)
class _Given:
    """The arguments of `verify_block`, checked as far as no data is needed."""

    rule: Rule
    drafted: Tensor
    drafter_logits: Tensor | None
    verifier_logits: Tensor
    drafter_sampling_logits: Tensor | None
    verifier_sampling_logits: Tensor | None
    temperature: float
    lengths: Tensor | None
    bonus: str
    context: Summary | None
    limit: float | Tensor | None
    spent: Tensor | None
    verification: str

    def block(self) -> _Block:
        """The block, its logits in one tensor of both models and in one precision.

        Raises:
            InputError: shapes, vocabularies or requests that do not fit.
        """
        self._check_request()
        rows, drafts = self._check_drafted()
        after = drafts + (self.bonus != "none")  # positions of the verifier that are read
        logits = self._logits(rows, drafts, after)
        vocabulary, device = logits["verifier_logits"].shape[-1], self.drafted.device
        token = self.drafted.long().clamp(0, vocabulary - 1)
        suspects: dict[int, Tensor] = {}
        lengths, mask, reads = self._lengths(rows, drafts, after, suspects)
        if self.temperature == 0 and self.rule.is_lossless and self.limit is None:
            logits = {name: one for name, one in logits.items() if name.startswith("verifier")}
        elif self.drafter_logits is None:
            certain = torch.full_like(logits["verifier_logits"][:, :drafts], -torch.inf)
            logits["drafter_logits"] = certain.scatter(2, token.unsqueeze(2), 0.0)
        return _Block(
            drafted=self.drafted,
            token=token,
            lengths=lengths,
            mask=mask,
            reads=reads,
            distributions=self._distributions(logits, drafts, after),
            context=self._context(rows, drafts),
            spent=self._spent(rows, device, suspects),
            suspects=suspects,
            logits=logits,
        )

    def _check_request(self) -> None:
        if self.bonus not in BONUSES:
            raise InputError(f"bonus is {self.bonus!r}; use one of {', '.join(BONUSES)}")
        if self.drafter_logits is None:
            if self.rule.reads_drafter_confidence and not self.rule.is_lossless:
                raise InputError(
                    "it reads the drafter's confidence, and these proposals come without a drafter distribution "
                    "(one-hot); use a rule that reads the verifier only, such as opt_verifier, token_v3 or lossless"
                )
            if self.bonus == "exact":
                raise InputError(
                    "bonus 'exact' needs the drafter's distribution after the block; these proposals have none"
                )
            if self.drafter_sampling_logits is not None:
                raise InputError(
                    "drafter_sampling_logits without drafter_logits; pass both, or neither (one-hot)"
                )
        check_together(self.rule, self.verification, self.bonus, self.limit)
        if isinstance(self.limit, Tensor):
            if self.limit.shape != self.drafted.shape[:1]:
                raise InputError(
                    f"max_request_loss has shape {list(self.limit.shape)}; pass one number, or one per row, "
                    f"{list(self.drafted.shape[:1])}"
                )
        elif self.limit is not None and not 0 <= float(self.limit) < float("inf"):
            raise InputError(f"max_request_loss is {self.limit}; use a finite number >= 0")

    def _check_drafted(self) -> tuple[int, int]:
        drafted = self.drafted
        if not isinstance(drafted, Tensor) or drafted.dim() != 2 or drafted.dtype.is_floating_point:
            raise InputError("drafted must be an integer tensor [B, T] of token ids")
        return drafted.shape[0], drafted.shape[1]

    def _logits(self, rows: int, drafts: int, after: int) -> dict[str, Tensor]:
        """Logits by name, in float32 or float64."""
        vocabulary = as_float(self.verifier_logits, "verifier_logits").shape[-1]
        found = {}
        for name in _LOGITS:
            given = getattr(self, name)
            if given is None:
                continue
            found[name] = as_float(given, name)
            shape, counts = tuple(given.shape), (drafts, drafts + 1)
            if name == "verifier_sampling_logits":
                counts = (self.verifier_logits.shape[1],)
            if len(shape) == 3 and shape[-1] != vocabulary:
                raise InputError(
                    f"vocabularies differ: {name} has {shape[-1]}, verifier_logits {vocabulary}; "
                    "cut or pad both to the tokenizer's size"
                )
            if len(shape) != 3 or shape[0] != rows or shape[1] not in counts:
                wanted = " or ".join(f"[{rows}, {count}, V]" for count in counts)
                raise InputError(f"{name} has shape {list(shape)}; for this block it must be {wanted}")
        if found["verifier_logits"].shape[1] < after:
            raise InputError(
                f"verifier_logits has shape {list(self.verifier_logits.shape)}; a bonus needs T+1 = {after} rows"
            )
        ours = [one.shape[1] for name, one in found.items() if name.startswith("drafter")]
        if self.bonus == "exact" and not self.rule.is_lossless and min(ours) < after:
            raise InputError("bonus 'exact' needs drafter logits with T+1 rows: one more drafter step")
        return found

    def _distributions(self, logits: dict[str, Tensor], drafts: int, after: int) -> Distributions:
        verifier = logits["verifier_logits"]
        if "drafter_logits" not in logits:  # greedy and lossless: nobody asks for the drafter's
            alone = logits.get("verifier_sampling_logits", verifier)
            return Distributions(
                alone[:, :after].unsqueeze(1), self.temperature, None, axis=1, columns=drafts
            )
        sampling = None
        if "drafter_sampling_logits" in logits or "verifier_sampling_logits" in logits:
            scale = self.temperature or 1.0
            sides = [
                logits[f"{model}_sampling_logits"]
                if f"{model}_sampling_logits" in logits
                else logits[f"{model}_logits"] / scale
                for model in MODELS
            ]
            sampling = _joined(sides[0], sides[1], drafts, after)
        decision = _joined(logits["drafter_logits"], verifier, drafts, after)
        if sampling is not None:
            sampling = sampling.to(decision.dtype)
        return Distributions(decision, self.temperature, sampling, axis=1, columns=drafts)

    def _lengths(
        self, rows: int, drafts: int, after: int, suspects: dict[int, Tensor]
    ) -> tuple[Tensor | int, Tensor | None, Tensor | None]:
        if self.lengths is None:
            return drafts, None, None
        device = self.drafted.device
        given = torch.as_tensor(self.lengths, device=device)
        if given.shape != (rows,) or given.dtype.is_floating_point:
            raise InputError(f"lengths has shape {list(given.shape)}; pass one integer per row, [{rows}]")
        lengths = given.long().clamp(0, drafts)
        suspects[4] = lengths != given
        steps = torch.arange(after, device=device)
        inside = steps < lengths.unsqueeze(1)
        through = inside if self.bonus == "none" else steps <= lengths.unsqueeze(1)
        ours = through if self.bonus == "exact" else inside
        return lengths, inside[:, :drafts], torch.stack([ours, through], dim=1)

    def _context(self, rows: int, drafts: int) -> Summary | None:
        if self.context is None or not self.context.names:
            return None
        shape = tuple(self.context.shape)
        if shape not in ((rows, drafts), (rows, drafts + 1)):
            raise InputError(
                f"context has leading shape {list(shape)}; it must be [{rows}, {drafts}] or [{rows}, {drafts + 1}]"
            )
        return self.context

    def _spent(self, rows: int, device: torch.device, suspects: dict[int, Tensor]) -> Tensor | None:
        if self.limit is None:
            return None
        if self.spent is None:
            return torch.zeros(rows, dtype=torch.float64, device=device)
        spent = torch.as_tensor(self.spent, dtype=torch.float64, device=device)
        if spent.shape != (rows,):
            raise InputError(
                f"spent must hold one number >= 0 per row, [{rows}]; got shape {list(spent.shape)}"
            )
        suspects[5] = ~(spent >= 0)
        return spent


@dataclass(frozen=True)
class _Block:
    """A drafted block ready to be verified. W positions are read: T, and one more where a bonus is drawn.

    Attributes:
        drafted: [B, T] as given. token: the same as int64 within the vocabulary.
        lengths: drafted tokens per row, [B] int64, or T where every row drafted T.
        mask: [B, T] bool, positions that were drafted; None where all were.
        reads: positions of either model that are read, bool [B, 2, W]; None where all are.
        distributions: distributions of both models, [B, 2, W, V]; rules are shown the first T positions.
        context: summary fields that logits do not give, [B, T (or T+1), ..].
        spent: [B] float64 under a limit, else None.
        suspects: faults of rows known from the arguments, by their place in `FAULTS`, bool [B].
        logits: as given, by name.
    """

    drafted: Tensor
    token: Tensor
    lengths: Tensor | int
    mask: Tensor | None
    reads: Tensor | None
    distributions: Distributions
    context: Summary | None
    spent: Tensor | None
    suspects: dict[int, Tensor]
    logits: dict[str, Tensor]

    def nothing(self) -> Verdict:
        """The verdict where nothing was drafted and no bonus is wanted."""
        none = torch.zeros_like(self.token[:, :0].sum(dim=1))
        flags = self.token.bool()
        return Verdict(none, none - 1, flags, flags, self.lengths, self.spent, none)

    def inside(self, flags: Tensor) -> Tensor:
        """Flags [B, T] where tokens were drafted, False elsewhere."""
        return flags if self.mask is None else flags & self.mask

    @property
    def positions(self) -> int:
        """W."""
        return self.distributions.decision.shape[2]

    def uniforms(
        self, generator: torch.Generator | None, numbers: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Random numbers in [0, 1) of the checks [B, T] and of the next token [B]; none at temperature 0."""
        rows, drafts = self.token.shape
        if self.distributions.greedy:
            return None, None
        if numbers is None:
            return uniforms(rows, drafts, generator, self.token)
        if tuple(numbers.shape) != (rows, drafts + 1):
            raise InputError(
                f"numbers has shape {list(numbers.shape)}; for this block it must be [{rows}, {drafts + 1}]"
            )
        numbers = numbers.to(device=self.token.device, dtype=torch.float64)
        return numbers[:, :drafts], numbers[:, drafts]

    def read(self, rule: Rule, limited: bool) -> Summary:
        """The summary of the drafted positions that the rule reads; ``token`` is always there."""
        extra = rule.gap_needs if limited else frozenset()
        wanted = extra if rule.is_lossless else rule.needs | extra
        return rule.read(self.distributions, self.token, self._context_of(wanted), extra | {"token"})

    def _context_of(self, wanted: frozenset[str]) -> Summary | None:
        rows, drafts = self.token.shape
        given = {} if self.context is None else {n: c[:, :drafts] for n, c in self.context.items()}
        if "draft_position" in wanted and "draft_position" not in given:
            given["draft_position"] = torch.arange(drafts, device=self.token.device).expand(rows, drafts)
        return Summary(given)

    def lossless_step(self) -> RuleStep:
        """Every token deferred, none kept, the verifier's distribution emitted."""
        deferred = torch.ones_like(self.token, dtype=torch.bool)
        return RuleStep(deferred, ~deferred, None)

    def forgiving_step(self, rule: BlockRule, summary: Summary, checks: Tensor | None) -> RuleStep:
        """The exact check of every token, and those that failed it and are forgiven kept."""
        passes = _passes(self, self.lossless_step(), checks)
        forgiven = rule.forgives(passes, self.distributions, summary) & self.distributions.allows(self.token)
        kept = self.inside(forgiven) > passes
        return RuleStep(~kept, kept, None, passes=passes | kept)

    def with_target(self, step: RuleStep, lossless: bool) -> RuleStep:
        """The same step with its target spelled out, and what that gives to the drafted tokens; above temperature 0."""
        if step.target is not None:
            return step
        distributions = self.distributions
        target = distributions.p
        if not lossless:
            allowed = onto_support(distributions.q, target, distributions.support)
            target = torch.where(step.deferred.unsqueeze(2), target, allowed)
        return replace(step, target=target, probability=gather_token(target, self.token))

    def target_at(self, step: RuleStep, standing: _Standing) -> Tensor:
        """The target after the tokens that stand: probabilities [B, V], at temperature 0 the token [B] itself.

        The rule's where the next drafted token was rejected and the limit allowed the rule, else the verifier's.
        """
        accepted, allowed = standing.accepted, standing.allowed
        verifier = (
            self.distributions.best if self.distributions.greedy else self.distributions.sampled
        ).select(1, -1)
        if step.target is None:
            return self.row(verifier, accepted)
        target, after = step.target, self.token.shape[1]
        rules = self.mask if allowed is None else self.inside(allowed)
        if rules is not None:
            target = torch.where(
                rules if target.dim() == 2 else rules.unsqueeze(2), target, verifier[:, :after]
            )
        return self.row(torch.cat([target, verifier[:, after:]], dim=1), accepted)

    def checked_at(self, step: RuleStep, standing: _Standing, rejected: Tensor) -> Tensor:
        """Rows [B] whose rejected token failed a check, bool; a kept token is rejected only where it is forbidden."""
        if step.target is not None:
            return rejected
        checked = step.deferred if standing.allowed is None else step.deferred | ~standing.allowed
        return rejected & self.row(checked, standing.accepted)

    def weights(self, target: Tensor, standing: _Standing, checked: Tensor) -> Tensor:
        """Weights that the next token is drawn by, [B, V]: max(0, pi - q) after a failed check, else pi."""
        drafter = self.row(self.distributions.sampled.select(1, 0), standing.accepted)
        scaled = target if standing.scale is None else target * standing.scale.to(target.dtype)
        excess = torch.where(checked.unsqueeze(1), scaled - drafter, target).clamp(min=0.0)
        return torch.add(excess, target, alpha=LEFT)

    def row(self, values: Tensor, index: Tensor) -> Tensor:
        """One position of each row, [B, ..] of [B, W or T, ..], at ``index`` [B] or the last."""
        count = values.shape[1]
        index = index.clamp(max=count - 1) if count <= self.token.shape[1] else index
        at = index.view(-1, 1, *(1,) * (values.dim() - 2)).expand(-1, 1, *values.shape[2:])
        return values.gather(1, at).squeeze(1)

    def exact_bonus(
        self,
        rule: Rule,
        last: Tensor | None,
        rejected: Tensor,
        spent: Tensor | None,
        limit: float | Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """A token [B] of the rule's target after the block, and what is spent with it.

        Under a limit it is charged in full, and is the verifier's where it does not fit.
        """
        if rule.needs & {"verifier_hidden", "verifier_hidden_at_token"} and isinstance(rule, Judge):
            raise InputError("bonus 'exact' has no drafted token to judge; use bonus='verifier'")
        drafts = self.token.shape[1]
        place = (
            torch.full_like(self.drafted[:, :1].sum(dim=1), drafts)
            if isinstance(self.lengths, int)
            else self.lengths
        )
        picked = {name: self.row(one, place) for name, one in self.logits.items()}
        distributions = Distributions.of(
            picked["drafter_logits"], picked["verifier_logits"], self.distributions.temperature,
            picked.get("drafter_sampling_logits"), picked.get("verifier_sampling_logits"),
        )  # fmt: skip
        given = {} if self.context is None else {n: self.row(c, place) for n, c in self.context.items()}
        context = Summary({"draft_position": place, **given})
        extra = frozenset() if limit is None else rule.gap_needs
        summary = rule.read(distributions, None, context, extra)
        pi = rule.distribution_from(distributions, summary)
        if limit is not None and spent is not None:
            cost = rule.estimated_gap(summary).clamp(min=0.0).to(spent)
            fits = (spent < limit) & (spent + cost <= limit)
            spent = torch.where(fits & ~rejected, spent + cost, spent)
            pi = torch.where(fits.unsqueeze(1), pi, distributions.p)
        return (pi.argmax(dim=-1) if last is None else draw(pi, last)), spent

    def fault(self) -> Tensor:
        """The first fault of each row as 1 + its place in `FAULTS`, 0 where all is well, [B] int64."""
        broken, width = self.distributions.broken, self.positions
        if self.reads is not None:
            broken = broken & self.reads[:, -broken.shape[1] :]
        unknown = self._padded(self.drafted != self.token)
        kinds = [*([one] for one in broken.unbind(1)), unknown]
        first = (
            2 - broken.shape[1]
        )  # place of the first kind: without a drafter's distribution its logits are not read
        if not self.distributions.greedy:
            kinds.append(self._padded(self.distributions.sampled_of(self.token)[0] == 0))
        # A fault that cannot be has the flags of one that comes before it, and so never shows.
        for place in range(first + len(kinds), max(self.suspects, default=0) + 1):
            suspect = self.suspects.get(place)
            kinds.append(unknown if suspect is None else [suspect.unsqueeze(1).expand(-1, width)])
        found = torch.cat([flags for kind in kinds for flags in kind], dim=1).max(dim=1)
        return torch.add(found.indices, found.values, alpha=(first + 1) * width) // width

    def _padded(self, flags: Tensor) -> list[Tensor]:
        """Flags [B, T] of drafted tokens in parts of W columns together: the first repeated, or none set."""
        flags = self.inside(flags)
        beyond = self.positions - flags.shape[1]
        return [flags, flags[:, :beyond] if flags.shape[1] else flags.new_zeros(len(flags), beyond)]


def _joined(drafter: Tensor, verifier: Tensor, drafts: int, after: int) -> Tensor:
    """Both models' logits, [B, 2, W, V]; the verifier's stand for a drafter that has none after the block."""
    beyond = drafter if drafter.shape[1] >= after else verifier
    both = torch.cat([drafter[:, :drafts], beyond[:, drafts:after], verifier[:, :after]], dim=1)
    return both.view(len(both), 2, after, both.shape[-1])
