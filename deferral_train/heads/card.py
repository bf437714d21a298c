"""README.md of an exported head, by Hub conventions. Recorded values are escaped: they may be model output."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def escape(value: Any) -> str:
    """One line of text that Markdown and HTML show as it is."""
    text = " ".join(str(value).split())
    for old, new in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "&#124;"), ("`", "&#96;")):
        text = text.replace(old, new)
    for mark in ("[", "]", "*", "_", "!"):
        text = text.replace(mark, "\\" + mark)
    return text


def make_card(config: Mapping[str, Any]) -> str:
    """The card: front matter with model-index, how to load, what the head reads, what is promised."""
    parts = [_front_matter(config), "# Deferral head", _usage(config), _table("What it is", _facts(config))]
    for key, title in (
        ("certificate", "Certificate"),
        ("evaluation", "Evaluation"),
        ("cost", "Cost"),
        ("pair", "Pair"),
        ("training", "Training"),
    ):
        shown = _flatten(
            {name: value for name, value in (config.get(key) or {}).items() if name != "expected"}
        )
        if shown:
            parts.append(_table(title, shown))
    if expected := (config.get("evaluation") or {}).get("expected"):
        parts.append(_expectation(expected))
    return "\n\n".join(parts) + "\n"


def _front_matter(config: Mapping[str, Any]) -> str:
    """YAML as JSON values (JSON is YAML), so that no recorded text can break out of its string."""
    lines = ["---", "library_name: deferral-train", "tags: [deferral, speculative-decoding, lossy]"]
    metrics = (config.get("evaluation") or {}).get("metrics") or {}
    numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float)}
    if numbers:
        data = str((config.get("evaluation") or {}).get("dataset", "traces"))
        result = {
            "task": {"type": "text-generation"},
            "dataset": {"type": data, "name": data},
            "metrics": [{"type": name, "value": value} for name, value in numbers.items()],
        }
        name = f"{config['deferral_head_type']}-head"
        lines.append("model-index: " + json.dumps([{"name": name, "results": [result]}]))
    return "\n".join([*lines, "---"])


def _usage(config: Mapping[str, Any]) -> str:
    dial = "threshold" if config["deferral_head_type"] == "judge" else "alpha"
    value = config.get(dial)
    point = (
        f"The chosen operating point is {dial} = {value}."
        if value is not None
        else f"No {dial} was chosen; give one."
    )
    return (
        f"{_purpose(config)} {point}\n\n"
        "```python\nfrom deferral_train import DeferralHead\n\n"
        'head = DeferralHead.from_pretrained("path/to/this/folder")\n```'
    )


def _purpose(config: Mapping[str, Any]) -> str:
    if config["deferral_head_type"] == "judge" and config.get("stage") == "draft":
        return "Predicts, at each drafted token, whether the verifier will accept it: says when to stop drafting."
    return (
        "Decides, at each drafted token, whether to defer to the verifier. **Lossy**: output may differ "
        "from the verifier's own."
    )


def _facts(config: Mapping[str, Any]) -> dict[str, Any]:
    keys = (
        "deferral_head_type",
        "stage",
        "loss",
        "body",
        "hidden",
        "recalibration",
        "schema_hash",
        "alpha",
        "threshold",
        "lossy",
    )
    facts = {key: config.get(key) for key in keys}
    return {**facts, "features": ", ".join(config.get("features", ()))}


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix or "value": value}
    rows: dict[str, Any] = {}
    for key, inner in value.items():
        rows.update(_flatten(inner, f"{prefix}.{key}" if prefix else str(key)))
    return rows


def _expectation(expected: Mapping[str, Any]) -> str:
    """Expected numbers, at the stored setting and over the dial."""
    facts = {name: value for name, value in expected.items() if name not in ("curve", "weights")}
    columns = list(dict.fromkeys(name for point in expected.get("curve", ()) for name in point))
    head = [f"| {' | '.join(map(escape, columns))} |", "|" + "---|" * len(columns)]
    rows = [
        "| "
        + " | ".join(escape("lossless" if point.get(name) is None else point[name]) for name in columns)
        + " |"
        for point in expected.get("curve", ())
    ]
    return "\n".join([_table("What to expect", _flatten(facts)), "", *head, *rows])


def _table(title: str, rows: Mapping[str, Any]) -> str:
    body = "\n".join(f"| {escape(key)} | {escape(value)} |" for key, value in rows.items())
    return f"## {title}\n\n| | |\n|---|---|\n{body}"
