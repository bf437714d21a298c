"""The decision of one engine step: rows with different rules, limits and temperatures, verified together.

Torch only: knows nothing about vLLM. R rows, T drafted positions, V vocabulary, D hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.rules import Origin, Rule, Summary, make_rule, verify_block
from deferral_train.rules.sampling import draw

LOSSLESS = make_rule("lossless")
GREEDY_BELOW = 1e-5  # temperatures below are greedy, as in the engine
UNLIMITED = 1e30  # a limit nobody reaches: what it costs is counted, nothing is refused


@dataclass(frozen=True)
class Plan:
    """How one row is to be executed.

    Attributes:
        rule: decides. limit: on the estimated loss of the request, None for none. spent: of it so far.
    """

    rule: Rule = LOSSLESS
    limit: float | None = None
    spent: float = 0.0


@dataclass
class Rows:
    """Drafted blocks of one step.

    Attributes:
        drafted: [R, T] int64; 0 beyond a row's length.
        lengths: [R] int64.
        cut: rows whose block ends before its last drafted position (a grammar refused the draft there), so that the
            engine's bonus token is not theirs: they draw the token after the block here.
        verifier: [R, T, V], logits after processors, before temperature: what decisions read.
        temperatures: [R], below `GREEDY_BELOW` greedy.
        drafter: [R, T, V] in the drafter's own type; None where no row has a law.
        has_law: per row, whether ``drafter`` is the law that its tokens were drawn from.
        sampling: [R, T, V], verifier logits after temperature and truncation; None where that is
            ``verifier / temperature``.
        context: summary fields that logits do not give, [R, T, ..].
    """

    drafted: Tensor
    lengths: Tensor
    verifier: Tensor
    temperatures: Sequence[float]
    drafter: Tensor | None = None
    has_law: Sequence[bool] = ()
    sampling: Tensor | None = None
    context: dict[str, Tensor] = field(default_factory=dict)
    cut: Sequence[int] = ()


@dataclass
class Outcome:
    """What happened to each row.

    Attributes:
        accepted: [R] int64, drafted tokens that stand.
        correction: [R] int64, the token after a rejection; -1 where the block was emitted whole.
        origin: [R, T+1] int8, `Origin` of each emitted token; the bonus is the caller's.
        deferred: [R, T] bool.
        loss: [R] float64, estimated loss of the tokens kept in this block.
        unlawful: rows whose rule needs a drafter law that they have not: executed lossless.
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
    def empty(cls, rows: int, drafts: int, device: torch.device) -> Outcome:
        """Places to be filled group by group."""
        return cls(
            torch.zeros(rows, dtype=torch.int64, device=device),
            torch.full((rows,), -1, dtype=torch.int64, device=device),
            torch.zeros(rows, drafts + 1, dtype=torch.int8, device=device),
            torch.zeros(rows, drafts, dtype=torch.bool, device=device),
            torch.zeros(rows, dtype=torch.float64, device=device),
        )


@dataclass(frozen=True)
class _Kind:
    """What rows must share to be verified together; ``law``: whether their drafter's law is there."""

    rule: Rule
    limit: float | None
    greedy: bool
    law: bool


def verify(rows: Rows, plans: Sequence[Plan], numbers: Tensor | None) -> Outcome:
    """Verify every row by its own plan; rows that share rule, limit and kind of sampling go through together.

    Args:
        plans: one per row.
        numbers: [R, T+1] in [0, 1), each row's own random numbers; None where every row is greedy.
    """
    count, drafts = rows.drafted.shape
    outcome = Outcome.empty(count, drafts, rows.drafted.device)
    groups: dict[_Kind, list[int]] = {}
    for row, plan in enumerate(plans):
        rule, law = plan.rule, bool(rows.has_law[row]) if rows.drafter is not None else False
        if not law and not rule.is_lossless and needs_law(rule):
            outcome.unlawful.append(row)
            rule = LOSSLESS
        limit = None if rule.is_lossless else plan.limit
        kind = _Kind(rule, limit, rows.temperatures[row] < GREEDY_BELOW, law)
        groups.setdefault(kind, []).append(row)
    for kind, members in groups.items():
        _verify_members(rows, plans, numbers, outcome, kind, members)
    for row in rows.cut:
        if outcome.accepted[row] == rows.lengths[row] and row not in outcome.faults:
            _finish_cut(rows, numbers, outcome, row)
    return outcome


