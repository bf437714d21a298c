"""The decision of one engine step: rows with different rules, limits and temperatures, verified together.

Knows nothing about vLLM. R rows, T drafted positions, V vocabulary, D hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.rules import Origin, Rule, Summary, Verdict, make_rule, verify_block
from deferral_train.rules.sampling import draw

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
        drafted: [R, T] int64; 0 beyond a row's length.
        lengths: [R] int64.
        cut: rows whose block ends before its last drafted position (a grammar refused the draft there), so that the
            engine's bonus token is not theirs: they draw the token after the block here.
        verifier: [R, T, V], logits after processors, before temperature: what decisions read.
        temperatures: [R], below `GREEDY_BELOW` greedy.
        drafter: [R, T, V] in the drafter's own type; None where no row has a distribution.
        has_distribution: per row, True where ``drafter`` is the distribution that its tokens were drawn from.
        sampling: [R, T, V], verifier logits after temperature and truncation; None where that is
            ``verifier / temperature``.
        context: summary fields that logits do not give, [R, T, ..].
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


@dataclass
class Outcome:
    """Verdicts of a step's rows, on the host.

    Attributes:
        accepted: [R] int64, drafted tokens that stand.
        correction: [R] int64, the token after a rejection; -1 where the block was emitted whole.
        origin: [R, T+1] int8, `Origin` of each emitted token; the bonus is the caller's.
        deferred: [R, T] bool.
        loss: [R] float64, estimated loss of the tokens kept in this block.
        unlawful: rows whose rule needs a drafter distribution that they have not: executed lossless.
        faults: rows whose logits could not be verified: one token by the verifier's highest finite logit.
    """

    accepted: Tensor
    correction: Tensor
    origin: Tensor
    deferred: Tensor
    loss: Tensor
    unlawful: list[int] = field(default_factory=list)
    faults: list[int] = field(default_factory=list)

    @classmethod
    def empty(cls, rows: int, drafts: int) -> Outcome:
        """Verdicts of no accepted token, to be filled in by `put`, group by group."""
        return cls(
            torch.zeros(rows, dtype=torch.int64),
            torch.full((rows,), -1, dtype=torch.int64),
            torch.zeros(rows, drafts + 1, dtype=torch.int8),
            torch.zeros(rows, drafts, dtype=torch.bool),
            torch.zeros(rows, dtype=torch.float64),
        )

    def put(self, members: list[int], verdict: Verdict, loss: Tensor | None) -> list[int]:
        """Fill in some rows, in their order, in one copy from the device.

        Returns:
            Those whose input was faulty.
        """
        drafts = self.deferred.shape[1]
        columns = [verdict.accepted, verdict.next_token, verdict.fault]
        columns += [] if loss is None else [loss.double().view(torch.int64)]  # its bits
        packed = torch.cat([torch.stack(columns, dim=1), verdict.origin, verdict.deferred], dim=1).cpu()
        self.accepted[members], self.correction[members] = packed[:, 0], packed[:, 1]
        if loss is not None:
            self.loss[members] = packed[:, 3].contiguous().view(torch.float64)
        self.origin[members] = packed[:, len(columns) : len(columns) + drafts + 1].to(torch.int8)
        self.deferred[members] = packed[:, len(columns) + drafts + 1 :].bool()
        return [row for row, fault in zip(members, packed[:, 2].tolist()) if fault]


@dataclass(frozen=True)
class _Kind:
    """Key of rows that are verified together; ``distribution`` is True where the drafter's distribution is there."""

    rule: Rule
    limit: float | None
    greedy: bool
    distribution: bool


def verify(rows: DraftedRows, settings: Sequence[RowSettings], numbers: Tensor | None) -> Outcome:
    """Verify every row by its own settings; rows that share rule, limit and kind of sampling go through together.

    Args:
        settings: one per row.
        numbers: [R, T+1] in [0, 1), each row's own random numbers; None where every row is greedy.
    """
    count, drafts = rows.drafted.shape
    outcome = Outcome.empty(count, drafts)
    groups: dict[_Kind, list[int]] = {}
    for row, own in enumerate(settings):
        rule, distribution = own.rule, bool(rows.has_distribution[row]) if rows.drafter is not None else False
        if not distribution and not rule.is_lossless and needs_distribution(rule):
            outcome.unlawful.append(row)
            rule = LOSSLESS
        limit, greedy = None if rule.is_lossless else own.limit, rows.temperatures[row] < GREEDY_BELOW
        kind = _Kind(rule, limit, greedy, distribution and not (greedy and rule.is_lossless))
        groups.setdefault(kind, []).append(row)
    for kind, members in groups.items():
        for row in _verify_group(rows, settings, numbers, outcome, kind, members):
            _fault(rows, outcome, row)
    for row in rows.cut:
        if outcome.accepted[row] == rows.lengths[row] and row not in outcome.faults:
            _finish_cut(rows, numbers, outcome, row)
    return outcome


