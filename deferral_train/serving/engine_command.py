"""Shell command that serves a pair with a rule in vLLM, or the reason why the plug-in cannot.

Checked with what the engine's start checks, as far as that needs no engine. Imports no vLLM.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from deferral_train.errors import InputError
from deferral_train.serving.checks import check_served
from deferral_train.serving.config import KEY, ServingConfig


def engine_line(
    chosen: Mapping[str, Any], drafter: str, verifier: str, is_encoder_decoder: bool
) -> tuple[str | None, str | None]:
    """The ``vllm serve`` command and None, or None and the reason why there is none.

    Args:
        chosen: ``rule`` and ``spec``, ``num_draft_tokens``, and for a learned rule ``head`` (folder) and ``value``
            (alpha).
        drafter, verifier: names or folders, as they were loaded.
        is_encoder_decoder: True where the pair is one; the plug-in refuses it.
    """
    if is_encoder_decoder:
        return None, "the pair is an encoder-decoder, and the plug-in serves decoder-only pairs"
    speculative = {
        "model": drafter,
        "method": "draft_model",
        "num_speculative_tokens": chosen["num_draft_tokens"],
        "draft_sample_method": "probabilistic",
    }
    deferral = {"rule": chosen["spec"]}
    if chosen["rule"] == "learned":
        deferral = {"head": chosen["head"], "alpha": chosen["value"]}
    try:
        config = ServingConfig.parse(deferral)
        check_served(config.make_rule(), SimpleNamespace(**speculative))
    except InputError as error:
        return None, str(error).removeprefix("deferral: ")
    lines = (
        f"vllm serve {shlex.quote(verifier)}",
        f"--speculative-config {shlex.quote(json.dumps(speculative))}",
        f"--additional-config {shlex.quote(json.dumps({KEY: deferral}))}",
    )
    return " \\\n  ".join(lines), None
