"""The verdict: what the chosen rule gains and loses on the test part, and what to paste where it pays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deferral_train.decoding.outputs import BATCHES, OUTPUTS, read_lines
from deferral_train.evaluation.bootstrap import MIN_PROMPTS, Interval
from deferral_train.evaluation.certificate import smallest_certifiable
from deferral_train.evaluation.choose import HIGH, LOW, least_limit
from deferral_train.evaluation.online import online_table
from deferral_train.evaluation.quality import per_prompt
from deferral_train.pipeline import serving_speed
from deferral_train.pipeline.config import OperatingPointConfig
from deferral_train.redaction import redacted_text

POINTS = 100.0  # metrics per prompt lie in [0, 1]


METRICS = {"chrf": "mean sentence chrF", "sql": "answers right, in percent"}


@dataclass(frozen=True)
class Measured:
    """Measurements that a verdict rests on.

    Attributes:
        decode: folder with ``outputs.jsonl`` of ``verifier_only``, ``lossless`` and the chosen rule.
        timing: folder with ``batches.jsonl`` of the same rules, for their speed.
        gate: the pair's gate.
        bound: of the rise of the local token risk, see ``operating_point.token_risk_bound``.
        skew: how many predictions from traces agreed with the counts, ``agree`` of ``of``.
        metric: of quality, per prompt.
        served: tokens a second of a serving engine, see `serving_speed.measure_served`; None where the loop decoded.
    """

    decode: Path
    timing: Path
    gate: Mapping[str, Any]
    bound: Mapping[str, Any]
    skew: Mapping[str, Any]
    metric: str = "chrf"
    served: Mapping[str, Any] | None = None

    @property
    def metric_name(self) -> str:
        """In words."""
        return METRICS.get(self.metric.partition(":")[0], f"mean {redacted_text(self.metric)}")


def make_verdict(
    measured_on: Measured,
    chosen: Mapping[str, Any],
    point: OperatingPointConfig,
    seed: int,
    engine: tuple[str | None, str | None] = (None, None),
) -> dict[str, Any]:
    """Judge the chosen rule from what decoding measured.

    Args:
        chosen: ``label`` (in the decode folder), ``spec``, ``rule``, ``parameter``, ``value``.
        point: ``max_quality_loss``, points of the metric below lossless beyond which a speed-up is no help, and
            ``confidence`` of the bound on the loss per prompt.
        engine: line and reason, see `serving.engine_command.engine_line`.

    Returns:
        what ``verdict.json`` holds; ``status`` is "ok" where the chosen rule is faster than the verifier alone and
        than lossless speculation and loses at most what was allowed, else "no_setting" with the reasons.
    """
    rows, batches = (
        list(read_lines(measured_on.decode / OUTPUTS)),
        list(read_lines(measured_on.timing / BATCHES)),
    )
    gate, bound, skew = measured_on.gate, measured_on.bound, measured_on.skew
    max_quality_loss, confidence = point.max_quality_loss, point.confidence
    label = chosen["label"]
    measured = online_table(rows, batches, metric=measured_on.metric, seed=seed)
    speedup = measured[label]["speed"]
    calls = {name: _calls(rows, name) for name in ("verifier_only", "lossless", label)}
    quality = _quality(measured[label], measured["lossless"], rows, label, measured_on.metric_name)
    certified = loss_bound(rows, label, confidence, measured_on.metric, measured_on.metric_name)
    cost_ratio = gate["verifier_seconds"] / gate["drafter_seconds"]
    served = measured_on.served
    reasons = (
        _against(speedup, measured["lossless"]["speed"], calls[label], cost_ratio)
        if served is None
        else _against_serving(served)
    ) + _lost_too_much(quality, max_quality_loss)
    gain = f"{speedup.value:.2f}x the verifier's speed{_range(speedup.as_dict())}"
    gain = gain if served is None else serving_speed.sentence(served)
    return {
        "status": "no_setting" if reasons else "ok",
        "headline": _headline(chosen, gain, quality, calls, reasons),
        "reasons": reasons,
        "chosen": dict(chosen),
        "speedup": {**speedup.as_dict(), "against": "verifier_only"},
        "lossless_speedup": {**measured["lossless"]["speed"].as_dict(), "against": "verifier_only"},
        "calls_saved": {
            "value": 1 - calls[label] / calls["verifier_only"],
            "lossless": 1 - calls["lossless"] / calls["verifier_only"],
            "against": "verifier_only",
        },
        "quality": quality,
        "loss_bound": certified,
        "risk": dict(bound),
        "cost_ratio": cost_ratio,
        "trust": _trust(
            len(_first(rows, label)),
            bound,
            skew,
            _on_speed(speedup, served),
            certified,
            chosen,
            measured_on.metric_name,
        ),
        "served": None if served is None else dict(served),
        "snippet": snippet(chosen),
        "engine_line": engine[0],
        "engine_reason": engine[1],
        "engine_certificate": engine_certificate(chosen),
        "engine_note": None if engine[0] is None else _engine_note(chosen),
    }


def engine_certificate(chosen: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The chosen setting's certificate where it was measured in the serving engine; None where it was not."""
    certificate = chosen.get("certificate")
    measured = str((certificate or {}).get("engine", ""))
    return certificate if measured.startswith("vllm") else None


