"""The section on breakdowns: the tables of ``evaluation/breakdowns.json`` as cells of text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deferral_train.report.load import RunFolder
from deferral_train.report.numbers import cell


def breakdowns(run: RunFolder) -> dict[str, Any] | None:
    """One entry per table: title, heads, rows; None where none was made."""
    if run.breakdowns is None or not run.breakdowns["tables"]:
        return None
    return {"meta": run.breakdowns["meta"], "tables": [_table(table) for table in run.breakdowns["tables"]]}


def _table(table: Mapping[str, Any]) -> dict[str, Any]:
    names = list(dict.fromkeys(name for row in table["rows"] for name in row["numbers"]))
    with_rule = any(row["rule"] for row in table["rows"])
    heads = [table["by"], *(["rule"] if with_rule else []), "prompts", "tokens", *names]
    rows = [
        {
            "words": [row["group"], *([row["rule"] or "–"] if with_rule else [])],
            "counts": [str(row["prompts"]), f"{row['tokens']:.0f}"],
            "cells": [cell(row["numbers"].get(name)) for name in names],
        }
        for row in table["rows"]
    ]
    return {"title": table["title"], "note": table["note"], "heads": heads, "rows": rows}
