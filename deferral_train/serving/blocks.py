"""The decision of one engine step: rows with different rules, limits and temperatures, verified together.

Knows nothing about vLLM. R rows, T drafted positions, V vocabulary, D hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.rules import Origin, Rule, Summary, Verdict, make_rule, verify_block

LOSSLESS = make_rule("lossless")
UNLIMITED = 1e30  # a limit nobody reaches: what it costs is counted, nothing is refused
GREEDY_BELOW = 1e-5  # temperatures below are greedy, as in the engine


@dataclass(frozen=True)
class RowSettings:
    """Rule and loss limit under which one row of a step is verified.

    Attributes:
        rule: decides which drafted tokens stand.
        limit: on the estimated loss of the whole request, in units of the rule's estimate; None for none.
        spent: estimated loss of the request so far.
    """

    rule: Rule = LOSSLESS
    limit: float | None = None
    spent: float = 0.0


@dataclass
class DraftedRows:
    """Drafted blocks of one engine step, one row per request, with both models' logits.

    Attributes:
        drafted: [R, T] int64; anything beyond a row's length.
        lengths: [R] int64.
        verifier: [R, T, V] (T+1 with ``bonus``), logits after processors, before temperature: what decisions read.
        temperatures: [R], below `GREEDY_BELOW` greedy.
        drafter: [R, T, V] in the drafter's own type; None where no row has a distribution.
        has_distribution: per row, True where ``drafter`` is the distribution that its tokens were drawn from.
        sampling: shaped as ``verifier``, its logits after temperature and truncation; None where that is
            ``verifier / temperature``.
        context: summary fields that logits do not give, [R, T, ..].
        cut: rows whose block ends before its last drafted position (a grammar refused the draft there), so that the
            engine's bonus token is not theirs: they draw the token after the block here.
        bonus: True where every row draws the token after its block here.
    """

    drafted: Tensor
    lengths: Tensor
    verifier: Tensor
    temperatures: Sequence[float]
    drafter: Tensor | None = None
    has_distribution: Sequence[bool] = ()
    sampling: Tensor | None = None
    context: dict[str, Tensor] = field(default_factory=dict)
    cut: Sequence[int] = ()
    bonus: bool = False


@dataclass
class Outcome:
    """Verdicts of a step's rows, on the device of their logits until `host` brings them over.

    Attributes:
        accepted: [R] int64, drafted tokens that stand.
        correction: [R] int64, the token after a rejection, or after a block where it was drawn here; else -1.
        origin: [R, T+1] int8, `Origin` of each emitted token; a bonus that is the caller's is not marked.
        deferred: [R, T] bool.
        loss: [R] float64, estimated loss of the tokens kept in this block.
        fault: [R] bool, rows whose logits could not be verified: one token by the verifier's highest finite logit.
        lengths: [R] int64, drafted tokens of each block.
        spent: [R] float64, what each request had spent before this block.
        unlawful: rows whose rule needs a drafter distribution that they have not: executed lossless.
    """

    accepted: Tensor
    correction: Tensor
    origin: Tensor
    deferred: Tensor
    loss: Tensor
    fault: Tensor
    lengths: Tensor
    spent: Tensor
    unlawful: list[int] = field(default_factory=list)

    @classmethod
    def empty(cls, rows: int, drafts: int, device: torch.device | None = None) -> Outcome:
        """Verdicts of no accepted token, to be filled in by `put`, group by group."""
        counts = torch.zeros(2, rows, dtype=torch.int64, device=device)
        amounts = torch.zeros(2, rows, dtype=torch.float64, device=device)
        return cls(
            counts[0],
            torch.full_like(counts[0], -1),
            torch.zeros(rows, drafts + 1, dtype=torch.int8, device=device),
            torch.zeros(rows, drafts, dtype=torch.bool, device=device),
            amounts[0],
            torch.zeros(rows, dtype=torch.bool, device=device),
            counts[1],
            amounts[1],
        )

    @classmethod
    def of_tokens(cls, lengths: Tensor, drafts: int, tokens: Tensor, count: Tensor) -> Outcome:
        """Verdicts read off what the engine's own sampler emitted: everything held to the exact check.

        Args:
            lengths: [R]. drafts: T. tokens: emitted, [R, at least T + 1]. count: how many of them are, [R].
        """
        found = cls.empty(len(tokens), drafts, tokens.device)
        found.lengths, found.accepted = lengths, count.long() - 1
        rejected = found.accepted < lengths
        at = found.accepted.unsqueeze(1)
        found.correction = torch.where(rejected, tokens.long().gather(1, at).squeeze(1), -1)
        place = torch.arange(drafts + 1, device=tokens.device)
        found.origin = (place < at).to(torch.int8) * int(Origin.ACCEPTED)
        found.origin += ((place == at) & rejected.unsqueeze(1)).to(torch.int8) * int(Origin.RESAMPLED)
        found.deferred = place[:drafts] < lengths.unsqueeze(1)
        return found

    @property
    def faults(self) -> list[int]:
        """Rows with a fault; copies to the host."""
        return self.fault.nonzero()[:, 0].tolist()

    def put(self, at: Tensor | None, verdict: Verdict) -> None:
        """Fill in the rows ``at``, in the verdict's order; None for all of them."""
        found = [
            (self.accepted, verdict.accepted),
            (self.correction, verdict.next_token),
            (self.origin, verdict.origin),
            (self.deferred, verdict.deferred),
            (self.fault, verdict.fault > 0),
        ]
        if verdict.spent is not None:
            before = self.spent if at is None else self.spent.index_select(0, at)
            found.append((self.loss, verdict.spent - before))
        for mine, given in found:
            if at is None:
                mine.copy_(given)
            else:
                mine.index_copy_(0, at, given.to(mine.dtype))

    def packed(self) -> Tensor:
        """All of it as integers [R, 6 + 2 T + 1], for one copy to the host."""
        amounts = torch.stack([self.loss, self.spent], dim=1).view(torch.int64)  # their bits
        counts = torch.stack([self.accepted, self.correction, self.lengths, self.fault.long()], dim=1)
        return torch.cat([counts, amounts, self.origin.long(), self.deferred.long()], dim=1)

    def unpacked(self, packed: Tensor) -> Outcome:
        """The same verdicts on the host, from a copy of what `packed` gave."""
        drafts = self.deferred.shape[1]
        amounts = packed[:, 4:6].contiguous().view(torch.float64)
        return Outcome(
            packed[:, 0],
            packed[:, 1],
            packed[:, 6 : drafts + 7].to(torch.int8),
            packed[:, drafts + 7 :].bool(),
            amounts[:, 0],
            packed[:, 3].bool(),
            packed[:, 2],
            amounts[:, 1],
            self.unlawful,
        )

    def host(self) -> Outcome:
        """The same verdicts on the host, in one copy."""
        return self if self.accepted.device.type == "cpu" else self.unpacked(self.packed().cpu())