def _finish_cut(rows: DraftedRows, numbers: Tensor | None, outcome: Outcome, row: int) -> None:
    """The token after a block that was cut short and emitted whole: from the verifier's distribution there."""
    place, greedy = int(rows.lengths[row]), rows.temperatures[row] < GREEDY_BELOW
    logits = rows.verifier[row, place].float()
    if greedy or numbers is None:
        outcome.correction[row] = logits.argmax()
    else:
        given = None if rows.sampling is None else rows.sampling[row, place]
        distribution = torch.softmax(logits / rows.temperatures[row] if given is None else given, dim=-1)
        outcome.correction[row] = draw(distribution.unsqueeze(0), numbers[row, -1:])[0]
    outcome.origin[row, place] = int(Origin.BONUS)


def needs_distribution(rule: Rule) -> bool:
    """True for a rule that cannot do without what the drafter says of its own token."""
    return rule.reads_drafter_confidence or "drafter_hidden" in rule.needs


def _fault(rows: DraftedRows, outcome: Outcome, row: int) -> None:
    """Settle a row whose logits are faulty: no drafted token, then the verifier's highest finite logit."""
    outcome.faults.append(row)
    logits = rows.verifier[row, 0].float()
    outcome.accepted[row] = 0
    outcome.correction[row] = logits.masked_fill(~logits.isfinite(), -torch.inf).argmax()
    outcome.origin[row] = 0
    outcome.origin[row, 0] = int(Origin.RESAMPLED)


def _verify_group(
    rows: DraftedRows,
    settings: Sequence[RowSettings],
    numbers: Tensor | None,
    outcome: Outcome,
    kind: _Kind,
    members: list[int],
) -> list[int]:
    """Verify rows of one kind together; those that could not be, a row's fault being its own, are given back."""
    whole = len(members) == rows.drafted.shape[0]
    at = None if whole else torch.tensor(members, device=rows.drafted.device)

    def pick(tensor: Tensor) -> Tensor:
        return tensor if at is None else tensor.index_select(0, at)

    verifier = pick(rows.verifier)
    drafter = pick(rows.drafter) if kind.distribution and rows.drafter is not None else None
    context = {} if kind.rule.is_lossless else {name: pick(column) for name, column in rows.context.items()}
    temperature, scaled, sampling = 0.0, None, None
    if not kind.greedy:
        given = None if rows.sampling is None else pick(rows.sampling)
        temperature, scaled, sampling = _scaled(
            [rows.temperatures[row] for row in members], drafter, verifier, given
        )
    spent = torch.tensor(
        [settings[row].spent for row in members], dtype=torch.float64, device=verifier.device
    )
    try:
        verdict = verify_block(
            kind.rule,
            pick(rows.drafted),
            drafter,
            verifier,
            temperature=temperature,
            drafter_sampling_logits=scaled,
            verifier_sampling_logits=sampling,
            lengths=pick(rows.lengths),
            bonus="none",
            numbers=None if kind.greedy or numbers is None else pick(numbers),
            context=Summary(context) if context else None,
            max_request_loss=None
            if kind.rule.is_lossless
            else (UNLIMITED if kind.limit is None else kind.limit),
            spent=spent,
            check=False,
        )
    except InputError:  # of the request, not of a row's data
        return members
    return outcome.put(members, verdict, None if verdict.spent is None else verdict.spent - spent)


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
    scale = torch.tensor(temperatures, dtype=torch.float32, device=verifier.device).view(-1, 1, 1)
    sampling = verifier.float() / scale if given is None else given
    # Divided and rounded as the engine did when it drew the tokens.
    return 1.0, None if drafter is None else (drafter / scale).to(drafter.dtype), sampling
