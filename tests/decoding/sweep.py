"""Every causal and encoder-decoder class of the installed transformers that can be made tiny, against its own generate.

    PYTHONPATH=.:tests python -m decoding.sweep [--only NAME ...] [--table]

Greedy, lossless, one row and a ragged batch, a drafter that is right now and then. ``--table`` prints the table of
docs/upstream.md.
"""

from __future__ import annotations

import argparse
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from decoding.small import IDS, LEFT, ONE, RIGHT, cascade, near, own
from transformers.models.auto import modeling_auto

from deferral_train.errors import InputError

# What makes a configuration small, by the names that architectures use.
SMALL: dict[str, Any] = {
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "dim": 32, "emb_dim": 32, "embed_dim": 32,
    "word_embed_proj_dim": 32,
    "intermediate_size": 64, "ffn_dim": 64, "d_ff": 64, "d_inner": 64, "n_inner": 64, "ffn_hidden_size": 64,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "encoder_layers": 2, "decoder_layers": 2,
    "num_decoder_layers": 2, "num_attention_heads": 2, "n_head": 2, "n_heads": 2, "num_heads": 2,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_key_value_heads": 2, "d_kv": 16, "head_dim": 16,
    "max_position_embeddings": 128, "n_positions": 128, "max_seq_len": 128, "n_ctx": 128, "seq_length": 128,
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_topk": 2,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "sliding_window": 8, "rotary_dim": 8,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "decoder_start_token_id": 2,
    "forced_eos_token_id": None, "forced_bos_token_id": None, "is_decoder": True, "use_cache": True,
    "attention_dropout": 0.0, "dropout": 0.0, "dropout_rate": 0.0, "layer_types": None,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 40, "kv_channels": 16, "decoder_vocab_size": 40,
}  # fmt: skip
VISION: dict[str, Any] = {  # and of encoders of images and sounds
    "depth": 1, "embed_dim": 32, "image_size": 28, "patch_size": 14, "num_mel_bins": 8, "encoder_layers": 1,
    "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "out_hidden_size": 32, "projection_dim": 32, "num_channels": 3,
    "output_dim": 32, "num_hidden_layers": 1, "layers": 1,
}  # fmt: skip
# What is tried in turn where the sizes above do not fit together; DROP leaves a default.
DROP = object()
MIXED = {"num_hidden_layers": 4, "num_layers": 4, "n_layer": 4}
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"head_dim": 8},
    {"layer_types": DROP},
    {"layer_types": DROP, **MIXED},
    {"head_dim": DROP, "layer_types": DROP},
    {"layer_types": ["linear_attention", "full_attention"]},
    {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    {"layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8},
    {"layer_types": DROP, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    {"layer_types": DROP, "attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8},
    {"layer_types": DROP, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1},
    {"layer_types": DROP, "layers_block_type": ["mamba", "attention"], "mamba_num_heads": 4, "mamba_head_dim": 16},
    {"layer_types": DROP, "layers_block_type": ["mamba", "hybrid"], "n_mamba_heads": 2, "mamba_d_state": 8},
    {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1},
    {"attention_types": [[["global", "local"], 1]]},
    {"n_head": 4, "num_attention_heads": 4, "rotary_dim": 4},
    {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]},
    {"default_language": "en_XX"},
    {"enable_pronunciation": False, "enable_shape": False},
    {"n_shared_experts": 1, "n_routed_experts": 4, "moe_intermediate_size": 32},
    {"block_types": ["recurrent", "attention"], "layer_types": DROP, "lru_width": 32, "attention_window_size": 8},
    {"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 16], "attn_layers": ["local", "local"]},
    {"qk_dim_factor": 0.5, "num_heads": 2},
)  # fmt: skip
SPECIAL = {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": 2}


@dataclass(frozen=True)
class Outcome:
    """What came of a class: ``equal``, ``refused``, ``different``, ``error`` or ``unmade``, and why."""

    name: str
    kind: str
    verdict: str
    reason: str = ""


class TooLargeError(ValueError):
    """A class whose configuration leaves it large."""


def candidates() -> list[tuple[str, str, Any]]:
    """(class name, kind, configuration class) of everything that the auto classes know."""
    found = {}
    for kind, names in (
        ("causal", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ("seq2seq", modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
        ("vision", modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    ):
        for model_type, name in names.items():
            if isinstance(name, str) and model_type in transformers.CONFIG_MAPPING:
                found.setdefault(name, (kind, transformers.CONFIG_MAPPING[model_type]))
    return [(name, kind, config) for name, (kind, config) in sorted(found.items())]


def tiny(config_class: Any, name: str, variant: dict[str, Any] | None = None, text: bool = False) -> Any:
    """A tiny model of a class with weights whose texts are not one token over and over.

    Args:
        variant: sizes besides the usual ones.
        text: make it from the text part of its configuration.
    """
    config = config_class()
    for part in _parts(config):
        own = part.get_text_config(decoder=True) is part or part is config
        small = SMALL if own and "vision" not in type(part).__name__.lower() else {**SMALL, **VISION}
        known = set(part.to_dict()) | set(getattr(part, "attribute_map", {}))
        sizes = {**small, **IDS, **(variant or {})}
        changes = {key: value for key, value in sizes.items() if key in known and value is not DROP}
        part.__init__(**{**_kept(part), **changes})
    config = config.get_text_config(decoder=True) if text else config
    made = getattr(transformers, name)
    with torch.device("meta"):
        size = sum(weight.numel() for weight in made(config).parameters())
    if size > 5_000_000:
        raise TooLargeError(f"stays at {size / 1e6:.0f}M parameters")
    torch.manual_seed(0)
    model = made(config).eval().requires_grad_(False)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.normal_(0, 0.2)
    return model


def _parts(config: Any) -> Iterator[Any]:
    """A configuration and all within it, outermost first: making one anew makes those within anew."""
    yield config
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if part is not None:
            yield from _parts(part)


def _kept(config: Any) -> dict[str, Any]:
    """Settings of a configuration that are neither sizes nor lists by layer, which would no longer fit."""
    return {
        key: value
        for key, value in config.to_dict().items()
        if isinstance(value, bool | str | float)
        and key not in ("model_type", "transformers_version", "dtype")
    }


def examine(name: str, kind: str, config_class: Any) -> Outcome:
    """Make the class tiny and decode one row and a ragged batch."""
    options = {**SPECIAL, "max_new_tokens": 12, "num_beams": 1, "no_repeat_ngram_size": None}
    reason, model, inputs, expected = "", None, (ONE, LEFT), []
    for variant, text in [
        (VARIANTS[0], False),
        (VARIANTS[0], True),
        (VARIANTS[3], True),
        *((variant, False) for variant in VARIANTS[1:]),
    ]:
        try:
            model = tiny(config_class, name, variant, text)
            inputs = (ONE, RIGHT if model.config.is_encoder_decoder else LEFT)
            expected = [own(model, given, **options) for given in inputs]
            break
        except Exception as error:
            # The reason of the plain sizes; a class that stays large does so with all of them.
            model, reason = None, reason or _line(error)
            if not text and isinstance(error, TooLargeError | ImportError):
                break
    if model is None:
        return Outcome(name, kind, "unmade", reason)
    drafter = near(model)
    for which, given, wanted in zip(("one row", "ragged"), inputs, expected):
        try:
            found = cascade(model, given, drafter, **options)
        except InputError as error:
            return Outcome(name, kind, "refused", f"{which}: {_line(error)}")
        except Exception as error:
            return Outcome(name, kind, "error", f"{which}: {_line(error)}")
        if not torch.equal(found, wanted):
            return Outcome(name, kind, "different", which)
    return Outcome(name, kind, "equal")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", help="classes to examine; default all")
    parser.add_argument("--table", action="store_true", help="print a Markdown table")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    found = []
    for name, kind, config_class in candidates():
        if arguments.only and name not in arguments.only:
            continue
        found.append(examine(name, kind, config_class))
        if not arguments.table:
            print(found[-1].verdict, name, found[-1].reason, flush=True)
    counts = Counter(one.verdict for one in found)
    if arguments.table:
        print("| class | outcome |\n|---|---|")
        for one in found:
            if one.verdict != "unmade":
                print(f"| {one.name} | {one.verdict}{': ' + one.reason if one.reason else ''} |")
    made = sum(counts.values()) - counts["unmade"]
    print(f"\n{made} of {len(found)} classes made tiny: " + ", ".join(f"{v} {k}" for k, v in counts.items()))


if __name__ == "__main__":
    main()
