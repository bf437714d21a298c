"""cascade_generate inside transformers: processors, criteria, ends, several sequences, the Hub folder, refusals."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from decoding.helpers import emitted, generate, pair_of, prompts_for
from decoding.small import LEFT, LLM, ONE, RIGHT, SEQ2SEQ, cascade, letters, made, near, own
from transformers import DynamicCache, LlamaConfig, StaticCache, StoppingCriteria, StoppingCriteriaList

from deferral_train.decoding import cascade_generate, load_pair
from deferral_train.decoding.stopping import (
    ConfidenceStop,
    CumulativeStop,
    EntropyStop,
    ExpectedSpeedStop,
    HeadStop,
)
from deferral_train.errors import InputError
from deferral_train.rules import LearnedRule, make_rule

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "custom_generate"


def greedy(verifier: Any, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    return verifier.generate(**inputs, do_sample=False, **{"max_new_tokens": 16, **options})


@pytest.mark.parametrize("kind", ["t5", "llama"])
@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 12},
        {"suppress_tokens": [5, 6, 7]},
        {"exponential_decay_length_penalty": (3, 1.2)},
        {"num_return_sequences": 1, "bad_words_ids": [[9], [10, 11]]},
        {"eos_token_id": [1, 14, 20]},
    ],
)
def test_processors_see_every_drafted_prefix(kind: str, options: dict[str, Any]) -> None:
    drafter, verifier, _ = pair_of(kind)
    inputs = prompts_for(kind)
    expected = greedy(verifier, inputs, **options)
    assert torch.equal(generate(drafter, verifier, inputs, "lossless", **options).sequences, expected)


def test_constraints_know_their_row() -> None:
    drafter, verifier, _ = pair_of("llama")
    inputs = prompts_for("llama", rows=6)

    def allowed(row: int, ids: torch.Tensor) -> list[int]:
        return [4 + row, 11 + row, 20 + len(ids) % 7]

    expected = greedy(verifier, inputs, prefix_allowed_tokens_fn=allowed)
    options = {"prefix_allowed_tokens_fn": allowed}
    assert torch.equal(generate(drafter, verifier, inputs, "lossless", **options).sequences, expected)


class EndsAfterPair(StoppingCriteria):
    """Ends a row once the sum of its last two tokens is a multiple of five."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return (input_ids[:, -1] + input_ids[:, -2]) % 5 == 0


@pytest.mark.parametrize("kind", ["t5", "mistral"])
def test_no_token_comes_after_a_stopping_criterion(kind: str) -> None:
    drafter, verifier, _ = pair_of(kind, "always")
    inputs = prompts_for(kind)
    expected = greedy(verifier, inputs, stopping_criteria=StoppingCriteriaList([EndsAfterPair()]))
    result = generate(
        drafter, verifier, inputs, "lossless", stopping_criteria=StoppingCriteriaList([EndsAfterPair()])
    )
    assert torch.equal(result.sequences, expected)
    assert int(result.stats.discarded.sum()) > 0


@pytest.mark.parametrize("limit", [1, 2, 5, 6, 7])
def test_the_limit_is_met_exactly(limit: int) -> None:
    drafter, verifier, _ = pair_of("t5", "always")
    inputs = prompts_for("t5")
    result = generate(drafter, verifier, inputs, "lossless", max_new_tokens=limit, min_new_tokens=limit)
    assert result.stats.emitted.tolist() == [limit] * 4


