"""From traces to the columns that a head is fitted on and scored with, checked before training starts.

N rows. A table is a dictionary of tensors with N rows: ``x`` raw feature columns, ``z`` label of the gap,
``tv``; for fitting also what the objective reads; for scoring also ``position``, decisions of fixed rules,
the exact gap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.heads.base import SEQUENCE_LOSSES, DeferralHead
from deferral_train.heads.features import HIDDEN_FIELDS, fields_of
from deferral_train.heads.judge import JudgeHead
from deferral_train.heads.truth import LOG_FLOOR
from deferral_train.rules import risks
from deferral_train.rules.base import PositionRule
from deferral_train.rules.summary import TOKEN_FIELDS, Summary
from deferral_train.traces import Traces, read_candidates, truth
from deferral_train.traces.judged import is_judge, judged_rows, judges_sequences
from deferral_train.traces.schema import JUDGED_HIDDEN
from deferral_train.traces.sequence import argmax_summary, is_sequence, labelled_rows, sequence_summary
from deferral_train.training.preparation import gold_tokens

CANDIDATE_BLOCK = 65_536  # rows whose candidates are read at once


def fit_table(
    traces: Traces, head: DeferralHead, label: str = "reference", temperature: float | None = None
) -> dict[str, Tensor]:
    """Columns to fit ``head`` on.

    Args:
        traces: at least one row; a head's memory must have been fitted on them.
        head: says which columns, which loss, which stage.
        label: truth that labels the gap: reference, verifier, teacher, exact, acceptance or judge:tau=X.
        temperature: of the sampling distributions that tv compares; None is the manifest's.

    Raises:
        InputError: an empty split, missing or not finite features, labels that are all equal, a gold token
        used as
            a feature of itself.
    """
    check_features(traces, head, label)
    own = None if head.inputs.memory is None else gold_tokens(traces, "a memory feature")
    table = _shared(traces, head, label, temperature, own)
    differ = judged_rows(traces)
    rows = labelled(traces, label)
    z = table["z"][differ if rows is None else differ[rows]] if is_judge(label) else table["z"]
    if len(z) == 0 or bool((z == z[0]).all()):
        first = float(z[0]) if len(z) else 0.0
        raise InputError(
            f"labels are of one class: every gap is {first:g} under truth={label!r}; "
            "collect more prompts or use another truth"
        )
    if head.stage == "draft":
        table["reject"] = _chosen(truth.rejection(traces, temperature), rows)
    if head.needs_candidates:
        table |= _gold_columns(traces, head)
    return table


def score_table(
    traces: Traces,
    head: DeferralHead,
    label: str = "reference",
    temperature: float | None = None,
    baselines: Mapping[str, Sequence[PositionRule]] | None = None,
) -> dict[str, Tensor]:
    """Columns to score ``head`` on: ``x z tv position``, ``exact`` where the traces know it, and the
    decisions ``[N, A]`` of each named baseline, given as one rule per alpha.
    """
    check_features(traces, head, label)
    table = _shared(traces, head, label, temperature)
    rows = labelled(traces, label)
    table["position"] = _chosen(torch.from_numpy(traces.column("position").copy()).long(), rows)
    if is_sequence(label):
        if traces.manifest.temperature == 0:
            table["exact"] = table["z"]  # a greedy text is what it is
    elif traces.manifest.truth == "exact" and head.loss in risks.LOSSES:
        table["exact"] = truth.gap(traces, "exact", head.loss)
    if head.needs_candidates and label == "reference":
        table |= _gold_columns(traces, head)
    if head.stage == "draft":
        table["reject"] = _chosen(truth.rejection(traces, temperature), rows)
    if baselines:
        decided = decisions(traces, baselines, temperature)
        table |= {name: _chosen(column, rows) for name, column in decided.items()}
    return table


def labelled(traces: Traces, label: str) -> Tensor | None:
    """Rows that a truth labels, as indices; None for all."""
    if not (is_sequence(label) or judges_sequences(label)):
        return None
    return labelled_rows(traces).nonzero()[:, 0]


def _chosen(column: Tensor, rows: Tensor | None) -> Tensor:
    return column if rows is None else column.index_select(0, rows)


def decisions(
    traces: Traces, baselines: Mapping[str, Sequence[PositionRule]], temperature: float | None = None
) -> dict[str, Tensor]:
    """Bool ``[N, A]`` per baseline."""
    fields = frozenset().union(*(rule.needs for rules in baselines.values() for rule in rules))
    summary = traces.summary(sorted(fields), temperature)
    return {
        name: torch.stack([rule.defer(summary) for rule in rules], dim=-1)
        for name, rules in baselines.items()
    }


def check_features(traces: Traces, head: DeferralHead, label: str = "reference") -> None:
    """Refuse an empty split, features that the traces lack, and the fields of a token that nobody drafted."""
    if len(traces) == 0:
        raise InputError("an empty split: these traces hold no token; collect more or change the fractions")
    absent = [name for name in head.features if name not in traces.summary_fields]
    if absent:
        raise InputError(
            f"the traces lack feature(s) {', '.join(absent)}; they hold {', '.join(traces.summary_fields)}"
        )
    leaks = [name for name in head.features if name in TOKEN_FIELDS and not is_sequence(label)]
    if leaks and label == "acceptance" and traces.manifest.prefixes != "drafter":
        raise InputError(
            f"feature(s) {', '.join(leaks)} speak of a token that the drafter did not write and leak whether it would "
            "have been accepted; leave them out or collect with --prefixes drafter"
        )
    if leaks and traces.manifest.prefixes == "reference":
        raise InputError(
            f"feature(s) {', '.join(leaks)} speak of the gold token in reference traces and leak the label; "
            "leave them out or collect on prefixes of the drafter or the cascade"
        )


def _shared(
    traces: Traces, head: DeferralHead, label: str, temperature: float | None, own: Tensor | None = None
) -> dict[str, Tensor]:
    check_label(head, label)
    _check_form(traces, head, label)
    wanted = list(dict.fromkeys([*head.features, "tv"]))
    read = argmax_summary if is_judge(label) else sequence_summary if is_sequence(label) else Traces.summary
    summary = read(traces, wanted, temperature)
    rows = labelled(traces, label)
    if rows is not None:
        summary = summary.select(rows)
    x = head.columns(summary, own)
    _refuse_nan(head, summary)
    z = truth.label(traces, label, head.loss, temperature).float()
    known = traces if rows is None else None
    if known is not None:
        _refuse_not_finite(f"the label of the gap (truth={label!r}, loss={head.loss!r})", z, traces, label)
        _refuse_not_finite("tv", summary["tv"], traces, label)
    z = _chosen(z, rows)
    return {"x": x, "z": z, "tv": summary["tv"].float()}


def check_label(head: DeferralHead, label: str) -> None:
    """Refuse labels that the head's stage cannot mean.

    Raises:
        InputError: a judge head on labels of the gap, or on those of the other stage.
    """
    if isinstance(head, JudgeHead):
        wanted = "judge" if head.stage == "verify" else "acceptance"
        if label != wanted and not (wanted == "judge" and is_judge(label)):
            raise InputError(
                f"truth={label!r}: a judge head of stage {head.stage!r} learns from truth {wanted}"
                + (":tau=X or judge:rate=R" if wanted == "judge" else "")
            )
        return
    if is_sequence(label) != (head.loss in SEQUENCE_LOSSES):
        raise InputError(
            f"truth={label!r}, loss={head.loss!r}: truth 'sequence' is for a head of loss 'sequence' (temperature 0) "
            "or 'sequence_sampled', and they learn from nothing else"
        )
    if is_judge(label) or label == "acceptance":
        raise InputError(
            f"truth={label!r} labels a judge head, not a {head.head_type} head; use another truth"
        )


def _check_form(traces: Traces, head: DeferralHead, label: str) -> None:
    """Refuse labels that average over tokens where the head reads the token, and those of tokens where it does not.

    Raises:
        InputError: sequence labels of the other form.
    """
    if not is_sequence(label) or traces.manifest.temperature == 0:
        return
    form = traces.manifest.labels.get("form", "position")
    wanted = "token" if set(head.features) & TOKEN_FIELDS else "position"
    if form != wanted:
        raise InputError(
            f"a {head.head_type} head with features {', '.join(map(str, head.inputs.features))} learns from labels of "
            f"form {wanted!r}, these are of form {form!r}; collect with --label-form {wanted}"
        )


def _refuse_nan(head: DeferralHead, summary: Summary) -> None:
    for name in head.inputs.names:
        for field in fields_of(name):
            value = summary[field]
            bad = int((~torch.isfinite(value.float())).sum())
            if bad:
                raise InputError(
                    f"feature {field} is not finite in {bad} of {len(value)} rows; collect again, or fit without it (a "
                    "drafter of fewer tokens than the verifier makes kl and cross_entropy infinite)"
                )


def _refuse_not_finite(what: str, values: Tensor, traces: Traces, label: str) -> None:
    wrong = ~torch.isfinite(values.float())
    if is_judge(label):  # the other rows of a judge have no label
        wrong &= judged_rows(traces)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        prompt = traces.manifest.prompt_ids[int(traces.prompt_of_row[row])]
        raise InputError(
            f"{what} is {float(values[row]):g} in {int(wrong.sum())} of {len(values)} rows, first in prompt {prompt}; "
            "collect again, or use another truth"
        )


def _gold_columns(traces: Traces, head: DeferralHead) -> dict[str, Tensor]:
    """Class of the gold token and, where logged, the candidates, as :mod:`heads.objectives` reads them."""
    gold = gold_tokens(traces, f"a {head.head_type} head")
    tops = traces.summary(["drafter_argmax", "verifier_argmax"])
    target = torch.full_like(gold, 2)
    target[gold == tops["drafter_argmax"]] = 1
    target[gold == tops["verifier_argmax"]] = 0
    columns = {"target": target}
    if head.loss == "prob":
        logs = traces.summary(["token", "drafter_logprob", "verifier_logprob"])
        if bool((logs["token"] != gold).any()):
            raise InputError("loss='prob' needs q and p of the gold token; collect with --prefixes reference")
        columns |= {f"gold_{role}": logs[f"{role}_logprob"].exp() for role in ("drafter", "verifier")}
    if traces.manifest.top_k:
        columns |= _candidates(traces, gold, tops)
    elif head.head_type == "token":
        raise InputError("a token head needs logged candidates; collect with --log-top-k 16 or more")
    return columns


def _candidates(traces: Traces, gold: Tensor, tops: Summary) -> dict[str, Tensor]:
    blocks = []
    for start in range(0, len(traces), CANDIDATE_BLOCK):
        rows = slice(start, min(start + CANDIDATE_BLOCK, len(traces)))
        found = read_candidates(traces, rows)
        top = [found.ids == tops[name][rows].unsqueeze(-1) for name in ("drafter_argmax", "verifier_argmax")]
        blocks.append(
            {
                "cand_drafter": found.drafter_logprobs.clamp_min(LOG_FLOOR),
                "cand_verifier": found.verifier_logprobs.clamp_min(LOG_FLOOR),
                "cand_gold": found.ids == gold[rows].unsqueeze(-1),
                "cand_valid": found.valid,
                "cand_top": top[0] | top[1],
                "tail_drafter": found.drafter_rest.clamp_min(1e-6).log(),
                "tail_verifier": found.verifier_rest.clamp_min(1e-6).log(),
            }
        )
    return {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}


def hidden_widths(traces: Traces) -> dict[str, int]:
    """Widths of the logged hidden states by summary name, as heads take them."""
    judged = traces.manifest.layout.judged
    return ({JUDGED_HIDDEN: judged} if judged else {}) | {
        f"{role}_hidden": int(d)
        for role, d in traces.manifest.hidden.items()
        if f"{role}_hidden" in HIDDEN_FIELDS
    }