def _finish_cut(rows: Rows, numbers: Tensor | None, outcome: Outcome, row: int) -> None:
    """The token after a block that was cut short and emitted whole: from the verifier's law there."""
    place, greedy = int(rows.lengths[row]), rows.temperatures[row] < GREEDY_BELOW
    logits = rows.verifier[row, place].float()
    if greedy or numbers is None:
        outcome.correction[row] = logits.argmax()
    else:
        given = None if rows.sampling is None else rows.sampling[row, place]
        law = torch.softmax(logits / rows.temperatures[row] if given is None else given, dim=-1)
        outcome.correction[row] = draw(law.unsqueeze(0), numbers[row, -1:])[0]
    outcome.origin[row, place] = int(Origin.BONUS)


def needs_law(rule: Rule) -> bool:
    """Whether a rule cannot do without what the drafter says of its own token."""
    return rule.reads_drafter_confidence or "drafter_hidden" in rule.needs


def _verify_members(
    rows: Rows,
    plans: Sequence[Plan],
    numbers: Tensor | None,
    outcome: Outcome,
    kind: _Kind,
    members: list[int],
) -> None:
    """Rows of one kind together; where that fails, one by one: a row that fails by itself gets one token and harms no
    other.
    """
    try:
        _verify_group(rows, plans, numbers, outcome, kind, members)
    except InputError:
        if len(members) == 1:
            _fault(rows, outcome, members[0])
            return
        for row in members:
            _verify_members(rows, plans, numbers, outcome, kind, [row])


def _fault(rows: Rows, outcome: Outcome, row: int) -> None:
    """The verifier's highest finite logit, and no drafted token."""
    outcome.faults.append(row)
    logits = rows.verifier[row, 0].float()
    outcome.accepted[row] = 0
    outcome.correction[row] = logits.masked_fill(~logits.isfinite(), -torch.inf).argmax()
    outcome.origin[row] = 0
    outcome.origin[row, 0] = int(Origin.RESAMPLED)


def _verify_group(
    rows: Rows,
    plans: Sequence[Plan],
    numbers: Tensor | None,
    outcome: Outcome,
    kind: _Kind,
    members: list[int],
) -> None:
    rule, limit, greedy = kind.rule, kind.limit, kind.greedy
    whole = len(members) == rows.drafted.shape[0]
    at = torch.tensor(members, device=rows.drafted.device)

    def pick(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or whole else tensor.index_select(0, at)

    verifier, sampling = pick(rows.verifier), None if greedy else pick(rows.sampling)
    drafter = pick(rows.drafter) if kind.law else None
    assert verifier is not None
    temperature, drafter_sampling = 0.0, None
    if not greedy:
        temperatures = [rows.temperatures[row] for row in members]
        temperature = temperatures[0]
        if sampling is not None or len(set(temperatures)) > 1:
            scale = torch.tensor(temperatures, dtype=torch.float32, device=verifier.device).view(-1, 1, 1)
            sampling = verifier.float() / scale if sampling is None else sampling
            # In the drafter's own type, as the engine scaled it when it drew the tokens.
            drafter_sampling = None if drafter is None else drafter / scale.to(drafter.dtype)
            temperature = 1.0
    context = {name: column if whole else column.index_select(0, at) for name, column in rows.context.items()}
    spent = None
    if not rule.is_lossless:
        spent = torch.tensor([plans[row].spent for row in members], dtype=torch.float64, device=at.device)
    verdict = verify_block(
        rule,
        rows.drafted if whole else rows.drafted[at],
        drafter,
        verifier,
        temperature=temperature,
        drafter_sampling_logits=drafter_sampling,
        verifier_sampling_logits=sampling,
        lengths=rows.lengths if whole else rows.lengths[at],
        bonus="none",
        numbers=None if greedy or numbers is None else numbers[at],
        context=Summary(context) if context and not rule.is_lossless else None,
        max_request_loss=None if spent is None else (UNLIMITED if limit is None else limit),
        spent=spent,
    )
    outcome.accepted[at] = verdict.accepted
    outcome.correction[at] = verdict.next_token
    outcome.origin[at] = verdict.origin
    outcome.deferred[at] = verdict.deferred
    if spent is not None and verdict.spent is not None:
        outcome.loss[at] = verdict.spent - spent