def test_an_end_inside_an_accepted_block() -> None:
    drafter, verifier, _ = pair_of("llama", "always")
    inputs = prompts_for("llama")
    text = emitted(generate(drafter, verifier, inputs, "lossless"), 0)
    end = text[3]
    expected = greedy(verifier, inputs, eos_token_id=end)
    result = generate(drafter, verifier, inputs, "lossless", eos_token_id=end)
    assert torch.equal(result.sequences, expected)
    assert emitted(result, 0) == text[: text.index(end) + 1]


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_several_sequences_per_prompt(kind: str) -> None:
    drafter, verifier, _ = pair_of(kind)
    options = {"do_sample": True, "num_return_sequences": 3, "top_k": 5, "top_p": 0.9, "temperature": 0.7}
    result = generate(
        drafter, verifier, prompts_for(kind), "opt", generator=torch.Generator().manual_seed(0), **options
    )
    assert len(result.sequences) == 12


@pytest.mark.parametrize(
    "stop", [ConfidenceStop(0.5), CumulativeStop(0.3), EntropyStop(0.5), ExpectedSpeedStop(0.2)]
)
def test_a_stop_rule_shortens_drafts_and_changes_no_greedy_text(stop: Any) -> None:
    drafter, verifier, _ = pair_of("llama")
    inputs = prompts_for("llama")
    free = generate(drafter, verifier, inputs, "lossless")
    stopped = generate(drafter, verifier, inputs, "lossless", stop=stop)
    assert torch.equal(free.sequences, stopped.sequences)
    assert int(stopped.stats.drafted.sum()) < int(free.stats.drafted.sum())


class Head:
    """A draft-stage head over hidden states and the block's places."""

    features = ("drafter_hidden", "draft_position", "position")
    stage = "draft"

    def gap(self, summary: Any) -> torch.Tensor:
        return summary["drafter_hidden"].mean(dim=-1) + 0.1 * summary["draft_position"]

    def tv(self, summary: Any) -> torch.Tensor:
        return torch.sigmoid(summary["drafter_hidden"].sum(dim=-1)) * (summary["position"] >= 0)


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
@pytest.mark.parametrize("execution", ["speculative", "token", "lazy"])
def test_heads_read_hidden_states_and_leave_no_hook(kind: str, execution: str) -> None:
    drafter, verifier, _ = pair_of(kind)
    inputs = prompts_for(kind)
    result = generate(drafter, verifier, inputs, LearnedRule(head=Head(), alpha=0.3), execution=execution)
    assert int(result.stats.decided.sum()) > 0
    assert not drafter.get_decoder()._forward_hooks
    if execution == "speculative":
        stop = HeadStop(Head(), alpha=0.1, threshold=0.4)
        assert torch.equal(
            generate(drafter, verifier, inputs, "lossless", stop=stop).sequences, greedy(verifier, inputs)
        )


def test_the_hub_folder() -> None:
    drafter, verifier, _ = pair_of("llama")
    inputs = prompts_for("llama")
    result = verifier.generate(
        **inputs, custom_generate=str(EXAMPLE), trust_remote_code=True, assistant_model=drafter, do_sample=False,
        max_new_tokens=8, rule="opt", rule_parameters={"alpha": 0.1}, return_dict_in_generate=True,
    )  # fmt: skip
    direct = generate(drafter, verifier, inputs, make_rule("opt", alpha=0.1), max_new_tokens=8)
    assert torch.equal(result.sequences, direct.sequences)
    assert result.stats.row(0) == direct.stats.row(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_draft_tokens": 0}, "num_draft_tokens is 0"),
        ({"drafter": None}, "drafter is missing"),
        ({"execution": "eager"}, "execution is 'eager'"),
        ({"execution": "lazy", "rule": "opt"}, "stage"),
        ({"execution": "token", "rule": "token_v3"}, "per position"),
        ({"bonus": "free"}, "bonus is 'free'"),
        ({"max_request_loss": -1.0}, "max_request_loss is -1.0"),
        ({"stop": "early"}, "stop is str"),
        ({"num_beams": 2}, "num_beams is 2"),
        ({"use_cache": False}, "use_cache is False"),
        ({"max_new_tokens": 500}, "context of 128"),
        ({"output_scores": True}, "output_scores"),
        ({"guidance_scale": 2.0}, "UnbatchedClassifierFreeGuidance"),
        ({"rule": "no_such_rule"}, "unknown rule"),
    ],
)
def test_bad_input_is_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    drafter, verifier, _ = pair_of("llama")
    arguments = {"drafter": drafter, "rule": "lossless", "do_sample": False, "max_new_tokens": 8, **options}
    with pytest.raises(InputError, match=message) as error:
        verifier.generate(**prompts_for("llama"), custom_generate=cascade_generate, **arguments)
    assert "\n" not in str(error.value)


