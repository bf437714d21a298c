"""Random greedy calls: lossless decoding gives the verifier's own text, or is refused in one line.

    PYTHONPATH=.:tests python -m fuzz.decoding --seconds 600 [--seed 0] [--only llama t5] [--out runs/fuzz-decoding]
    PYTHONPATH=.:tests python -m fuzz.decoding --case 17        # the case of seed 17, shortened while it still fails

A case is drawn from its seed: an architecture with weights of its own, a batch of prompts with padding, generation
settings, logits processors and stopping criteria that transformers ships (or of the caller's own) in pairs, ends, an
execution, a drafter or a cascade, and a rule that is lossless there. It is called once through the verifier's own
`generate` and once through `cascade_generate`. A text that differs, an exception that is no InputError, or counts that
do not add up are findings. Where two tokens of the verifier's own pass lie within ``TIE`` of each other, a difference
is counted as a tie, with its gap. Exit code 1 where there is a finding.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers as tf
from decoding.small import LLM, SEQ2SEQ, letters, made, near
from transformers.generation import logits_process as hf
from transformers.generation import stopping_criteria as hf_stop

from deferral_train import cascade_generate
from deferral_train.decoding.drafting import DraftCascade, GivenDraft
from deferral_train.decoding.drafting.max_gram import MaxGram
from deferral_train.decoding.drafting.plan import Plan
from deferral_train.decoding.stopping import ConfidenceStop, CumulativeStop, EntropyStop, ExpectedSpeedStop
from deferral_train.errors import InputError
from deferral_train.rules import RULES, make_rule

TIE = 1e-5  # of the larger of two scores (at least 1): float32 sums in another order differ by as much
VOCAB = 40
_LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "partial_rotary_factor": 1.0}
_HEADS = {"num_hidden_layers": 2, "num_attention_heads": 2}
_SLIDING = {**LLM, "sliding_window": 6, "head_dim": 16}
_ALTERNATING = {**_SLIDING, "layer_types": ["sliding_attention", "full_attention"]}

_IDS = {"vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
_T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
_T5 |= {
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "decoder_start_token_id": 0,
}
_PHI3 = {**_LONG, "long_factor": [4.0 + n for n in range(8)], "original_max_position_embeddings": 14}
_ROUTED = {"num_local_experts": 4, "num_experts_per_tok": 2}

ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaConfig(**LLM),
    "llama_dynamic_rope": lambda: tf.LlamaConfig(
        **{**LLM, "max_position_embeddings": 16},
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    ),
    "llama_yarn": lambda: tf.LlamaConfig(
        **LLM,
        rope_parameters={
            **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
        },
    ),
    "qwen3": lambda: tf.Qwen3Config(**LLM),
    "mistral": lambda: tf.MistralConfig(**_SLIDING),
    "gemma2": lambda: tf.Gemma2Config(query_pre_attn_scalar=16, **_ALTERNATING),
    "gemma3": lambda: tf.Gemma3TextConfig(query_pre_attn_scalar=16, **_ALTERNATING),
    "gpt_oss": lambda: tf.GptOssConfig(
        **_ALTERNATING, **_ROUTED, rope_parameters={"rope_type": "default", "rope_theta": 1e4}
    ),
    "mixtral": lambda: tf.MixtralConfig(**LLM, **_ROUTED),
    "phi3_longrope": lambda: tf.Phi3Config(**LLM, original_max_position_embeddings=14, rope_parameters=_PHI3),
    "gpt2": lambda: tf.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=128, **_IDS),
    "opt": lambda: tf.OPTConfig(**LLM, ffn_dim=64, word_embed_proj_dim=32),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**LLM),
    "falcon": lambda: tf.FalconConfig(**LLM),
    "bloom": lambda: tf.BloomConfig(hidden_size=32, n_layer=2, n_head=2, **_IDS),
    "mpt": lambda: tf.MptConfig(
        d_model=32, n_layers=2, n_heads=2, max_seq_len=128, expansion_ratio=2, **_IDS
    ),
    "roberta": lambda: tf.RobertaConfig(
        is_decoder=True, hidden_size=32, intermediate_size=64, max_position_embeddings=128, **_HEADS, **_IDS
    ),
    # Read one token at a time: recurrent, hybrid, without a cache.
    "mamba": lambda: tf.MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, **_IDS),
    "minimax": lambda: tf.MiniMaxConfig(
        **LLM, layer_types=["linear_attention", "full_attention"], head_dim=16, **_ROUTED
    ),
    "openai_gpt": lambda: tf.OpenAIGPTConfig(n_embd=32, n_layer=2, n_head=2, n_positions=128, **_IDS),
    "t5": lambda: tf.T5Config(
        **_T5, vocab_size=VOCAB, pad_token_id=0, eos_token_id=1, tie_word_embeddings=False
    ),
    "bart": lambda: tf.BartConfig(**SEQ2SEQ),
    "marian": lambda: tf.MarianConfig(**SEQ2SEQ),
    "m2m100": lambda: tf.M2M100Config(**SEQ2SEQ),
    "pegasus": lambda: tf.PegasusConfig(**SEQ2SEQ),
}
ENCODERS = ("t5", "bart", "marian", "m2m100", "pegasus")


@lru_cache(maxsize=512)
def model_of(name: str, seed: int, drafter: str = "") -> Any:
    """A verifier of an architecture, or a drafter beside it: ``near``, ``far``, ``same``, ``small``."""
    auto = tf.AutoModelForSeq2SeqLM if name in ENCODERS else tf.AutoModelForCausalLM
    if drafter == "near":
        return near(model_of(name, seed))
    if drafter == "same":
        return model_of(name, seed)
    config = ARCHITECTURES[name]()
    if drafter == "small":
        return _weighted(made(tf.LlamaConfig(**{**LLM, "num_hidden_layers": 1})), seed + 7)
    return _weighted(made(config, auto), seed + 50 * (drafter == "far"))


def _weighted(model: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    return model


def _stop_strings(random: Random) -> list[str]:
    return [
        "".join(chr(ord("a") + random.randrange(26)) for _ in range(random.choice((1, 1, 2))))
        for _ in range(3)
    ]


class OddSum(hf.LogitsProcessor):
    """A caller's own processor: what it bans depends on the row's last tokens and its length."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        banned = (input_ids[:, -1] * 3 + input_ids.shape[1]) % (VOCAB - 4) + 4
        return scores.scatter(1, banned[:, None], -float("inf"))


