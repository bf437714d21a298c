"""Speculative cascades for any model of this repository: ``model.generate(..., custom_generate=<this repository>)``.

transformers hands the raw arguments of ``generate`` to this function; it hands them back with the decoding loop as a
callable, so that inputs, processors and criteria are prepared as always.
"""

from __future__ import annotations

from typing import Any


def generate(model: Any, **arguments: Any) -> Any:
    """Decode with a drafter under a deferral rule.

    Args:
        model: the verifier, given by transformers.
        arguments: those of ``generate``; ``assistant_model`` (or ``drafter``) is the small model. ``rule`` is the
            name of a rule and its ``rule_parameters``, for example ``rule="opt", rule_parameters={"alpha": 0.2}``;
            ``num_draft_tokens``, ``bonus``, ``execution``, ``max_request_loss`` as in ``cascade_generate``.
    """
    from transformers import GenerationMixin

    from deferral_train.decoding import cascade_generate
    from deferral_train.rules import make_rule

    drafter = arguments.pop("drafter", None)
    assistant = arguments.pop("assistant_model", None)
    arguments["drafter"] = drafter if drafter is not None else assistant
    rule = arguments.pop("rule", None) or "lossless"
    parameters = arguments.pop("rule_parameters", None) or {}
    arguments["rule"] = make_rule(rule, **parameters) if isinstance(rule, str) else rule
    for name in ("custom_generate", "trust_remote_code"):
        arguments.pop(name, None)
    return GenerationMixin.generate(model, custom_generate=cascade_generate, **arguments)
