"""``summary.json`` of a decode run: quality, speed, calls, rates and lengths of each rule, from its files
alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from deferral_train.decoding.stats import COUNTS, POSITION_COUNTS


def summarize_rule(rows: Sequence[Mapping[str, Any]], batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One rule's summary from its rows and batches, all repetitions."""
    totals = {name: sum(row["counts"][name] for row in rows) for name in (*COUNTS, "emitted")}
    first = [row for row in rows if row["repetition"] == 0]
    spent = [row["spent"] for row in rows if row.get("spent") is not None]
    ran = [batch["ran"] for batch in batches if "ran" in batch][-1:]
    says = not ran or ran[0].get("deferrals", True)
    return {
        "quality": quality(first),
        **speed(rows, batches),
        "mean_acceptance_length": _ratio(totals["emitted"], totals["verifier_calls"]),
        # A server does not say what its rule deferred.
        "deferral_rate": _ratio(totals["deferred"], totals["decided"]) if says else None,
        "rejection_rate": _ratio(totals["rejected"], totals["decided"]),
        "mean_output_tokens": _ratio(sum(row["counts"]["emitted"] for row in first), len(first)),
        "verifier_calls_per_token": _ratio(totals["verifier_calls"], totals["emitted"]),
        "counts": totals,
        "positions": _positions(batches),
        "verifier_passes": sum(batch["verifier_passes"] for batch in batches),
        "drafter_passes": sum(batch["drafter_passes"] for batch in batches),
        "most_spent": max(spent) if spent else None,
        "prompts": len(first),
        **({"ran": ran[0]} if ran else {}),
    }


def speed(rows: Sequence[Mapping[str, Any]], batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Tokens per second and milliseconds per token: the median over repetitions, and each repetition's."""
    rates = []
    for repetition in sorted({batch["repetition"] for batch in batches}):
        tokens = sum(row["counts"]["emitted"] for row in rows if row["repetition"] == repetition)
        seconds = sum(batch["seconds"] for batch in batches if batch["repetition"] == repetition)
        rates.append(tokens / seconds)
    middle = statistics.median(rates)
    return {
        "tokens_per_second": middle,
        "ms_per_token": 1000.0 / middle if middle else None,
        "tokens_per_second_each": rates,
        "seconds": sum(batch["seconds"] for batch in batches),
    }


def quality(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """BLEU and chrF by sacrebleu with their signatures, and exact match, over rows that have a reference."""
    pairs = [(row["text"], row["reference"]) for row in rows if row.get("reference") is not None]
    if not pairs:
        return {}
    from sacrebleu.metrics import BLEU, CHRF

    texts, references = [text for text, _ in pairs], [reference for _, reference in pairs]
    bleu, chrf = BLEU(), CHRF()
    result: dict[str, Any] = {
        "bleu": bleu.corpus_score(texts, [references]).score,
        "chrf": chrf.corpus_score(texts, [references]).score,
        "exact_match": sum(text.strip() == ref.strip() for text, ref in pairs) / len(pairs),
        "references": len(pairs),
    }
    result["signatures"] = {"bleu": str(bleu.get_signature()), "chrf": str(chrf.get_signature())}
    return result


def _positions(batches: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    depth = max(len(batch["positions"]["drafted"]) for batch in batches)
    return {
        name: [
            sum(b["positions"][name][place] for b in batches if place < len(b["positions"][name]))
            for place in range(depth)
        ]
        for name in POSITION_COUNTS
    }


def _ratio(above: float, below: float) -> float | None:
    """None where there is nothing to divide by (a drafter alone calls no verifier)."""
    return above / below if below else None
