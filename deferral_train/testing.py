"""Contracts for what users write: `check_rule`, in the spirit of scikit-learn's check_estimator.

Everything is checked by enumeration in float64, with no sampling: the distributions at hand have few tokens, so that
draft, acceptance and correction of every token can be added up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.heads.check import check_head
from deferral_train.rules.base import BlockRule, LawRule, PositionRule, Rule, RuleStep, TokenRule
from deferral_train.rules.distributions import Distributions, gather_token, one_hot
from deferral_train.rules.emission import acceptance, rejection_mass, residual
from deferral_train.rules.summary import CONTEXT_FIELDS, FIELDS, TOKEN_FIELDS, Summary
from deferral_train.rules.verify import verify_block

__all__ = ["check_head", "check_rule"]

TEMPERATURES = (0.0, 0.5, 1.0)
TOLERANCE = 1e-12
VOCABULARY = 9


@dataclass(frozen=True)
class Case:
    """Decision and sampling logits [N, V] of one kind of distribution at one temperature."""

    name: str
    temperature: float
    drafter: Tensor
    verifier: Tensor
    drafter_sampling: Tensor | None = None
    verifier_sampling: Tensor | None = None

    def distributions(self) -> Distributions:
        """The four distributions."""
        return Distributions.of(
            self.drafter, self.verifier, self.temperature, self.drafter_sampling, self.verifier_sampling
        )


@dataclass(frozen=True)
class RuleReport:
    """Result of `check_rule`: the properties of a rule that were measured.

    Attributes:
        name: of the rule.
        kind: ``"position"``, ``"token"``, ``"distribution"`` or ``"block"``.
        positions: positions checked; of a block rule drafted blocks.
        worst: largest |enumerated - target| of any token; of a block rule, at its lossless end, of any text.
        rejection: largest |enumerated rejection - D_TV(q, pi)|; for a rule whose check depends on the drafted
            token this is an inequality in general, and an identity here.
        lossless_end, drafter_end: ``"exact"`` where the dial declares one and it was verified, else
            ``"none"``.
    """

    name: str
    kind: str
    positions: int
    worst: float
    rejection: float
    lossless_end: str
    drafter_end: str


def check_rule(rule: Rule, context: Callable[[int], Summary] | None = None, seed: int = 0) -> RuleReport:
    """Check that a rule keeps the contract, or raise AssertionError saying where it does not.

    Checked on random, tied, peaked, disjoint and one-hot distributions, at temperatures 0, 0.5 and 1, with and without
    top-k and top-p: the target is a distribution within the verifier's support; draft + accept + residual emits it
    within 1e-12; the dial's declared ends; a batch equals its rows; a summary read back decides as the logits
    do; and bad input is refused by the rule's name. Of a block rule all drafted blocks and all outcomes of their
    checks are enumerated: the text that they emit has total probability 1, within the verifier's support, and at the
    declared lossless end the verifier's own.

    Args:
        rule: an instance, at any value of its dial.
        context: makes the context fields that the rule needs, for N positions.
        seed: of the random distributions.
    """
    _check_declaration(rule)
    if isinstance(rule, BlockRule):
        return _check_block_rule(rule, seed)
    worst = rejection = 0.0
    positions = 0
    for case in cases(seed):
        given = _context(rule, context, case.drafter.shape[0])
        error, rejection_error = _check_distribution(rule, case, given)
        worst, rejection = max(worst, error), max(rejection, rejection_error)
        positions += case.drafter.shape[0]
        _check_ends(rule, case, given)
        _check_batching(rule, case, given)
        _check_offline(rule, case, given)
    _check_refusals(rule, _context(rule, context, 1))
    dial = rule.dial
    return RuleReport(
        rule.name,
        kind_of(rule),
        positions,
        worst,
        rejection,
        "exact" if rule.is_lossless or (dial is not None and dial.lossless is not None) else "none",
        "exact" if dial is not None and dial.drafter is not None else "none",
    )


def kind_of(rule: Rule) -> str:
    """Kind of a rule: ``"position"``, ``"token"``, ``"distribution"`` or ``"block"``."""
    bases = (
        ("position", PositionRule),
        ("token", TokenRule),
        ("distribution", LawRule),
        ("block", BlockRule),
    )
    for kind, base in bases:
        if isinstance(rule, base):
            return kind
    raise AssertionError(f"{type(rule).__name__} must subclass PositionRule, TokenRule, LawRule or BlockRule")


def cases(seed: int = 0, vocabulary: int = VOCABULARY, positions: int = 6) -> Iterator[Case]:
    """The distributions that rules are checked on: five kinds, three temperatures, plain, top-k and top-p."""
    generator = torch.Generator().manual_seed(seed)
    for kind, (drafter, verifier) in _kinds(vocabulary, positions, generator).items():
        for temperature in TEMPERATURES:
            yield Case(kind, temperature, drafter, verifier)
            for name, cut in (("top_k", top_k), ("top_p", top_p)):
                scale = temperature or 1.0
                sampling = cut(drafter / scale), cut(verifier / scale)
                yield Case(f"{kind} {name}", temperature, drafter, verifier, *sampling)


def top_k(logits: Tensor, k: int = 4) -> Tensor:
    """Logits outside the k largest masked with -inf (ties: lowest index stays)."""
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices
    return torch.full_like(logits, -torch.inf).scatter(-1, order[..., :k], logits.gather(-1, order[..., :k]))


def top_p(logits: Tensor, mass: float = 0.8) -> Tensor:
    """Logits outside the smallest set that holds `mass` masked with -inf."""
    ordered, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    distribution = torch.softmax(ordered, dim=-1)
    outside = distribution.cumsum(dim=-1) - distribution >= mass
    return torch.empty_like(logits).scatter(-1, order, ordered.masked_fill(outside, -torch.inf))


def _kinds(vocabulary: int, positions: int, generator: torch.Generator) -> dict[str, tuple[Tensor, Tensor]]:
    def random(scale: float) -> Tensor:
        return torch.randn(positions, vocabulary, generator=generator, dtype=torch.float64) * scale

    near = random(1.5)
    tied = torch.randint(0, 3, (2, positions, vocabulary), generator=generator).double()
    half = torch.arange(vocabulary) < vocabulary // 2
    points = torch.randint(0, vocabulary, (2, positions), generator=generator)
    hot = torch.full((2, positions, vocabulary), -torch.inf, dtype=torch.float64)
    hot.scatter_(-1, points.unsqueeze(-1), 0.0)
    return {
        "random": (random(1.0), random(1.0)),
        "near": (near, near + random(0.3)),
        "tied": (tied[0], tied[1]),
        "peaked": (random(12.0), random(12.0)),
        "disjoint": (random(1.0).masked_fill(half, -torch.inf), random(1.0).masked_fill(~half, -torch.inf)),
        "one_hot": (hot[0], hot[1]),
        "one_hot drafter": (hot[0], random(1.0)),
        "equal": (near, near),
    }


def _context(rule: Rule, make: Callable[[int], Summary] | None, positions: int) -> Summary | None:
    wanted = rule.needs & CONTEXT_FIELDS
    if not wanted:
        return None
    if make is None:
        raise AssertionError(f"{rule.name} needs context ({', '.join(sorted(wanted))}); pass context=")
    return make(positions)


def _check_declaration(rule: Rule) -> None:
    assert rule.name, f"{type(rule).__name__} must have a name"
    kind_of(rule)
    unknown = set(rule.needs) - set(FIELDS)
    assert not unknown, f"{rule.name} needs unknown summary fields {sorted(unknown)}"
    assert rule.stage in ("draft", "verify"), f"{rule.name}: stage is {rule.stage!r}"
    if rule.stage == "draft":
        late = sorted(name for name in rule.needs if FIELDS[name].sees in ("verifier", "both"))
        assert not late, f"{rule.name} decides at the draft stage but needs {late}"
    if rule.dial is None:
        return
    grid = rule.dial.grid(5)
    ends = (grid[0], grid[-1])
    assert ends == (rule.dial.low, rule.dial.high), f"{rule.name}: dial grid misses its ends"
    for value in (*grid, rule.dial.lossless, rule.dial.drafter):
        if value is not None:
            assert rule.with_dial(value).dial_value == value, f"{rule.name}: with_dial({value}) did not hold"


def enumerate_emission(
    rule: Rule, distributions: Distributions, context: Summary | None = None
) -> tuple[Tensor, Tensor]:
    """Distribution emitted by drafting every token in turn [N, V], and the probability of a rejection [N].

    Uses what verify_block uses: the score of a drafted token and the distribution it is corrected by.
    """
    positions, vocabulary = distributions.q.shape
    row = torch.arange(positions).repeat_interleave(vocabulary)
    token = torch.arange(vocabulary).repeat(positions)
    drafted = distributions.q.flatten()
    # A token that is never drafted has no acceptance; the likeliest stands in for it, with weight 0.
    token = torch.where(drafted > 0, token, distributions.q.argmax(dim=-1)[row])
    every = distributions.at((row,))
    given = None if context is None else context.select(row)
    ratio, correction = _checked(rule, every, token, given)
    corrected = (drafted * (1 - ratio)).unsqueeze(-1) * correction
    emitted = (drafted * ratio).reshape(positions, vocabulary)
    emitted = emitted + corrected.reshape(positions, vocabulary, vocabulary).sum(dim=1)
    return emitted, (drafted * (1 - ratio)).reshape(positions, vocabulary).sum(dim=-1)


def _checked(
    rule: Rule, distributions: Distributions, token: Tensor, context: Summary | None
) -> tuple[Tensor, Tensor]:
    """Probability that drafted tokens [N] are emitted, and what they are corrected by where not, [N, V]."""
    if rule.is_lossless:
        step = RuleStep(
            torch.ones_like(token, dtype=torch.bool), torch.zeros_like(token, dtype=torch.bool), None
        )
    else:
        summary = rule.read(distributions, token, context, frozenset({"token"}))
        if isinstance(rule, PositionRule):
            step = RuleStep.of_deferral(rule.defer(summary), distributions, token)
        else:
            step = rule.step(distributions, summary, token)
    target = distributions.p if step.target is None else step.target
    if distributions.greedy and target.dim() == token.dim():
        target = one_hot(target, distributions.q.shape[-1], distributions.q.dtype)
    ratio = acceptance(gather_token(target, token), gather_token(distributions.q, token))
    ratio = (
        torch.where(step.kept, torch.ones_like(ratio), ratio)
        if step.target is None or distributions.greedy
        else ratio
    )
    rest = residual(target, distributions.q)
    if step.target is None:  # a kept token that may not be emitted: its mass goes to the verifier
        rest = torch.where(step.deferred.unsqueeze(-1), rest, target)
    return ratio, rest


def _check_distribution(rule: Rule, case: Case, context: Summary | None) -> tuple[float, float]:
    where = f"{rule.name} on {case.name} distributions at temperature {case.temperature:g}"
    distributions = case.distributions()
    pi = _target(rule, case, context)
    assert bool((pi >= 0).all()), f"{where}: the target has negative entries"
    assert float((pi.sum(dim=-1) - 1).abs().max()) <= TOLERANCE, f"{where}: the target does not sum to one"
    assert not bool(pi[~distributions.support].any()), f"{where}: a masked token has probability"
    emitted, rejected = enumerate_emission(rule, distributions, context)
    error = float((emitted - pi).abs().max())
    assert error <= TOLERANCE, f"{where}: draft + accept + residual misses the target by {error:.3g}"
    rejection = float((rejected - rejection_mass(pi, distributions.q)).abs().max())
    assert rejection <= TOLERANCE, f"{where}: rejection differs from D_TV(q, pi) by {rejection:.3g}"
    if case.temperature == 0:
        assert bool(((pi == 0) | (pi == 1)).all()), f"{where}: greedy execution must be deterministic"
    return error, rejection


def _target(rule: Rule, case: Case, context: Summary | None) -> Tensor:
    return rule.target(
        case.drafter,
        case.verifier,
        case.temperature,
        drafter_sampling_logits=case.drafter_sampling,
        verifier_sampling_logits=case.verifier_sampling,
        context=context,
    )


def _check_ends(rule: Rule, case: Case, context: Summary | None) -> None:
    if rule.dial is None:
        return
    distributions = case.distributions()
    where = f"{rule.name} on {case.name} distributions at temperature {case.temperature:g}"
    if rule.dial.lossless is not None:
        end = rule.with_dial(rule.dial.lossless)
        # Through the formula, not the short cut that execution takes there.
        summary = Rule.read(_Formula(end), distributions, None, context)  # type: ignore[arg-type]
        error = float((end._distribution(distributions, summary) - distributions.p).abs().max())
        assert error <= TOLERANCE, (
            f"{where}: its lossless end misses the verifier's distribution by {error:.3g}"
        )
        assert bool((_target(end, case, context) == distributions.p).all()), (
            f"{where}: lossless end not exact"
        )
    if rule.dial.drafter is not None:
        lost = distributions.q.masked_fill(distributions.support, 0.0).sum(dim=-1, keepdim=True)
        kept = distributions.q.masked_fill(~distributions.support, 0.0) + lost * distributions.p
        error = float((_target(rule.with_dial(rule.dial.drafter), case, context) - kept).abs().max())
        assert error <= TOLERANCE, (
            f"{where}: its drafter end misses the drafter's distribution by {error:.3g}"
        )


@dataclass(frozen=True)
class TabularPair:
    """Two models over texts of L tokens out of V, by table: logits of the next token behind every shorter text.

    Attributes:
        drafter, verifier: logits by length of the text, [V**t, V] for t = 0..L-1, texts in counting order.
        temperature: of the sampling distributions.
    """

    drafter: list[Tensor]
    verifier: list[Tensor]
    temperature: float = 1.0

    @classmethod
    def random(cls, vocabulary: int, length: int, seed: int = 0, masked: bool = False) -> TabularPair:
        """Near models; ``masked`` takes the first token from the verifier at odd lengths."""
        generator = torch.Generator().manual_seed(seed)
        tables: list[list[Tensor]] = [[], []]
        for t in range(length):
            noise = torch.randn(2, vocabulary**t, vocabulary, generator=generator, dtype=torch.float64)
            verifier = 1.5 * noise[0]
            if masked and t % 2:
                verifier[:, 0] = -torch.inf
            tables[0].append(1.5 * noise[0] + noise[1])
            tables[1].append(verifier)
        return cls(tables[0], tables[1])

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.drafter[0].shape[-1]

    def blocks(self, count: int) -> Tensor:
        """Every text of ``count`` tokens, [V**count, count], in counting order."""
        place = torch.arange(self.vocabulary**count).unsqueeze(1)
        return place // self.vocabulary ** torch.arange(count - 1, -1, -1) % self.vocabulary

    def logits(self, model: list[Tensor], blocks: Tensor, more: int = 0) -> Tensor:
        """A model's logits at every place of blocks [N, T], and ``more`` behind them, [N, T + more, V]."""
        count = blocks.shape[1]
        places, prefix = [], torch.zeros(len(blocks), dtype=torch.int64)
        for t in range(count + more):
            places.append(model[t][prefix])
            if t < count:
                prefix = prefix * self.vocabulary + blocks[:, t]
        return torch.stack(places, dim=1)

    def finished(self, masses: list[Tensor], step: Callable[[int], Tensor]) -> Tensor:
        """Probabilities of all texts of L tokens.

        Args:
            masses: of texts that end after t tokens, [V**t] for t = 0..L, what follows being drawn by ``step``.
            step: distributions of the next token behind texts of t tokens, [V**t, V].
        """
        total = masses[0]
        for t in range(len(masses) - 1):
            total = (total.unsqueeze(1) * step(t)).flatten() + masses[t + 1]
        return total


