"""The verdict: what the chosen rule gains and loses on the test part, and what to paste where it pays."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deferral_train.evaluation.bootstrap import MIN_PROMPTS, Interval, PromptBootstrap

REPLICATES = 2000


def make_verdict(
    decode_folder: Path,
    chosen: Mapping[str, Any],
    gate: Mapping[str, Any],
    bound: Mapping[str, Any],
    skew: Mapping[str, Any],
    seed: int,
) -> dict[str, Any]:
    """Judge the chosen rule from what decoding measured.

    Args:
        decode_folder: ``outputs.jsonl`` and ``batches.jsonl`` of ``verifier_only``, ``lossless`` and the chosen rule.
        chosen: ``label`` (in the decode folder), ``spec``, ``rule``, ``parameter``, ``value``.
        gate: the pair's gate.
        bound: of the rise of the local token risk, see ``operate.token_risk_bound``.
        skew: how many predictions from traces agreed with the counts, ``agree`` of ``of``.

    Returns:
        what ``verdict.json`` holds; ``status`` is "ok", or "no_setting" where no setting beats the verifier alone.
    """
    rows, batches = (_by_rule(decode_folder / name) for name in ("outputs.jsonl", "batches.jsonl"))
    label = chosen["label"]
    speedup = _ratio_of_times(batches["verifier_only"], batches[label], seed)
    lossless = _ratio_of_times(batches["verifier_only"], batches["lossless"], seed)
    quality = _quality(rows["lossless"], rows[label], seed)
    calls = {name: _calls(rows[name]) for name in ("verifier_only", "lossless", label)}
    pays = (speedup.low if speedup.low is not None else speedup.value) > 1.0
    cost_ratio = gate["verifier_seconds"] / gate["drafter_seconds"]
    return {
        "status": "ok" if pays else "no_setting",
        "headline": _headline(chosen, speedup, quality, calls, cost_ratio, pays),
        "chosen": dict(chosen),
        "speedup": {**speedup.as_dict(), "against": "verifier_only"},
        "lossless_speedup": {**lossless.as_dict(), "against": "verifier_only"},
        "calls_saved": {
            "value": 1 - calls[label] / calls["verifier_only"],
            "lossless": 1 - calls["lossless"] / calls["verifier_only"],
            "against": "verifier_only",
        },
        "quality": quality,
        "risk": dict(bound),
        "cost_ratio": cost_ratio,
        "trust": _trust(rows[label], bound, skew, speedup),
        "snippet": snippet(chosen),
        "engine_line": None,
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


def _by_rule(path: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found[row["rule"]].append(row)
    return found


def _ratio_of_times(
    base: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], seed: int
) -> Interval:
    """Time of ``base`` over time of ``other``: medians over repetitions per batch, batches redrawn together."""
    above, below = _median_seconds(base), _median_seconds(other)
    return _bootstrap(len(above), seed).ratio(above, below)


def _median_seconds(batches: Sequence[Mapping[str, Any]]) -> np.ndarray:
    seconds: dict[int, list[float]] = defaultdict(list)
    for batch in batches:
        seconds[batch["batch"]].append(batch["seconds"])
    return np.array([np.median(seconds[number]) for number in sorted(seconds)])


def _bootstrap(units: int, seed: int) -> PromptBootstrap:
    return PromptBootstrap(units, REPLICATES if units >= MIN_PROMPTS else 0, seed)


def _calls(rows: Sequence[Mapping[str, Any]]) -> float:
    """Verifier calls an emitted token."""
    return sum(row["counts"]["verifier_calls"] for row in rows) / sum(
        row["counts"]["emitted"] for row in rows
    )


def _quality(
    lossless: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], seed: int
) -> dict[str, Any]:
    """Sentence chrF against the references, the rule's mean minus lossless's on the same prompts."""
    from sacrebleu.metrics import CHRF

    chrf = CHRF()
    first = {row["id"]: row for row in lossless if row["repetition"] == 0 and row.get("reference")}
    pairs = [(first[row["id"]], row) for row in rows if row["repetition"] == 0 and row["id"] in first]
    if not pairs:
        return {"metric": None, "difference": None}
    scores = np.array(
        [[chrf.sentence_score(row["text"], [row["reference"]]).score for row in pair] for pair in pairs]
    )
    difference = _bootstrap(len(pairs), seed).mean(scores[:, 1] - scores[:, 0])
    same = float(np.mean([a["text"] == b["text"] for a, b in pairs]))
    return {
        "metric": "mean sentence chrF",
        "lossless": float(scores[:, 0].mean()),
        "value": float(scores[:, 1].mean()),
        "difference": difference.value,
        "low": difference.low,
        "high": difference.high,
        "same_text_as_lossless": same,
        "prompts": len(pairs),
        "length_ratio": _tokens([b for _, b in pairs]) / _tokens([a for a, _ in pairs]),
    }


def _tokens(rows: Sequence[Mapping[str, Any]]) -> float:
    return float(sum(row["counts"]["emitted"] for row in rows))


def _headline(
    chosen: Mapping[str, Any],
    speedup: Interval,
    quality: Mapping[str, Any],
    calls: Mapping[str, float],
    cost_ratio: float,
    pays: bool,
) -> str:
    speed = f"{speedup.value:.2f}x the verifier's speed{_range(speedup.as_dict())}"
    lost = ""
    if quality["difference"] is not None:
        lost = f"; {quality['metric']} {quality['difference']:+.2f} against lossless{_range(quality)}"
    if pays:
        return f"{chosen['name']} runs at {speed}{lost}"
    length = 1 / calls[chosen["label"]]
    return (
        f"No setting helps this pair in wall clock: {chosen['name']} runs at {speed}, because {length:.1f} tokens a "
        f"verifier call do not pay for drafting where a verifier pass costs {cost_ratio:.1f} drafter passes{lost}"
    )


def _range(interval: Mapping[str, Any]) -> str:
    return "" if interval["low"] is None else f" ({interval['low']:.2f} to {interval['high']:.2f})"


def _trust(
    rows: Sequence[Mapping[str, Any]], bound: Mapping[str, Any], skew: Mapping[str, Any], speedup: Interval
) -> list[str]:
    prompts = len({row["id"] for row in rows})
    said = [
        f"Decoded {prompts} test prompts that neither the pair, the head nor its operating point had seen.",
        "Operating points were set on the calibration part, at the same rejection rate for every rule.",
        f"Local token risk on the test prefixes rises by {bound['mean']:.4f} over lossless, and by at most "
        f"{bound['bound']:.4f} with {bound['confidence']:.0%} confidence ({bound['prompts']} prompts); "
        "this is about single tokens, not whole outputs.",
        f"Predicted from traces against counted while decoding: {skew['agree']} of {skew['of']} quantities agree.",
    ]
    if speedup.low is None:
        said.append(f"Too few prompts for an interval of the speed: at least {MIN_PROMPTS} are needed.")
    return said
