"""Classes of the installed transformers decode as their own ``generate`` does, or are refused with the reason."""

from __future__ import annotations

from collections import Counter

import pytest
from decoding.sweep import candidates, examine

ALWAYS = (
    "AfmoeForCausalLM", "BioGptForCausalLM", "BloomForCausalLM", "CTRLLMHeadModel", "DeepseekV2ForCausalLM",
    "FSMTForConditionalGeneration", "FalconForCausalLM", "GPTJForCausalLM", "PhimoeForCausalLM",
    # Read one token at a time: without a cache, recurrent, indexed, compressed, with columns of their own.
    "CpmAntForCausalLM", "DeepseekV32ForCausalLM", "FalconMambaForCausalLM", "MiniMaxForCausalLM", "MoshiForCausalLM",
    "ProphetNetForConditionalGeneration", "RwkvForCausalLM", "SwitchTransformersForConditionalGeneration",
    "XLNetLMHeadModel", "GitForCausalLM", "JambaForCausalLM", "Qwen3NextForCausalLM",
    "Exaone4_5_ForConditionalGeneration",  # drops the positions that it is given
)  # fmt: skip
REFUSED = {"RecurrentGemmaForCausalLM": "keeps its state in its own modules"}
KNOWN = {name: (kind, config) for name, kind, config in candidates()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in ALWAYS if name in KNOWN])
def test_decodes_as_its_own_generate(name: str) -> None:
    found = examine(name, *KNOWN[name])
    assert found.verdict == "equal", found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in REFUSED if name in KNOWN])
def test_is_refused_with_the_reason(name: str) -> None:
    found = examine(name, *KNOWN[name])
    assert found.verdict == "refused", found
    assert REFUSED[name] in found.reason


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_class_that_can_be_made_tiny() -> None:
    found = [examine(name, kind, config) for name, (kind, config) in KNOWN.items()]
    made = [one for one in found if one.verdict != "unmade"]
    assert len(made) >= 100
    assert [one for one in made if one.verdict in ("different", "error")] == []
    assert Counter(one.verdict for one in made)["equal"] >= 0.9 * len(made)