class EndsAfterPair(hf_stop.StoppingCriteria):
    """A caller's own criterion: ends a row once its last two tokens add up to a multiple of seven."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return (input_ids[:, -1] + input_ids[:, -2:].sum(dim=1)) % 7 == 0


def allowed_tokens(row: int, ids: torch.Tensor) -> list[int]:
    """For ``prefix_allowed_tokens_fn``: a few tokens by row, length and last token."""
    base = int(ids[-1]) + len(ids)
    return [1, 4 + (base + row) % 36, 4 + (base * 5 + 3) % 36, 4 + (base * 7 + 11) % 36]


def _tokens(random: Random, most: int = 4) -> list[int]:
    return [random.randrange(1, VOCAB) for _ in range(random.randint(1, most))]


def _words(random: Random) -> list[list[int]]:
    return [_tokens(random, 3) for _ in range(random.randint(1, 6))]


# Generation settings by name, each drawn by its function.
SETTINGS: dict[str, Callable[[Random], dict[str, Any]]] = {
    "repetition_penalty": lambda r: {"repetition_penalty": r.choice((0.7, 1.2, 1.8, 5.0))},
    "encoder_repetition_penalty": lambda r: {"encoder_repetition_penalty": r.choice((0.6, 1.5, 3.0))},
    "no_repeat_ngram_size": lambda r: {"no_repeat_ngram_size": r.randint(1, 4)},
    "encoder_no_repeat_ngram_size": lambda r: {"encoder_no_repeat_ngram_size": r.randint(1, 3)},
    "bad_words_ids": lambda r: {"bad_words_ids": _words(r)},
    "sequence_bias": lambda r: {
        "sequence_bias": [[list(word), r.choice((-20.0, -2.0, 3.0, 15.0))] for word in {tuple(w) for w in _words(r)}]
    },
    "min_length": lambda r: {"min_length": r.randint(1, 20)},
    "min_new_tokens": lambda r: {"min_new_tokens": r.randint(1, 12)},
    "forced_bos_token_id": lambda r: {"forced_bos_token_id": r.randrange(2, VOCAB)},
    "forced_eos_token_id": lambda r: {"forced_eos_token_id": r.choice((1, [1], [5, 1], 7))},
    "suppress_tokens": lambda r: {"suppress_tokens": _tokens(r, 12)},
    "begin_suppress_tokens": lambda r: {"begin_suppress_tokens": _tokens(r, 12)},
    "exponential_decay": lambda r: {"exponential_decay_length_penalty": (r.randint(0, 8), r.choice((0.8, 1.05, 1.5)))},
    "renormalize_logits": lambda r: {"renormalize_logits": True},
    "remove_invalid_values": lambda r: {"remove_invalid_values": True},
    "watermark": lambda r: {
        "watermarking_config": {
            "greenlist_ratio": 0.5, "bias": r.choice((1.0, 4.0)), "seeding_scheme": r.choice(("lefthash", "selfhash")),
            "context_width": r.randint(1, 3), "hashing_key": 15485863,
        }
    },
    "guidance_scale": lambda r: {"guidance_scale": 1.5},
    "allowed_tokens": lambda r: {"prefix_allowed_tokens_fn": allowed_tokens},
    "warpers_unread": lambda r: {"temperature": 0.3, "top_k": 2, "top_p": 0.5},
    "outputs": lambda r: {r.choice(("output_scores", "output_logits", "output_hidden_states")): True},
    "cache": lambda r: r.choice(({"cache_implementation": r.choice(("static", "dynamic"))}, {"use_cache": False})),
    "beams": lambda r: {"num_beams": 2},
    "low_memory": lambda r: {"prefill_chunk_size": r.randint(1, 4)},
    "stop_strings": lambda r: {"stop_strings": _stop_strings(r)},
    "token_healing": lambda r: {"token_healing": False, "use_mtp": False},
}  # fmt: skip
# Processors handed over as objects: made anew for every call.
PROCESSORS: dict[str, Callable[[Random], Callable[[], Any]]] = {
    "OddSum": lambda r: OddSum,
    "SuppressTokens": lambda r: _made(hf.SuppressTokensLogitsProcessor, _tokens(r, 20)),
    "TopK": lambda r: _made(hf.TopKLogitsWarper, r.randint(1, 5)),
    "TopP": lambda r: _made(hf.TopPLogitsWarper, r.choice((0.2, 0.8))),
    "TopH": lambda r: _made(hf.TopHLogitsWarper, r.choice((0.2, 0.8))),
    "MinP": lambda r: _made(hf.MinPLogitsWarper, r.choice((0.1, 0.9))),
    "Typical": lambda r: _made(hf.TypicalLogitsWarper, r.choice((0.2, 0.9))),
    "Epsilon": lambda r: _made(hf.EpsilonLogitsWarper, r.choice((0.01, 0.2))),
    "Eta": lambda r: _made(hf.EtaLogitsWarper, r.choice((0.01, 0.2))),
    "Temperature": lambda r: _made(hf.TemperatureLogitsWarper, r.choice((0.2, 3.0))),
    "SequenceBias": lambda r: _made(hf.SequenceBiasLogitsProcessor, {(r.randrange(VOCAB),): 6.0}),
    "Normalization": lambda r: hf.LogitNormalization,
    "Repetition": lambda r: _made(hf.RepetitionPenaltyLogitsProcessor, r.choice((0.6, 1.6))),
    "Synthid": lambda r: _made(hf.SynthIDTextWatermarkLogitsProcessor, 3, [1, 2], 1000, 5, "cpu"),
    "Alternating": lambda r: _made(hf.AlternatingCodebooksLogitsProcessor, 3, 18, 18),
}  # fmt: skip
CRITERIA: dict[str, Callable[[Random], Callable[[], Any]]] = {
    "EndsAfterPair": lambda r: EndsAfterPair,
    "StopString": lambda r: _made(hf_stop.StopStringCriteria, letters(), _stop_strings(r)),
    "MaxLength": lambda r: _made(hf_stop.MaxLengthCriteria, r.randint(8, 24)),
    "Eos": lambda r: _made(hf_stop.EosTokenCriteria, _tokens(r, 5)),
}  # fmt: skip
RARE = (
    "guidance_scale",
    "outputs",
    "cache",
    "beams",
    "Synthid",
    "low_memory",
)  # refused, or void, nearly always
# Settings that a call cannot take from a model's own generation_config, or that are functions.
NOT_INHERITED = ("allowed_tokens", "token_healing", "warpers_unread", "low_memory")


def _made(kind: Any, *arguments: Any) -> Callable[[], Any]:
    return lambda: kind(*(one if one is letters() else copy.deepcopy(one) for one in arguments))


@dataclass(frozen=True)
class Case:
    """One drawn call.

    Attributes:
        settings, processors, criteria: by name, as drawn; left out one by one when a finding is shortened.
        inherited: whether settings stand in the verifier's own generation_config instead of the call.
        ends: ids that end a row, and the padding id.
        drafting: what drafts, in words.
    """

    seed: int
    architecture: str
    weights: int
    prompts: tuple[tuple[int, ...], ...]
    settings: dict[str, dict[str, Any]]
    processors: dict[str, Callable[[], Any]]
    criteria: dict[str, Callable[[], Any]]
    inherited: bool
    ends: dict[str, Any]
    limit: dict[str, int]
    drafting: dict[str, Any]
    mask: bool = True

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """Ids and mask, padded as the architecture wants it."""
        width, pad = max(map(len, self.prompts)), self.ends["pad_token_id"]
        right = self.architecture in ENCODERS
        ids = [
            [*row, *[pad] * (width - len(row))] if right else [*[pad] * (width - len(row)), *row]
            for row in self.prompts
        ]
        ones = [[1] * len(row) for row in self.prompts]
        mask = [
            [*one, *[0] * (width - len(one))] if right else [*[0] * (width - len(one)), *one] for one in ones
        ]
        given = {"input_ids": torch.tensor(ids)}
        return given | ({"attention_mask": torch.tensor(mask)} if self.mask else {})

    def described(self) -> dict[str, Any]:
        """The case in plain values."""
        return {
            "architecture": self.architecture, "weights": self.weights, "prompts": [list(row) for row in self.prompts],
            "settings": {key: value for one in self.settings.values() for key, value in one.items()},
            "inherited": self.inherited, "processors": list(self.processors), "criteria": list(self.criteria),
            **self.ends, **self.limit, "drafting": self.drafting, "mask": self.mask,
        }  # fmt: skip


def draw(seed: int, only: Sequence[str] = ()) -> Case:
    """The case of a seed."""
    r = Random(seed)
    architecture = r.choice(list(only or ARCHITECTURES))
    rows = r.choice((1, 1, 2, 3, 4))
    ragged = r.random() < 0.6
    width = r.randint(1, 10)
    lengths = [r.randint(1, width) if ragged else width for _ in range(rows)]
    few = r.random() < 0.5  # few different tokens: texts repeat and n-grams match
    prompts = tuple(tuple(r.randrange(4, 9 if few else VOCAB) for _ in range(length)) for length in lengths)
    names = _some(r, SETTINGS, r.choice((0, 1, 2, 2, 2, 3)))
    ends = {
        "eos_token_id": r.choice((1, 1, [1, 14], [1, 5, 9, 22, 30], None)),
        "pad_token_id": r.choice((0, 0, 1, 3)),
    }
    limit = {"max_new_tokens": r.choice((1, 2, 6, 12, 20))}
    if r.random() < 0.1:
        limit = {"max_length": (1 if architecture in ENCODERS else width) + limit["max_new_tokens"]}
    return Case(
        seed, architecture, r.randrange(3), prompts,
        {name: SETTINGS[name](r) for name in names},
        {name: PROCESSORS[name](r) for name in _some(r, PROCESSORS, r.choice((0, 0, 0, 1, 2)))},
        {name: CRITERIA[name](r) for name in r.sample(list(CRITERIA), r.choice((0, 0, 1, 2)))},
        r.random() < 0.3, ends, limit, _drafting(r, architecture, rows), mask=ragged or r.random() < 0.5,
    )  # fmt: skip


def _some(r: Random, names: dict[str, Any], count: int) -> list[str]:
    return [name for name in r.sample(list(names), count) if name not in RARE or r.random() < 0.2]


def _drafting(r: Random, architecture: str, rows: int) -> dict[str, Any]:
    execution = r.choice(("speculative",) * 5 + ("token", "lazy", "sequence"))
    kinds = ["near", "near", "far", "same"] + ([] if architecture in ENCODERS else ["small"])
    drafting: dict[str, Any] = {
        "execution": execution,
        "drafter": r.choice(kinds),
        "num_draft_tokens": r.randint(1, 9),
    }
    drafting["bonus"] = r.choice(("verifier", "verifier", "exact"))
    if execution in ("lazy", "sequence"):
        drafting["rule"] = r.choice((("chow", 0.0), ("chow_log", 0.0)))
        return drafting
    drafting["rule"] = r.choice(RULE_ENDS if execution == "speculative" else POSITION_ENDS)
    if execution == "speculative":
        drafting["plan"] = r.choice((None,) * 4 + (*PLANS, "given"))
        if drafting["plan"] is None or r.random() < 0.05:
            drafting["stop"] = r.choice((None, None, None, "confidence", "cumulative", "entropy", "speed"))
        drafting["max_request_loss"] = r.choice((None,) * 6 + (0.0,))
    return drafting


def _rule_ends() -> list[tuple[str, Any]]:
    """Rules with the value of their dial at which greedy text is the verifier's (None: the default)."""
    found: list[tuple[str, Any]] = [("opt", -1.5), ("opt_log", -1e6)]
    for name, rule in RULES.items():
        if name in ("judge", "learned", "csd"):
            continue
        if getattr(rule, "lossless_when_greedy", False):
            found.append((name, None))
        if name in ("lossless", "verifier_only"):
            found.append((name, None))
        elif rule.dial is not None and rule.dial.lossless is not None:
            found.append((name, rule.dial.lossless))
    return found