def test_unlike_models_caches_and_padding_are_refused() -> None:
    drafter, verifier, _ = pair_of("llama")
    inputs = prompts_for("llama")
    other = pair_of("t5")[0]
    with pytest.raises(InputError, match="encoder-decoder"):
        generate(other, verifier, inputs, "lossless")
    static = StaticCache(config=verifier.config, max_cache_len=64)
    with pytest.raises(InputError, match="StaticCache"):
        generate(drafter, verifier, inputs, "lossless", past_key_values=static)
    filled = DynamicCache()
    filled.update(torch.zeros(4, 1, 2, 16), torch.zeros(4, 1, 2, 16), 0)
    with pytest.raises(InputError, match="filled cache"):
        generate(drafter, verifier, inputs, "lossless", past_key_values=filled)
    right = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"].flip(1)}
    with pytest.raises(InputError, match="padded on the left"):
        generate(drafter, verifier, right, "lossless")


class Streamer:
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("way", ["callable", "folder"])
def test_a_streamer_of_generate_gets_the_text_and_its_end(way: str) -> None:
    drafter, verifier, _ = pair_of("llama")
    inputs = prompts_for("llama", rows=1)
    wanted, found = Streamer(), Streamer()
    expected = greedy(verifier, inputs, streamer=wanted)
    if way == "callable":
        options: dict[str, Any] = {"custom_generate": cascade_generate, "drafter": drafter}
    else:
        options = {"custom_generate": str(EXAMPLE), "trust_remote_code": True, "assistant_model": drafter}
    assert torch.equal(greedy(verifier, inputs, streamer=found, **options), expected)
    assert (found.tokens, found.ended) == (wanted.tokens, wanted.ended) == (expected[0].tolist(), 1)
    with pytest.raises(InputError, match="streamer: streams a single row, not 4"):
        generate(drafter, verifier, prompts_for("llama"), "lossless", streamer=Streamer())


@pytest.mark.parametrize("way", ["call", "configuration", "folder", "partial"])
def test_stop_strings_end_a_text_where_generate_ends_it(way: str) -> None:
    verifier = made(LlamaConfig(**LLM))
    plain = own(verifier, ONE)[0, 7:].tolist()
    word = letters().decode(plain[3:5])
    options: dict[str, Any] = {"tokenizer": letters(), "stop_strings": [word, "zzzz"]}
    expected = own(verifier, ONE, **options)
    assert expected[0, 7:].tolist() == plain[:5]
    drafter = near(verifier)
    if way == "configuration":
        verifier.generation_config.stop_strings = options.pop("stop_strings")
    if way == "folder":
        more = {"custom_generate": str(EXAMPLE), "trust_remote_code": True, "assistant_model": drafter}
        assert torch.equal(own(verifier, ONE, **options, **more), expected)
    elif way == "partial":
        streamer = Streamer()
        call = functools.partial(cascade_generate, drafter=drafter)
        assert torch.equal(own(verifier, ONE, **options, custom_generate=call, streamer=streamer), expected)
        assert streamer.tokens == expected[0].tolist()
    else:
        assert torch.equal(cascade(verifier, ONE, drafter, **options), expected)


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive_search"),
        ({"dola_layers": "low"}, "dola_generation"),
        ({"prompt_lookup_num_tokens": 3}, "assisted_generation"),
    ],
)
def test_another_mode_of_generation_is_refused_and_not_dropped(options: dict[str, Any], mode: str) -> None:
    with pytest.raises(InputError, match=f"generation mode is {mode}"):
        cascade(made(LlamaConfig(**LLM)), ONE, made(LlamaConfig(**LLM)), **options)