def _check_block_rule(rule: BlockRule, seed: int) -> RuleReport:
    count = rule.reach + 2
    vocabulary = 3 if 6**count <= 10_000 else 2
    blocks, worst = 0, 0.0
    for masked in (False, True):
        texts = TabularPair.random(vocabulary, count + 1, seed, masked)
        found = block_rule_texts(rule, texts, count)
        total = float(found.sum())
        assert abs(total - 1) <= TOLERANCE, f"{rule.name}: texts have probability {total:.15g} in all"
        verifier = texts.finished(
            [torch.ones(1, dtype=torch.float64)] + [torch.zeros(vocabulary**t) for t in range(1, count + 2)],
            lambda t, texts=texts: torch.softmax(texts.verifier[t], dim=-1),  # type: ignore[misc]
        )
        assert not bool(found[verifier == 0].any()), f"{rule.name}: a masked token is emitted"
        if rule.dial is not None and rule.dial.lossless is not None:
            end = block_rule_texts(rule.with_dial(rule.dial.lossless), texts, count)
            worst = max(worst, float((end - verifier).abs().max()))
        blocks += vocabulary**count
    assert worst <= TOLERANCE, f"{rule.name}: its lossless end misses the verifier's texts by {worst:.3g}"
    _check_block_refusals(rule)
    declared = rule.is_lossless or (rule.dial is not None and rule.dial.lossless is not None)
    return RuleReport(rule.name, "block", blocks, worst, 0.0, "exact" if declared else "none", "none")