RULE_ENDS = _rule_ends()
POSITION_ENDS = [("lossless", None), ("chow", 0.0), ("diff", -1.0), ("opt_verifier", -1.0), ("bild", 0.0)]
PLANS: dict[str, tuple[list[list[int]], int]] = {  # k, and how many drafters
    "max_gram": ([[5]], 0),
    "vertical": ([[3, 0], [0, 6]], 1),
    "horizontal": ([[2, 5], [0, 0]], 1),
    "both": ([[2, 3], [0, 4]], 1),
    "two": ([[2, 1, 3], [0, 2, 4], [0, 0, 3]], 2),
}
STOPS = {
    "confidence": lambda: ConfidenceStop(0.5),
    "cumulative": lambda: CumulativeStop(0.3),
    "entropy": lambda: EntropyStop(0.5),
    "speed": lambda: ExpectedSpeedStop(0.2),
}


def _cascade_options(case: Case) -> dict[str, Any]:
    drafting, name = case.drafting, case.architecture
    rule, value = drafting["rule"]
    made_rule = make_rule(rule) if value is None else make_rule(rule).with_dial(value)
    drafter: Any = model_of(name, case.weights, drafting["drafter"])
    plan = drafting.get("plan")
    if plan == "given":
        r = Random(case.seed + 1)
        drafter = GivenDraft([[r.randrange(2, VOCAB) for _ in range(r.randint(0, 8))] for _ in case.prompts])
    elif plan is not None:
        k, drafters = PLANS[plan]
        drafter = DraftCascade(
            [drafter, model_of(name, case.weights, "far")][:drafters]
            if drafting["drafter"] != "small"
            else [drafter] * drafters,
            Plan(k, max_gram=MaxGram()),
        )
    stop = drafting.get("stop")
    return {
        "custom_generate": cascade_generate, "drafter": drafter, "rule": made_rule, "execution": drafting["execution"],
        "num_draft_tokens": drafting["num_draft_tokens"], "bonus": drafting["bonus"],
        "stop": None if stop is None else STOPS[stop](), "max_request_loss": drafting.get("max_request_loss"),
    }  # fmt: skip


