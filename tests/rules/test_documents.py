"""docs/equations.md names what exists and all that exists (docs/catalogue.md: test_distributions.py)."""

from __future__ import annotations

import importlib.util
import inspect
import re
from pathlib import Path

from deferral_train.rules import RULES

DOCS = Path(__file__).resolve().parents[2] / "docs"
PACKAGES = ("rules", "decoding.drafting")
# Modules whose public functions compute an equation each.
OF_EQUATIONS = ("emission", "floors", "risks", "offline")


def named() -> set[str]:
    text = (DOCS / "equations.md").read_text()
    return set(re.findall(r"`([a-z_0-9]+\.[A-Za-z_0-9]+)`", text)) - {
        f"deferral_train.{one}" for one in PACKAGES
    }


def resolve(name: str):
    module, _, attribute = name.partition(".")
    package = next(one for one in PACKAGES if importlib.util.find_spec(f"deferral_train.{one}.{module}"))
    return getattr(importlib.import_module(f"deferral_train.{package}.{module}"), attribute)


def test_every_function_named_exists():
    assert len(named()) > 50
    for name in named():
        assert callable(resolve(name)), name


def test_every_public_function_with_an_equation_is_named():
    for module in OF_EQUATIONS:
        loaded = importlib.import_module(f"deferral_train.rules.{module}")
        for name, value in vars(loaded).items():
            if inspect.isfunction(value) and value.__module__ == loaded.__name__ and not name.startswith("_"):
                assert f"{module}.{name}" in named(), f"{module}.{name} is missing from docs/equations.md"


def test_every_rule_is_named():
    classes = {resolve(name) for name in named()}
    assert set(RULES.values()) <= classes