@dataclass(frozen=True)
class _Kind:
    """Key of rows that are verified together.

    Attributes:
        rule: a rule, or what rules have in common that differ in their dial alone and compare it row by row.
        greedy: of all rows. distribution: True where the drafter's distribution is there.
    """

    rule: Rule | tuple[Any, ...]
    greedy: bool
    distribution: bool


def verify(
    rows: DraftedRows, settings: Sequence[RowSettings], numbers: Tensor | None, spent: Tensor | None = None
) -> Outcome:
    """Verify every row by its own settings; rows of one rule and kind of sampling go through together.

    Their dials (where the rule has `dial_axes`) and limits may differ. Nothing is copied to the host.

    Args:
        settings: one per row.
        numbers: [R, T+1] in [0, 1), each row's own random numbers; None where every row is greedy.
        spent: [R] float64, what each request has spent; default what the settings say.
    """
    count, drafts = rows.drafted.shape
    device = rows.drafted.device
    outcome = Outcome.empty(count, drafts, device)
    outcome.lengths = rows.lengths
    outcome.spent = moved([own.spent for own in settings], torch.float64, device) if spent is None else spent
    groups: dict[_Kind, list[tuple[int, RowSettings]]] = {}
    for row, own in enumerate(settings):
        rule, distribution = own.rule, bool(rows.has_distribution[row]) if rows.drafter is not None else False
        if not distribution and not rule.is_lossless and needs_distribution(rule):
            outcome.unlawful.append(row)
            own, rule = RowSettings(spent=own.spent), LOSSLESS
        greedy = rows.temperatures[row] < GREEDY_BELOW
        kind = _Kind(_family(rule), greedy, distribution and not (greedy and rule.is_lossless))
        groups.setdefault(kind, []).append((row, own))
    given = rows if rows.bonus or not rows.cut else _with_bonus(rows)
    for kind, members in groups.items():
        _verify_group(given, numbers, outcome, kind, members)
    if given is not rows:
        _withhold_bonus(rows, outcome)
    _settle_faults(rows, outcome)
    return outcome


