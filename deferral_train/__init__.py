"""Learned deferral between a small drafter and a large verifier language model.

Importing this package is light: every public name is loaded on first use, so that a served head needs
neither transformers nor Lightning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "load_pair": "deferral_train.decoding",
    "cascade_generate": "deferral_train.decoding",
    "make_rule": "deferral_train.rules",
    "DeferralHead": "deferral_train.heads",
    "open_traces": "deferral_train.traces",
    "score_rules": "deferral_train.evaluation",
    "InputError": "deferral_train.errors",
}

__all__ = [
    "DeferralHead",
    "InputError",
    "cascade_generate",
    "load_pair",
    "make_rule",
    "open_traces",
    "score_rules",
]

if TYPE_CHECKING:
    from deferral_train.decoding import cascade_generate, load_pair
    from deferral_train.errors import InputError
    from deferral_train.evaluation import score_rules
    from deferral_train.heads import DeferralHead
    from deferral_train.rules import make_rule
    from deferral_train.traces import open_traces


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'deferral_train' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_HOME[name]), name)
    except ModuleNotFoundError as error:
        from deferral_train.errors import missing_extra

        raise missing_extra(error) from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