def block_rule_texts(rule: BlockRule, texts: TabularPair, count: int) -> Tensor:
    """Probabilities [V**L] of the texts that a drafted block of ``count`` tokens begins and the verifier finishes.

    All blocks and all outcomes of the exact checks are enumerated; through the rule's formula, not the short cut that
    execution takes at its lossless end.
    """
    drafted = texts.blocks(count)
    drafter = texts.logits(texts.drafter, drafted)
    verifier = texts.logits(texts.verifier, drafted, 1)
    distributions = Distributions.of(drafter, verifier[:, :count], texts.temperature)
    q, p = distributions.sampled_of(drafted)
    chance, masses = (
        q.prod(dim=1),
        [torch.zeros(texts.vocabulary**t, dtype=torch.float64) for t in range(count + 2)],
    )
    ratio = acceptance(p, q)
    rest = torch.cat(
        [residual(distributions.p, distributions.q), torch.softmax(verifier[:, count:], dim=-1)], dim=1
    )
    summary = Rule.read(_Formula(rule), distributions, drafted, None, frozenset({"token"}))  # type: ignore[arg-type]
    support = distributions.allows(drafted)
    for outcome in range(2**count):
        passes = (outcome >> torch.arange(count) & 1).bool().expand(len(drafted), -1)
        mass = chance * torch.where(passes, ratio, 1 - ratio).prod(dim=1)
        stand = passes | (rule.forgives(passes.contiguous(), distributions, summary) & support)
        accepted = stand.long().cumprod(dim=1).sum(dim=1)
        for t in range(count + 1):
            here = accepted == t
            prefix = torch.arange(len(drafted))[here] // texts.vocabulary ** (count - t)
            emitted = (mass[here].unsqueeze(1) * rest[here, t]).flatten()
            place = (prefix.unsqueeze(1) * texts.vocabulary + torch.arange(texts.vocabulary)).flatten()
            masses[t + 1].index_add_(0, place, emitted)
    return texts.finished(masses, lambda t: torch.softmax(texts.verifier[t], dim=-1))


