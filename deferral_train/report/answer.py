"""The first screen of the page: what a run gained, lost and chose, and whether that can be trusted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deferral_train.report.load import RunFolder
from deferral_train.report.numbers import limits, nice, signed


def answer(run: RunFolder) -> dict[str, Any]:
    """The first screen: headline, gain, loss, chosen point, trust, what to paste."""
    verdict = run.verdict or {}
    return {
        "status": verdict.get("status"),
        "headline": verdict.get("headline")
        or "This run has no verdict: it was evaluated, but no setting was chosen.",
        "cards": [
            card
            for card in (
                _gain(verdict),
                _calls(verdict),
                _loss(verdict),
                _chosen(verdict),
            )
            if card
        ],
        "drafting": (verdict.get("drafting") or {}).get("text"),
        "trust": list(verdict.get("trust") or []),
        "risk": verdict.get("risk"),
        "snippet": verdict.get("snippet"),
        "engine_line": verdict.get("engine_line"),
        "engine_reason": verdict.get("engine_reason"),
        "engine_note": verdict.get("engine_note"),
    }


def _gain(verdict: Mapping[str, Any]) -> dict[str, str] | None:
    speed = verdict.get("speedup")
    if not speed:
        return None
    more = (
        f"95% interval {nice(speed['low'])} to {nice(speed['high'])}, "
        if speed.get("low") is not None
        else ""
    )
    against = str(speed.get("against", "the verifier alone")).replace("verifier_only", "the verifier alone")
    return {"name": "Gain: speed", "value": f"{nice(speed['value'])}×", "more": f"{more}against {against}"}


def _calls(verdict: Mapping[str, Any]) -> dict[str, str] | None:
    saved = verdict.get("calls_saved")
    if not saved:
        return None
    more = "" if saved.get("lossless") is None else f"lossless decoding saves {saved['lossless']:.0%}"
    return {"name": "Gain: verifier calls saved", "value": f"{saved['value']:.0%}", "more": more}


def _loss(verdict: Mapping[str, Any]) -> dict[str, str] | None:
    quality = verdict.get("quality")
    if not quality or quality.get("difference") is None:
        return None
    between = ""
    if quality.get("low") is not None:
        between = f"95% interval {limits(quality['low'], quality['high'], 1.0, True)}; "
    return {
        "name": f"Loss: {quality['metric']}",
        "value": signed(quality["difference"], True),
        "more": f"{between}{nice(quality.get('value'))} against {nice(quality.get('lossless'))} lossless",
    }


def _chosen(verdict: Mapping[str, Any]) -> dict[str, str] | None:
    chosen = verdict.get("chosen")
    if not chosen:
        return None
    value = chosen.get("value", chosen.get("alpha"))
    parameter = chosen.get("parameter") or "alpha"
    dial = "" if value is None else f"{parameter} = {nice(value)}"
    name = chosen.get("name") or chosen.get("rule") or chosen.get("spec", "")
    return {"name": "Chosen point", "value": str(name), "more": dial}