def _call(case: Case, **more: Any) -> Any:
    """One call of the verifier's generate with what the case asks."""
    model = model_of(case.architecture, case.weights)
    options: dict[str, Any] = {"do_sample": False, **case.ends, **case.limit, **more}
    own = copy.deepcopy(model.generation_config)
    try:
        for name, given in case.settings.items():
            if case.inherited and name not in NOT_INHERITED:
                for key, value in given.items():
                    setattr(model.generation_config, key, copy.deepcopy(value))
            else:
                options |= copy.deepcopy(given)
        if "stop_strings" in case.settings:
            options["tokenizer"] = letters()
        if case.processors:
            options["logits_processor"] = hf.LogitsProcessorList(
                [make() for make in case.processors.values()]
            )
        if case.criteria:
            options["stopping_criteria"] = hf_stop.StoppingCriteriaList(
                [make() for make in case.criteria.values()]
            )
        return model.generate(**case.inputs, **options)
    finally:
        model.generation_config = own


@dataclass(frozen=True)
class Verdict:
    """How a case came out.

    ``equal``, ``refused``, ``tie``, ``void`` (the verifier's own generate refuses), ``different`` or ``error``.

    Attributes:
        text: why, in a line.
    """

    kind: str
    text: str = ""

    @property
    def found(self) -> bool:
        """True for a finding."""
        return self.kind in ("different", "error")


