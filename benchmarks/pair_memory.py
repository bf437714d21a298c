"""Memory of the common pairs in configs/pairs/, computed: parameters built on the meta device, and key-value caches.

    python -m benchmarks.pair_memory [--batch 1] [--out FILE]

No weights are needed. `SHAPES` holds the dimensions that each model's authors publish; the parameter count that follows
from them is compared with the count that they publish, so that a mistyped dimension shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Gemma2Config,
    LlamaConfig,
    Qwen3Config,
    T5Config,
)

from benchmarks.common import flags, keep

BYTES = 2  # bfloat16
GIB = 2**30


def _t5(width: int, inner: int, layers: int, heads: int) -> T5Config:
    return T5Config(
        vocab_size=32128, d_model=width, d_ff=inner, num_layers=layers, num_decoder_layers=layers, num_heads=heads,
        d_kv=64, feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0,
    )  # fmt: skip


def _gemma2(width: int, inner: int, layers: int, heads: int, kv_heads: int, head: int) -> Gemma2Config:
    return Gemma2Config(
        vocab_size=256000, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head, sliding_window=4096,
        max_position_embeddings=8192,
    )  # fmt: skip


def _qwen3(width: int, inner: int, layers: int, heads: int, tied: bool) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=151936, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=8, head_dim=128, tie_word_embeddings=tied,
        max_position_embeddings=40960,
    )  # fmt: skip


def _llama(width: int, inner: int, layers: int, head: int, tied: bool) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128256, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, head_dim=head, tie_word_embeddings=tied,
        max_position_embeddings=131072,
    )  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A published model.

    Attributes:
        config: its dimensions.
        parameters: the count its authors' checkpoint has.
        tokens: ids that its tokenizer knows; the columns beyond are padding.
    """

    config: Any
    parameters: int
    tokens: int


SHAPES: dict[str, Shape] = {
    "google/flan-t5-small": Shape(_t5(512, 1024, 8, 6), 76_961_152, 32_100),
    "google/flan-t5-large": Shape(_t5(1024, 2816, 24, 16), 783_150_080, 32_100),
    "google/flan-t5-xl": Shape(_t5(2048, 5120, 24, 32), 2_849_757_184, 32_100),
    "google/gemma-2-2b-it": Shape(_gemma2(2304, 9216, 26, 8, 4, 256), 2_614_341_888, 256_000),
    "google/gemma-2-9b-it": Shape(_gemma2(3584, 14336, 42, 16, 8, 256), 9_241_705_984, 256_000),
    "google/gemma-2-27b-it": Shape(_gemma2(4608, 36864, 46, 32, 16, 128), 27_227_128_320, 256_000),
    "Qwen/Qwen3-0.6B": Shape(_qwen3(1024, 3072, 28, 16, True), 596_049_920, 151_669),
    "Qwen/Qwen3-8B": Shape(_qwen3(4096, 12288, 36, 32, False), 8_190_735_360, 151_669),
    "meta-llama/Llama-3.2-1B-Instruct": Shape(_llama(2048, 8192, 16, 64, True), 1_235_814_400, 128_256),
    "meta-llama/Llama-3.1-8B-Instruct": Shape(_llama(4096, 14336, 32, 128, False), 8_030_261_248, 128_256),
}
PAIRS: dict[str, tuple[str, str]] = {
    "t5-small-large": ("google/flan-t5-small", "google/flan-t5-large"),
    "t5-small-xl": ("google/flan-t5-small", "google/flan-t5-xl"),
    "gemma2-2b-9b": ("google/gemma-2-2b-it", "google/gemma-2-9b-it"),
    "gemma2-2b-27b": ("google/gemma-2-2b-it", "google/gemma-2-27b-it"),
    "qwen3-0.6b-8b": ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B"),
    "llama-1b-8b": ("meta-llama/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
}
CONTEXT = {True: (512, 128), False: (0, 2048)}  # encoder and decoder positions, by encoder-decoder or not


def meta_model(name: str) -> Any:
    """The model with every tensor on the meta device: shapes without memory.

    transformers ties every T5's matrices when it builds one, and unties them when a checkpoint's differ, as those of
    FLAN-T5 do.
    """
    config = SHAPES[name].config
    auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config).eval()
        if config.is_encoder_decoder:
            model.lm_head = torch.nn.Linear(config.d_model, config.vocab_size, bias=False)
        return model


def parameter_count(model: Any) -> int:
    """Distinct parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def cache_bytes(config: Any) -> int:
    """Key-value cache of one row at the stated context, in bfloat16: a sliding layer holds its window only."""
    encoder, decoder = CONTEXT[bool(config.is_encoder_decoder)]
    if config.is_encoder_decoder:
        return 2 * config.num_decoder_layers * config.num_heads * config.d_kv * (encoder + decoder) * BYTES
    row = 2 * config.num_key_value_heads * config.head_dim * BYTES
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None) or decoder
    return sum(row * (min(window, decoder) if kind == "sliding_attention" else decoder) for kind in kinds)


def memory(pair: str, batch: int = 1) -> dict[str, float]:
    """GiB of weights, of the caches of ``batch`` rows, and of both models' logits over a block of five, float32."""
    configs = [SHAPES[name].config for name in PAIRS[pair]]
    weights = sum(parameter_count(meta_model(name)) for name in PAIRS[pair]) * BYTES
    caches = batch * sum(map(cache_bytes, configs))
    logits = batch * sum(config.vocab_size for config in configs) * 6 * 4
    return {
        "weights": weights / GIB,
        "caches": caches / GIB,
        "logits": logits / GIB,
        "total": (weights + caches + logits) / GIB,
    }


def statement(pair: str) -> str:
    """What the config of a pair says about memory."""
    encoder, decoder = CONTEXT[bool(SHAPES[PAIRS[pair][1]].config.is_encoder_decoder)]
    places = f"{encoder} + {decoder}" if encoder else f"{decoder}"
    found = memory(pair)
    return (
        f"{found['total']:.1f} GiB in bfloat16: {found['weights']:.1f} of weights, {found['caches']:.2f} of caches "
        f"a row of {places} tokens"
    )


def main() -> int:
    parser = flags(__doc__, ("cpu",), threads=None)
    parser.add_argument("--batch", type=int, default=1)
    options = parser.parse_args()
    for name, shape in SHAPES.items():
        count = parameter_count(meta_model(name))
        agrees = "as published" if count == shape.parameters else f"published: {shape.parameters:,}"
        print(f"{name:<36}{count:>16,} parameters ({agrees})")
    table = {pair: memory(pair, options.batch) for pair in PAIRS}
    for pair in PAIRS:
        print(f"{pair:<16}{statement(pair)}")
    keep(options, {"gib": table})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