def _engine_note(chosen: Mapping[str, Any]) -> str:
    """The claim that the engine line may make."""
    if engine_certificate(chosen) is not None:
        return "Its certificate was measured in this engine."
    measured = (chosen.get("certificate") or {}).get("engine")
    where = f"{measured} measured it" if measured else "nothing was certified"
    return f"This line comes without a certificate: {where}, and not in this engine."


def loss_bound(
    rows: Sequence[Mapping[str, Any]], label: str, confidence: float, metric: str, metric_name: str
) -> dict[str, Any] | None:
    """Certified upper limit of the chosen setting's mean loss of the metric against lossless, per prompt.

    The setting was fixed before these prompts were decoded, so one test suffices; the limit bounds the mean over the
    population that the prompts were drawn from, and is never below the smallest that their number can certify. None
    where prompts have no references.
    """
    own, base = _first(rows, label), _first(rows, "lossless")
    if any(row["reference"] is None for row in own.values()):
        return None
    scores = [
        per_prompt(metric, [part[i]["text"] for i in own], [part[i]["reference"] for i in own])
        for part in (base, own)
    ]
    return {
        "metric": metric_name,
        "bound": POINTS * least_limit(scores[0] - scores[1], confidence),
        "smallest": POINTS * smallest_certifiable(len(own), confidence, LOW, HIGH),
        "confidence": confidence,
        "prompts": len(own),
    }


def snippet(chosen: Mapping[str, Any]) -> str:
    """Python that runs the chosen rule inside transformers."""
    if chosen["rule"] == "learned":
        rule = f'make_rule("learned", head=DeferralHead.from_pretrained("{chosen["head"]}"), alpha={chosen["value"]!r})'
        names = "DeferralHead, cascade_generate, make_rule"
    else:
        rule = f'make_rule("{chosen["rule"]}", {chosen["parameter"]}={chosen["value"]!r})'
        names = "cascade_generate, make_rule"
    return (
        f"from deferral_train import {names}\n\n"
        f"rule = {rule}\n"
        "output = verifier.generate(**inputs, custom_generate=cascade_generate, drafter=drafter, rule=rule,\n"
        f"                           num_draft_tokens={chosen['num_draft_tokens']})\n"
    )


def _first(rows: Sequence[Mapping[str, Any]], rule: str) -> dict[str, Mapping[str, Any]]:
    """A rule's rows of the first repetition, by prompt."""
    return {row["id"]: row for row in rows if row["rule"] == rule and row["repetition"] == 0}


def _calls(rows: Sequence[Mapping[str, Any]], rule: str) -> float:
    """Verifier calls an emitted token."""
    counts = [row["counts"] for row in rows if row["rule"] == rule]
    return sum(count["verifier_calls"] for count in counts) / sum(count["emitted"] for count in counts)


def _quality(
    own: Mapping[str, Interval],
    base: Mapping[str, Interval],
    rows: Sequence[Mapping[str, Any]],
    rule: str,
    metric_name: str,
) -> dict[str, Any]:
    """The metric in points, the rule's mean minus lossless's on the same prompts; and how alike the texts are."""
    texts, lossless = _first(rows, rule), _first(rows, "lossless")
    same = sum(texts[name]["text"] == lossless[name]["text"] for name in texts) / len(texts)
    found = {
        "metric": None,
        "difference": None,
        "same_text_as_lossless": same,
        "prompts": len(texts),
        "length_ratio": own["length_ratio"].value,
    }
    if "quality" not in own:
        return found
    difference = own["quality_difference"]
    low, high = (None if limit is None else POINTS * limit for limit in (difference.low, difference.high))
    return found | {
        "metric": metric_name,
        "lossless": POINTS * base["quality"].value,
        "value": POINTS * own["quality"].value,
        "difference": POINTS * difference.value,
        "low": low,
        "high": high,
    }