def judge(case: Case) -> Verdict:
    """Call both ways and compare."""
    try:
        expected = _sequences(_call(case))
    except Exception as error:
        return Verdict("void", _line(error))
    try:
        output = _call(case, return_dict_in_generate=True, **_cascade_options(case))
    except InputError as error:
        lines = str(error).splitlines()
        return Verdict("refused" if len(lines) == 1 else "error", str(error)[:200])
    except Exception as error:
        return Verdict("error", f"{_line(error)} at {_where(error)}")
    if wrong := _miscounted(output.stats):
        return Verdict("error", wrong)
    if torch.equal(output.sequences, expected):
        return Verdict("equal")
    return _compared(case, expected, output.sequences)


def _sequences(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.sequences


def _miscounted(stats: Any) -> str | None:
    parts = stats.kept + stats.accepted + stats.unverified + stats.rejected + stats.discarded
    if not torch.equal(stats.drafted, parts):
        return f"drafted {stats.drafted.tolist()} but its parts add up to {parts.tolist()}"
    emitted = stats.kept + stats.accepted + stats.unverified + stats.resampled + stats.bonus
    if not torch.equal(stats.emitted, emitted):
        return f"emitted {stats.emitted.tolist()} but its parts add up to {emitted.tolist()}"
    return None


def _compared(case: Case, expected: torch.Tensor, found: torch.Tensor) -> Verdict:
    """A difference, or a tie of the verifier's own scores at the first differing token of every differing row."""
    width = max(expected.shape[1], found.shape[1])
    pad = torch.nn.functional.pad
    both = [pad(one, (0, width - one.shape[1]), value=-1) for one in (expected, found)]
    scores = _call(case, return_dict_in_generate=True, output_scores=True).scores
    begin = expected.shape[1] - len(scores)
    gaps = []
    for row in range(len(expected)):
        places = (both[0][row] != both[1][row]).nonzero()
        if not len(places):
            continue
        place = int(places[0])
        theirs, ours = int(both[0][row, place]), int(both[1][row, place])
        text = f"row {row} token {place - begin}: own {theirs}, ours {ours}"
        if not 0 <= place - begin < len(scores) or min(theirs, ours) < 0:
            return Verdict("different", text)
        first, second = (float(scores[place - begin][row, token]) for token in (theirs, ours))
        gap = abs(first - second) / max(1.0, abs(first))
        if not gap <= TIE:
            return Verdict("different", f"{text}, scores {first:.6g} and {second:.6g}")
        gaps.append(gap)
    return Verdict("tie", f"gaps {gaps}")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def _where(error: Exception) -> str:
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if "deferral_train" in f.filename and "tests" not in f.filename
    ]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "elsewhere"


