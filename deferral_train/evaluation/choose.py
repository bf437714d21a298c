"""From a constraint to a setting: a loss limit with a certificate, a limit on verifier calls, or a local token
risk.

The certified loss is per prompt and bounded: the metric of lossless decoding minus that of the rule, on the
same calibration prompts, in [-1, 1]. Settings are tested in the order of the dial, from the lossless end;
with several rules each gets its share of the error probability.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from deferral_train.errors import InputError
from deferral_train.evaluation.bootstrap import MIN_PROMPTS, PromptBootstrap
from deferral_train.evaluation.certificate import (
    Certificate,
    betting_p_value,
    fixed_sequence,
    prompts_needed,
    smallest_certifiable,
)
from deferral_train.evaluation.families import make_families
from deferral_train.evaluation.offline import score_rules
from deferral_train.evaluation.quality import check_metric, gold, per_prompt
from deferral_train.evaluation.settings import Dials, Setting, in_order, setting_of
from deferral_train.redaction import redacted_text
from deferral_train.rules.base import Rule
from deferral_train.traces import Traces

LOW, HIGH = -1.0, 1.0  # bounds of a difference of two scores in [0, 1]


class NoSettingError(InputError):
    """No setting that was decoded meets the constraint; the message names the nearest."""


@dataclass(frozen=True)
class Choice:
    """The chosen setting and why it may be trusted.

    Attributes:
        kind: "certificate" (loss per prompt, certified), "bootstrap" (calls, an interval), or "local token
            risk".
        metric: what was limited. limit: the constraint. confidence: of the claim.
        mean: mean loss of the chosen setting on the calibration prompts (share of calls for "bootstrap").
        smallest: smallest loss that this number of prompts can certify.
        calls: verifier calls per token relative to lossless, None from traces alone.
    """

    setting: Setting
    kind: str
    metric: str
    limit: float
    confidence: float
    prompts: int
    mean: float
    smallest: float | None = None
    calls: float | None = None
    p_value: float | None = None

    def certificate(self) -> dict[str, Any]:
        """As it is stored in a head's config."""
        return {
            name: value for name, value in asdict(self).items() if name != "setting" and value is not None
        } | {"rule": self.setting.rule, "parameter": self.setting.parameter, "value": self.setting.value}


def choose_from_outputs(
    rows: Sequence[Mapping[str, Any]],
    *,
    metric: str | None = None,
    max_loss: float | None = None,
    max_verifier_calls: float | None = None,
    confidence: float = 0.95,
    rule: str | None = None,
    dials: Dials | None = None,
    seed: int = 0,
) -> Choice:
    """Pick a setting from `decode` outputs on calibration prompts.

    Args:
        rows: of ``outputs.jsonl``: ``lossless`` and the settings of one or more rules.
        metric: of :data:`deferral_train.evaluation.quality.METRICS`; max_loss: limit of its mean loss per
            prompt, absolute, against lossless (0.01 is one point in a hundred).
        max_verifier_calls: verifier calls per token as a share of lossless's (0.8: a fifth fewer).
        confidence: of the claim.
        rule: choose among the settings of this label without its dial, or of this rule.
        dials: of ``summary.json``, for labels that do not say their dial.

    Returns:
        With ``max_loss`` the certified setting of fewest calls; with ``max_verifier_calls`` alone the
        setting nearest to the lossless end that keeps it.

    Raises:
        InputError: no constraint, no lossless outputs, a loss that so few prompts cannot certify, a constraint that no
            setting
            meets (naming the nearest).
    """
    if metric is not None:
        check_metric(metric)
    check_constraint(confidence, max_loss=max_loss)
    if max_loss is None and max_verifier_calls is None:
        raise InputError("give a constraint: max_loss with metric, or max_verifier_calls")
    if max_loss is not None and metric is None:
        raise InputError("max_loss needs a metric, for example metric=exact_match")
    outputs = _Outputs.of(rows, rule, dials)
    if max_loss is None:
        assert max_verifier_calls is not None
        return _fewest_changes(outputs, max_verifier_calls, confidence, seed)
    assert metric is not None
    return _certified(outputs, metric, max_loss, confidence, max_verifier_calls)