def _check_block_refusals(rule: BlockRule) -> None:
    drafted = torch.zeros(1, 1, dtype=torch.int64)
    block = torch.zeros(1, 2, VOCABULARY, dtype=torch.float64)
    if not rule.is_lossless:
        _refused(lambda: rule.target(block[:, 0], block[:, 0]), rule, "a question for its target")
        for option in ({"bonus": "exact"}, {"verification": "block"}):
            _refused(partial(verify_block, rule, drafted, block, block, **option), rule, str(option))  # type: ignore[arg-type]
    broken = block.clone()
    broken[0, 0, 2] = torch.nan
    _refused(lambda: verify_block(rule, drafted, block, broken), rule, "NaN logits")


class _Formula:
    """A rule's needs without its lossless short cut."""

    is_lossless = False

    def __init__(self, rule: Rule) -> None:
        self.needs = rule.needs


def _check_batching(rule: Rule, case: Case, context: Summary | None) -> None:
    whole = _target(rule, case, context)
    for n in (0, whole.shape[0] - 1):

        def one(values: Tensor | None, n: int = n) -> Tensor | None:
            return None if values is None else values[n]

        row = Case(case.name, case.temperature, case.drafter[n], case.verifier[n],
                   one(case.drafter_sampling), one(case.verifier_sampling))  # fmt: skip
        alone = _target(rule, row, None if context is None else context.select(torch.tensor(n)))
        error = float((alone - whole[n]).abs().max())
        assert error <= TOLERANCE, (
            f"{rule.name} on {case.name}: a row alone differs from its batch by {error:.3g}"
        )