def test_an_assistant_beside_a_drafter_is_refused() -> None:
    verifier = made(LlamaConfig(**LLM))
    with pytest.raises(InputError, match="generation mode is assisted_generation"):
        cascade(verifier, ONE, near(verifier), assistant_model=near(verifier))


def test_ids_of_another_integer_type_are_read() -> None:
    verifier, inputs = made(LlamaConfig(**LLM)), {"input_ids": ONE["input_ids"].int()}
    assert torch.equal(cascade(verifier, inputs, near(verifier)), own(verifier, inputs).long())


def test_encoder_states_alone_need_the_drafter_s_ids() -> None:
    verifier = made(transformers.BartConfig(**SEQ2SEQ), transformers.AutoModelForSeq2SeqLM)
    expected = own(verifier, RIGHT)
    states = {"encoder_outputs": verifier.get_encoder()(**RIGHT), "attention_mask": RIGHT["attention_mask"]}
    with pytest.raises(InputError, match="drafter_inputs is missing"):
        cascade(verifier, states, near(verifier))
    assert torch.equal(cascade(verifier, states, near(verifier), drafter_inputs=RIGHT), expected)


def test_what_the_verifier_s_own_configuration_asks_for(t5_pair: Path) -> None:
    pair = load_pair(str(t5_pair / "drafter"), str(t5_pair / "verifier"), "cpu")
    options: dict[str, Any] = {"max_new_tokens": 12, "rule": "lossless"}
    text = pair.generate("a man sees the dog", **options).texts[0]
    word = text.split()[1]
    pair.models.verifier.generation_config.stop_strings = [word]
    pair.models.verifier.generation_config.cache_implementation = "static"
    stopped = pair.generate("a man sees the dog", **options).texts[0]
    assert stopped != text
    assert stopped == text[: text.index(word) + len(word)]


def test_processors_run_before_the_vocabulary_is_cut() -> None:
    """Models that pad their vocabulary, and a processor that names an id beyond the tokenizer's."""
    verifier = made(LlamaConfig(**{**LLM, "vocab_size": 48}))
    banned = [[9], *[[token] for token in range(40, 48)]]
    expected = own(verifier, ONE, bad_words_ids=banned)
    found = cascade(verifier, ONE, near(verifier), vocab_size=40, bad_words_ids=[[45], [9]])
    assert torch.equal(found, expected)
    assert not torch.equal(expected, own(verifier, ONE))


def vision_language(kind: str) -> Any:
    if kind == "gemma3":
        vision = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        config: Any = transformers.Gemma3Config(
            text_config=transformers.Gemma3TextConfig(**LLM, head_dim=16, sliding_window=8).to_dict(),
            vision_config=vision | {"image_size": 28, "patch_size": 14},
            mm_tokens_per_image=1, image_token_id=39, boi_token_id=38, eoi_token_id=37,
        )  # fmt: skip
    else:
        rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
        config = transformers.Qwen2VLConfig(
            text_config={**LLM, "rope_parameters": rope},
            vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 14},
            image_token_id=39, video_token_id=38, vision_start_token_id=37, vision_end_token_id=36,
        )  # fmt: skip
    return made(config, transformers.AutoModelForImageTextToText)


@pytest.mark.parametrize("kind", ["gemma3", "qwen2_vl"])
@pytest.mark.parametrize("inputs", [ONE, LEFT], ids=["one", "ragged"])
def test_vision_language_models_decode_text(kind: str, inputs: dict[str, torch.Tensor]) -> None:
    verifier = vision_language(kind)
    assert torch.equal(cascade(verifier, inputs, near(verifier)), own(verifier, inputs))