@dataclass(frozen=True)
class _Outputs:
    """First-repetition rows on the prompts that all settings share: settings by rule, in the order of their
    dial.
    """

    ids: list[str]
    families: dict[str, list[Setting]]
    rows: dict[str, dict[str, Mapping[str, Any]]]

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], rule: str | None, dials: Dials | None) -> _Outputs:
        by_label: dict[str, dict[str, Mapping[str, Any]]] = defaultdict(dict)
        for row in rows:
            if row["repetition"] == 0:
                by_label[row["rule"]][str(row["id"])] = row
        if "lossless" not in by_label:
            raise InputError("outputs hold no rule lossless to compare with; decode it on the same prompts")
        settings = [setting for label in by_label if (setting := setting_of(label, dials)) is not None]
        families: dict[str, list[Setting]] = defaultdict(list)
        for setting in settings:
            if rule in (None, setting.family, setting.rule):
                families[setting.family].append(setting)
        if not families:
            known = ", ".join(sorted(by_label))
            raise InputError(
                f"outputs hold no setting{f' of {rule}' if rule else ''} to choose from; they hold {known}"
            )
        used = [setting.label for group in families.values() for setting in group]
        ids = sorted(set.intersection(*(set(by_label[label]) for label in ["lossless", *used])))
        if not ids:
            raise InputError("the rules were decoded on different prompts; decode them side by side")
        return cls(ids, {name: in_order(group) for name, group in families.items()}, dict(by_label))

    def scores(self, label: str, metric: str) -> np.ndarray:
        """Metric of one setting on every prompt, [n]."""
        rows = [self.rows[label][name] for name in self.ids]
        return per_prompt(metric, [row["text"] for row in rows], [gold(metric, row) for row in rows])

    def calls(self, label: str) -> tuple[np.ndarray, np.ndarray]:
        """Verifier calls and emitted tokens of one setting on every prompt, [n] each."""
        counts = [self.rows[label][name]["counts"] for name in self.ids]
        return (
            np.array([count["verifier_calls"] for count in counts], dtype=np.float64),
            np.array([count["emitted"] for count in counts], dtype=np.float64),
        )

    def relative_calls(self, label: str) -> float:
        """Verifier calls per token against lossless's."""
        (calls, tokens), (base, base_tokens) = self.calls(label), self.calls("lossless")
        return float((calls.sum() / tokens.sum()) / (base.sum() / base_tokens.sum()))


def _certified(
    outputs: _Outputs, metric: str, max_loss: float, confidence: float, max_calls: float | None
) -> Choice:
    share = 1 - (1 - confidence) / len(outputs.families)
    check_reachable("max_loss", max_loss, len(outputs.ids), share)
    base = outputs.scores("lossless", metric)
    best: Choice | None = None
    nearest: list[tuple[float, Setting]] = []
    for settings in outputs.families.values():
        losses = np.stack([base - outputs.scores(setting.label, metric) for setting in settings])
        certificate = fixed_sequence(losses, max_loss, share, low=LOW, high=HIGH)
        nearest.append((least_limit(losses[0], share), settings[0]))
        for place in range(certificate.certified):
            found = _choice(outputs, settings[place], certificate, place, metric, confidence)
            if best is None or found.calls < best.calls:  # type: ignore[operator]
                best = found
    if best is None:
        limit, setting = min(nearest, key=lambda pair: pair[0])
        raise NoSettingError(
            f"no setting keeps the mean {metric} loss at or below {max_loss:g} with confidence {confidence:g} on "
            f"{len(outputs.ids)} prompts; nearest: {setting.label} certifies {limit:.3g}"
        )
    if max_calls is not None and best.calls is not None and best.calls > max_calls:
        raise InputError(
            f"within the loss limit the fewest verifier calls are {best.calls:.3f} of lossless's "
            f"({best.setting.label}), above max_verifier_calls={max_calls:g}; allow more loss or more calls"
        )
    return best


def _choice(
    outputs: _Outputs, setting: Setting, certificate: Certificate, place: int, metric: str, confidence: float
) -> Choice:
    return Choice(
        setting,
        "certificate",
        redacted_text(metric),
        certificate.limit,
        confidence,
        certificate.prompts,
        certificate.means[place],
        certificate.smallest,
        outputs.relative_calls(setting.label),
        certificate.p_values[place],
    )


def check_constraint(confidence: float, **limits: float | None) -> None:
    """Refuse a confidence outside of (0, 1), and a limit of 1 or more, which every setting keeps."""
    if not 0 < confidence < 1:
        raise InputError(f"confidence={confidence:g} must lie between 0 and 1, such as 0.95")
    for name, limit in limits.items():
        if limit is not None and not limit < HIGH:
            raise InputError(
                f"{name}={limit:g} allows any loss: losses per prompt lie in [-1, 1], 0.02 is two points in a hundred"
            )


def check_reachable(constraint: str, limit: float, prompts: int, confidence: float) -> None:
    """Refuse a limit that cannot be certified even if no prompt loses anything; says what can."""
    smallest = smallest_certifiable(prompts, confidence, LOW, HIGH)
    if limit < smallest:
        need = f"; {prompts_needed(limit, confidence, LOW, HIGH)} prompts would do" if limit > 0 else ""
        raise InputError(
            f"{constraint}={limit:g} cannot be certified with {prompts} prompts: the smallest loss that they can "
            f"certify at confidence {confidence:g} is {smallest:.3g}{need}"
        )