def shortened(case: Case) -> Case:
    """The case with everything left out that it fails without."""

    def smaller(one: Case) -> list[Case]:
        found = [
            replace(one, **{part: {k: v for k, v in getattr(one, part).items() if k != name}})
            for part in ("settings", "processors", "criteria")
            for name in getattr(one, part)
        ]
        if len(one.prompts) > 1:
            found += [
                replace(one, prompts=one.prompts[:at] + one.prompts[at + 1 :])
                for at in range(len(one.prompts))
            ]
        plain = {
            "execution": "speculative",
            "rule": ("lossless", None),
            "stop": None,
            "plan": None,
            "bonus": "verifier",
            "max_request_loss": None,
            "drafter": "near",
            "num_draft_tokens": 2,
        }
        found += [
            replace(one, drafting={**one.drafting, key: value})
            for key, value in plain.items()
            if one.drafting.get(key) != value
        ]
        if one.inherited:
            found.append(replace(one, inherited=False))
        return found

    again = True
    while again:
        again = False
        for less in smaller(case):
            if judge(less).found:
                case, again = less, True
                break
    return case


def run(seconds: float, seed: int, only: Sequence[str] = (), out: Path | None = None) -> dict[str, Any]:
    """Try seeds from ``seed`` on for so many seconds; counts by verdict, refusals by reason, findings."""
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    findings: dict[str, int] = {}
    begun, first = time.monotonic(), seed
    while time.monotonic() - begun < seconds:
        case = draw(seed, only)
        verdict = judge(case)
        counts[verdict.kind] += 1
        if verdict.kind in ("refused", "void", "tie"):
            reasons[f"{verdict.kind}: {verdict.text[:90]}"] += 1
        if verdict.found:
            findings[f"seed {seed}: {verdict.kind}: {verdict.text}"] = seed
            print(
                f"FINDING seed {seed}: {verdict.kind}: {verdict.text}\n    {json.dumps(case.described(), default=str)}",
                flush=True,
            )
        seed += 1
    summary = {
        "seconds": round(time.monotonic() - begun), "first_seed": first, "cases": seed - first, **counts,
        "findings": list(findings), "reasons": dict(reasons.most_common()),
    }  # fmt: skip
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0, help="the first; every case takes the next")
    parser.add_argument("--only", nargs="+", default=[], choices=list(ARCHITECTURES))
    parser.add_argument("--case", type=int, help="try this seed alone and shorten it")
    parser.add_argument("--out", type=Path, help="where summary.json is written; default nowhere")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    tf.logging.set_verbosity_error()
    if options.case is not None:
        case = draw(options.case, options.only)
        verdict = judge(case)
        print(json.dumps(case.described(), default=str), verdict, sep="\n")
        if verdict.found:
            case = shortened(case)
            print(json.dumps(case.described(), default=str), judge(case), sep="\n")
        return int(verdict.found)
    summary = run(options.seconds, options.seed, options.only, options.out)
    print(json.dumps({key: value for key, value in summary.items() if key != "reasons"}))
    return int(bool(summary["findings"]))


if __name__ == "__main__":
    sys.exit(main())