def _check_offline(rule: Rule, case: Case, context: Summary | None) -> None:
    """A decision from a summary that went through columns is the decision from the logits."""
    distributions = case.distributions()
    online = rule.read(distributions, None, context)
    offline = Summary.from_columns({name: column.clone() for name, column in online.items()})
    if isinstance(rule, PositionRule) and not rule.needs & TOKEN_FIELDS and not rule.is_lossless:
        assert torch.equal(rule.defer(online), rule.defer(offline)), f"{rule.name}: offline decision differs"
    if isinstance(rule, TokenRule) and not rule.is_lossless:
        every = rule.keep_tokens(
            None, distributions.drafter_logprobs, distributions.verifier_logprobs, online
        )
        some = torch.tensor([0, 3, distributions.q.shape[-1] - 1])
        q, p = distributions.drafter_logprobs[..., some], distributions.verifier_logprobs[..., some]
        part = rule.keep_tokens(some.expand(*every.shape[:-1], len(some)), q, p, offline)
        assert torch.equal(every[..., some], part), f"{rule.name}: a token's decision depends on its company"


def _check_refusals(rule: Rule, context: Summary | None) -> None:
    logits = torch.zeros(1, VOCABULARY, dtype=torch.float64)
    for bad, what in ((torch.nan, "NaN"), (torch.inf, "+inf")):
        broken = logits.clone()
        broken[0, 2] = bad
        _refused(partial(rule.target, logits, broken, context=context), rule, f"{what} logits")
    _refused(lambda: rule.target(logits, logits[:, 1:], context=context), rule, "another vocabulary")
    if rule.reads_drafter_confidence and not rule.is_lossless:
        drafted = torch.zeros(1, 1, dtype=torch.int64)
        block = torch.zeros(1, 2, VOCABULARY, dtype=torch.float64)
        _refused(lambda: verify_block(rule, drafted, None, block), rule, "one-hot proposals")
    if rule.dial is not None:
        _refused(lambda: rule.with_dial(float("nan")), rule, "a dial that is not a number")
        if not rule.dial.unbounded:
            _refused(lambda: rule.with_dial(rule.dial.high + 1), rule, "a dial out of range")  # type: ignore[union-attr]


def _refused(call: Callable[[], object], rule: Rule, what: str) -> None:
    message = ""
    try:
        call()
    except InputError as error:
        message = str(error)
    assert message, f"{rule.name} accepts {what}"
    assert rule.name in message, f"{rule.name}: the message on {what} does not name the rule: {message}"