def least_limit(losses: np.ndarray, confidence: float) -> float:
    """Smallest limit that this setting's losses certify on their own."""
    failing, passing = LOW, HIGH
    for _ in range(40):
        middle = (failing + passing) / 2
        if betting_p_value(losses, middle, LOW, HIGH) <= 1 - confidence:
            passing = middle
        else:
            failing = middle
    return passing


def _fewest_changes(outputs: _Outputs, max_calls: float, confidence: float, seed: int) -> Choice:
    """The setting nearest to the lossless end whose share of calls is below the limit, upper end of the
    interval.
    """
    if len(outputs.ids) < MIN_PROMPTS:
        raise InputError(
            f"max_verifier_calls needs at least {MIN_PROMPTS} prompts for its interval, outputs hold "
            f"{len(outputs.ids)}; decode more"
        )
    redraws = PromptBootstrap(
        len(outputs.ids), 2000, seed, 2 * confidence - 1 if confidence > 0.5 else confidence
    )
    base, base_tokens = outputs.calls("lossless")
    seen: list[tuple[float, Setting]] = []
    for settings in outputs.families.values():
        for setting in settings:
            calls, tokens = outputs.calls(setting.label)
            samples = (
                redraws.sums(calls) / redraws.sums(tokens) / (redraws.sums(base) / redraws.sums(base_tokens))
            )
            upper = redraws.interval(outputs.relative_calls(setting.label), samples).high
            assert upper is not None
            seen.append((upper, setting))
            if upper <= max_calls:
                share = outputs.relative_calls(setting.label)
                kind, metric = "bootstrap", "verifier calls per token against lossless"
                return Choice(
                    setting, kind, metric, max_calls, confidence, len(outputs.ids), share, calls=share
                )
    upper, setting = min(seen, key=lambda pair: pair[0])
    raise InputError(
        f"no setting keeps verifier calls at or below {max_calls:g} of lossless's with confidence {confidence:g}; "
        f"nearest: {setting.label} with at most {upper:.3f}"
    )


def choose_from_traces(
    traces: Traces | Sequence[Traces],
    rule: Rule | str,
    max_token_risk: float,
    *,
    confidence: float = 0.95,
    truth: str = "reference",
    temperature: float | None = None,
    points: int = 41,
) -> Choice:
    """Pick a dial value from traces alone: a limit on the rise of the *local token risk* over lossless.

    The loss of a prompt is its mean loss of the emitted token minus that of lossless on the same positions.
    This
    says nothing about whole outputs: prefixes are as logged, and errors may feed on each other.

    Raises:
        InputError: a limit that so few prompts cannot certify, or that no value meets (naming the nearest).
    """
    check_constraint(confidence, max_token_risk=max_token_risk)
    family = make_families([rule], points)[0]
    if family.parameter is None:
        raise InputError(f"rule {family.name} has no dial to choose")
    losses = _token_losses(traces, family.name, rule, truth, temperature, points)
    settings = [
        Setting(
            f"{family.name}:{family.parameter}={value:g}",
            family.name,
            family.rule.name,
            family.parameter,
            float(value or 0),
        )
        for value in family.values
    ]
    order = in_order(settings)
    place = {setting.value: number for number, setting in enumerate(settings)}
    ordered = losses[[place[setting.value] for setting in order]]
    check_reachable("max_token_risk", max_token_risk, ordered.shape[1], confidence)
    certificate = fixed_sequence(ordered, max_token_risk, confidence, low=LOW, high=HIGH)
    if not certificate.certified:
        raise InputError(
            f"no {family.parameter} of {family.name} keeps the local token risk within {max_token_risk:g} of "
            f"lossless's; nearest: {order[0].label} certifies {least_limit(ordered[0], confidence):.3g}"
        )
    last = certificate.certified - 1
    return Choice(
        order[last],
        "local token risk",
        "mean loss of the emitted token, minus lossless",
        max_token_risk,
        confidence,
        ordered.shape[1],
        certificate.means[last],
        certificate.smallest,
        p_value=certificate.p_values[last],
    )


def _token_losses(
    traces: Traces | Sequence[Traces],
    name: str,
    rule: Rule | str,
    truth: str,
    temperature: float | None,
    points: int,
) -> np.ndarray:
    """Per-prompt mean loss of the emitted token minus lossless's, [S, P], in the order of the family's
    values.
    """
    table = score_rules(traces, {name: rule}, grid=points, bootstrap=0, truth=truth, temperature=temperature)
    losses, base = (
        table[name].per_prompt.get("emitted_loss"),
        table["lossless"].per_prompt.get("emitted_loss"),
    )
    if losses is None or base is None:
        raise InputError(f"the loss of {name}'s emitted token is not known at this temperature and truth")
    return (losses - base) / table.rows_per_prompt