def _against(
    speedup: Interval,
    lossless: Interval,
    calls: float,
    cost_ratio: float,
) -> list[str]:
    """Reasons against the chosen rule from its speed in the loop, in words; empty where nothing does."""
    found = []
    if (speedup.low if speedup.low is not None else speedup.value) <= 1.0:
        found.append(
            f"{1 / calls:.1f} tokens a verifier call do not pay for drafting where a verifier pass costs "
            f"{cost_ratio:.1f} drafter passes"
        )
    if speedup.value <= lossless.value:
        found.append(f"lossless speculation is as fast ({lossless.value:.2f}x)")
    return found


def _against_serving(served: Mapping[str, Any]) -> list[str]:
    """The same from its speed in an engine: it has to be faster at one load at least."""
    if serving_speed.pays_at(served):
        return []
    return ["at no load does it serve more tokens a second than no speculation and than lossless"]


def _lost_too_much(quality: Mapping[str, Any], max_quality_loss: float) -> list[str]:
    """The same from the quality of its text."""
    found = []
    if quality["difference"] is not None and quality["difference"] < -max_quality_loss:
        found.append(
            f"its text loses {-quality['difference']:.2f} points of {quality['metric']}, more than the "
            f"{max_quality_loss:g} allowed"
        )
    return found


def _headline(
    chosen: Mapping[str, Any],
    speed: str,
    quality: Mapping[str, Any],
    calls: Mapping[str, float],
    reasons: Sequence[str],
) -> str:
    saved = 1 - calls[chosen["label"]] / calls["verifier_only"]
    gain = f"{speed}, {saved:.0%} fewer verifier calls"
    lost = ""
    if quality["difference"] is not None:
        lost = f"; {quality['metric']} {quality['difference']:+.2f} against lossless{_range(quality)}"
    if reasons:
        return f"No setting tried helps this pair, because {' and '.join(reasons)}. {chosen['name']}: {gain}{lost}"
    return f"{chosen['name']}: {gain}{lost}"


def _range(interval: Mapping[str, Any]) -> str:
    return "" if interval["low"] is None else f" ({interval['low']:.2f} to {interval['high']:.2f})"


def _trust(
    prompts: int,
    bound: Mapping[str, Any],
    skew: Mapping[str, Any],
    on_speed: str | None,
    certified: Mapping[str, Any] | None,
    chosen: Mapping[str, Any],
    metric_name: str,
) -> list[str]:
    constraint = chosen.get("certificate")
    said = [
        f"Decoded {prompts} test prompts that neither the pair, the head nor its operating point had seen.",
        "Operating points were set on a part of their own, at the same rejection rate for every rule.",
        f"Local token risk on the test prefixes rises by {bound['mean']:.4f} over lossless, and by at most "
        f"{bound['bound']:.4f} with {bound['confidence']:.0%} confidence ({bound['prompts']} prompts); "
        "this is about single tokens, not whole outputs.",
        f"Predicted from traces against counted while decoding: {skew['agree']} of {skew['of']} quantities agree.",
    ]
    if certified is not None:
        said.insert(
            2,
            f"Its mean loss per prompt against lossless is at most {certified['bound']:.1f} points of {metric_name} "
            f"with {certified['confidence']:.0%} confidence; {certified['prompts']} prompts cannot certify less than "
            f"{certified['smallest']:.1f}.",
        )
    if constraint is not None:
        said.insert(
            2,
            f"The chosen setting is another: the one of fewest verifier calls whose mean loss of {metric_name} per "
            f"prompt is certified to be at most {POINTS * constraint['limit']:.1f} points, with "
            f"{constraint['confidence']:.0%} confidence, on {constraint['prompts']} calibration prompts.",
        )
    if chosen.get("uncertified"):
        said.insert(
            2, f"No certificate: {chosen['uncertified']}. The setting is that of the common rejection rate."
        )
    return said if on_speed is None else [*said, on_speed]


def _on_speed(speedup: Interval, served: Mapping[str, Any] | None) -> str | None:
    """A sentence about how far the speed can be trusted; None where its interval says it."""
    if served is not None:
        return serving_speed.conditions(served)
    if speedup.low is None:
        return f"Too few prompts for an interval of the speed: at least {MIN_PROMPTS} are needed."
    return None