def moved(values: Sequence[Any] | np.ndarray, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A few numbers of the host as a tensor on a device, without waiting for it."""
    found = torch.as_tensor(values, dtype=dtype)
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found.to(device)


def _with_bonus(rows: DraftedRows) -> DraftedRows:
    """The rows with one more position, which only rows that are not cut read; theirs is withheld afterwards."""

    def longer(logits: Tensor) -> Tensor:
        return torch.cat([logits, logits[:, -1:]], dim=1)

    sampling = None if rows.sampling is None else longer(rows.sampling)
    return replace(rows, verifier=longer(rows.verifier), sampling=sampling, bonus=True)


def _withhold_bonus(rows: DraftedRows, outcome: Outcome) -> None:
    """Leave the token after a whole block to the caller, in rows that are not cut."""
    cut = torch.zeros_like(outcome.fault)
    cut[moved(rows.cut, torch.int64, cut.device)] = True
    whole = (outcome.accepted == rows.lengths) & ~cut
    outcome.correction.masked_fill_(whole, -1)
    bonus = whole.unsqueeze(1) & (outcome.origin == int(Origin.BONUS))
    outcome.origin.masked_fill_(bonus, int(Origin.NONE))


def needs_distribution(rule: Rule) -> bool:
    """True for a rule that cannot do without what the drafter says of its own token."""
    return rule.reads_drafter_confidence or "drafter_hidden" in rule.needs


def _settle_faults(rows: DraftedRows, outcome: Outcome) -> None:
    """Rows whose logits are faulty: no drafted token, then the verifier's highest finite logit, nothing charged."""
    first, fault = rows.verifier[:, 0].float(), outcome.fault
    token = first.masked_fill(~first.isfinite(), -torch.inf).argmax(dim=-1)
    outcome.accepted.masked_fill_(fault, 0)
    outcome.correction = torch.where(fault, token, outcome.correction)
    outcome.loss.masked_fill_(fault, 0.0)
    outcome.origin.masked_fill_(fault.unsqueeze(1), int(Origin.NONE))
    outcome.origin[:, 0].masked_fill_(fault, int(Origin.RESAMPLED))


def _family(rule: Rule) -> Rule | tuple[Any, ...]:
    """The rule but for its dial, where rows of any dial may go through together; else the rule itself."""
    if rule.is_lossless or rule.dial is None or rule.dial_axes is None:
        return rule
    return (type(rule), *(getattr(rule, one.name) for one in fields(rule) if one.name != rule.dial.parameter))


def _common(settings: Sequence[RowSettings], device: torch.device) -> tuple[Rule, float | Tensor | None]:
    """The rule and the limit of rows that go through together, each one for all or one for each row."""
    rule = settings[0].rule
    if rule.is_lossless:
        return rule, None
    dials = [own.rule.dial_value for own in settings]
    if len(set(dials)) > 1:
        rule = rule.with_dials(moved(dials, torch.float32, device))
    limits = [UNLIMITED if own.limit is None else own.limit for own in settings]
    if len(set(limits)) > 1:
        return rule, moved(limits, torch.float64, device)
    return rule, limits[0]


def _verify_group(
    rows: DraftedRows,
    numbers: Tensor | None,
    outcome: Outcome,
    kind: _Kind,
    group: Sequence[tuple[int, RowSettings]],
) -> None:
    """Verify rows of one kind together and put their verdicts into the outcome."""
    members = [row for row, _ in group]
    rule, limit = _common([own for _, own in group], rows.drafted.device)
    whole = len(members) == rows.drafted.shape[0]
    at = None if whole else moved(members, torch.int64, rows.drafted.device)

    def pick(tensor: Tensor) -> Tensor:
        return tensor if at is None else tensor.index_select(0, at)

    verifier = pick(rows.verifier)
    drafter = pick(rows.drafter) if kind.distribution and rows.drafter is not None else None
    context = {} if rule.is_lossless else {name: pick(column) for name, column in rows.context.items()}
    temperature, scaled, sampling = 0.0, None, None
    if not kind.greedy:
        given = None if rows.sampling is None else pick(rows.sampling)
        temperature, scaled, sampling = _scaled(
            [rows.temperatures[row] for row in members], drafter, verifier, given
        )
    try:
        verdict = verify_block(
            rule,
            pick(rows.drafted),
            drafter,
            verifier,
            temperature=temperature,
            drafter_sampling_logits=scaled,
            verifier_sampling_logits=sampling,
            lengths=pick(rows.lengths),
            bonus="verifier" if rows.bonus else "none",
            numbers=None if kind.greedy or numbers is None else pick(numbers),
            context=Summary(context) if context else None,
            max_request_loss=limit,
            spent=pick(outcome.spent),
            check=False,
        )
    except InputError:  # of the request, not of a row's data
        outcome.fault.index_fill_(0, moved(members, torch.int64, outcome.fault.device), True)
        return
    outcome.put(at, verdict)


def _scaled(
    temperatures: list[float], drafter: Tensor | None, verifier: Tensor, given: Tensor | None
) -> tuple[float, Tensor | None, Tensor | None]:
    """The temperature of sampled rows, and both models' sampling logits where that alone does not say them.

    Args:
        given: the verifier's logits after temperature and truncation, where they are not verifier / temperature.
    """
    rounded = drafter is not None and drafter.dtype in (torch.bfloat16, torch.float16)
    if given is None and not rounded and len(set(temperatures)) == 1:
        return temperatures[0], None, None
    scale = moved(temperatures, torch.float32, verifier.device).view(-1, 1, 1)
    sampling = verifier.float() / scale if given is None else given
    # Divided and rounded as the engine did when it drew the tokens.
    return 1.0, None if drafter is None else (drafter / scale).to(drafter.dtype), sampling
