"""Data of the token view and of the alpha slider: ids become text, log probabilities become shares."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deferral_train.report.load import RunFolder

PROMPTS = 12  # shown in the token view
CANDIDATES = 5
ORIGINS = ("none", "kept", "accepted", "resampled", "bonus", "unverified")
REFERENCE_RULES = ("verifier_only", "lossless")


@dataclass(frozen=True)
class Texts:
    """Turns ids into text with the run's own tokenizer; without one, shows the ids."""

    tokenizer: Any | None

    @classmethod
    def of(cls, run: RunFolder) -> Texts:
        """The tokenizer of the run's own pair, of the one that it was given, or of a hub pair in the local cache."""
        from transformers import AutoTokenizer

        own = [str(run.folder / "pair" / role) for role in ("verifier", "drafter")]
        for name in [*(folder for folder in own if Path(folder).is_dir()), *_configured(run)]:
            try:
                return cls(
                    AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
                )
            except (OSError, ValueError):  # moved since, never downloaded here, or of code that is not run
                continue
        return cls(None)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text that each token adds; several bytes of one character appear with its last token."""
        if self.tokenizer is None:
            return [f"{number} " for number in ids]
        pieces, before = [], ""
        for end in range(1, len(ids) + 1):
            text = self.tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
            grown = text if not text.endswith("\ufffd") or end == len(ids) else before
            pieces.append(grown[len(before) :] if grown.startswith(before) else grown)
            before = grown
        return pieces

    def without_end(self, ids: Sequence[int]) -> Sequence[int]:
        """The tokens before the one that ends a text."""
        end = getattr(self.tokenizer, "eos_token_id", None)
        return ids[:-1] if ids and end is not None and ids[-1] == end else ids

    def one(self, token: int) -> str:
        """A candidate's text."""
        if self.tokenizer is None:
            return str(token)
        return self.tokenizer.decode([token], clean_up_tokenization_spaces=False) or f"<{token}>"


def _configured(run: RunFolder) -> list[str]:
    """Folders or hub ids of the pair that the run's or the `decode` command's config names."""
    config = (run.provenance or {}).get("config") or {}
    described = config.get("pair", config)
    return [described[role] for role in ("verifier", "drafter") if described.get(role)]


def token_data(run: RunFolder, texts: Texts) -> dict[str, Any] | None:
    """Texts with token origins, per prompt and rule; None where nothing was decoded."""
    # Where prompts were decoded again one by one, these carry the candidates.
    rows = [row for row in run.timed_outputs or run.outputs if row["repetition"] == 0]
    if not rows:
        return None
    ids = list(dict.fromkeys(row["id"] for row in rows))[:PROMPTS]
    rules = list(dict.fromkeys(row["rule"] for row in rows))
    by_key = {(row["id"], row["rule"]): row for row in rows if row["id"] in set(ids)}
    prompts = [
        {
            "id": str(prompt),
            "reference": by_key[prompt, rules[0]].get("reference"),
            "texts": {
                rule: _tokens(by_key[prompt, rule], texts) for rule in rules if (prompt, rule) in by_key
            },
        }
        for prompt in ids
        if (prompt, rules[0]) in by_key
    ]
    beside = next((rule for rule in REFERENCE_RULES if rule in rules), None)
    chosen = ((run.verdict or {}).get("chosen") or {}).get("label")
    first = (
        chosen if chosen in rules else next((r for r in rules if r not in (beside, "drafter_only")), rules[0])
    )
    return {"prompts": prompts, "rules": rules, "beside": beside, "first": first, "origins": ORIGINS}


def _tokens(row: Mapping[str, Any], texts: Texts) -> list[dict[str, Any]]:
    log = row.get("token_log") or [{}] * len(row["tokens"])
    return [
        {"t": piece, "o": origin, **_detail(entry, texts)}
        for piece, origin, entry in zip(texts.pieces(row["tokens"]), row["origin"], log)
    ]


def _detail(entry: Mapping[str, Any], texts: Texts) -> dict[str, Any]:
    """Short keys, because there are thousands: q, p candidates, g gap, v D_TV, d deferred, x drafted
    token.
    """
    detail: dict[str, Any] = {}
    for key, name in (("q", "drafter_top"), ("p", "verifier_top")):
        if name in entry:
            detail[key] = [
                [texts.one(token), _percent(logprob)] for token, logprob in entry[name][:CANDIDATES]
            ]
    for key, name in (("g", "gap"), ("v", "tv")):
        if entry.get(name) is not None and math.isfinite(entry[name]):
            detail[key] = round(entry[name], 4)
    if "deferred" in entry:
        detail["d"] = entry["deferred"]
    if "drafted" in entry:
        detail["x"] = texts.one(entry["drafted"])
    return detail


def _percent(logprob: float) -> float:
    return round(100 * math.exp(logprob), 1)


def slider_data(run: RunFolder, texts: Texts) -> dict[str, Any] | None:
    """Logged prefixes with gap and D_TV per token; None where the evaluation kept none."""
    if run.prefixes is None:
        return None
    prompts = [
        {
            "id": str(prompt["id"]),
            "tokens": texts.pieces(prompt["tokens"]),
            **{name: prompt[name] for name in ("gap", "tv", "drafter_loss", "observed_gap")},
        }
        for prompt in run.prefixes["prompts"]
    ]
    view = {**{name: value for name, value in run.prefixes.items() if name != "prompts"}, "prompts": prompts}
    chosen = (run.verdict or {}).get("chosen") or {}
    if chosen.get("label") in view["estimators"] and chosen.get("value") is not None:
        start = min(max(chosen["value"], view["alpha"]["low"]), view["alpha"]["high"])
        estimators = sorted(view["estimators"], key=lambda name: name != chosen["label"])
        view |= {"alpha": {**view["alpha"], "start": start}, "estimators": estimators}
    return view
