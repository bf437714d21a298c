"""Learned deferral between a small drafter and a large verifier language model.

Importing this package is light: every public name is loaded on first use, so that a served head needs
neither transformers nor Lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deferral_train.errors import names_on_first_use

__version__ = "0.2.0"

_HOME = {
    "load_pair": "decoding",
    "cascade_generate": "decoding",
    "make_rule": "rules",
    "DeferralHead": "heads",
    "open_traces": "traces",
    "score_rules": "evaluation",
    "InputError": "errors",
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


__getattr__ = names_on_first_use(__name__, _HOME)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
