"""Fresh Llama-style and T5 models of a given size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from deferral_train.pairs.checkpoint import without_bars
from deferral_train.pairs.scratch.copying import start_copying
from deferral_train.pairs.scratch.train_config import ModelSize, PairConfig

# Of rotary positions: slower than usual, so that most of a head compares contents and not places.
ROPE_THETA = 1e5
# The last matrix of an attention or feed-forward branch in Llama and in T5.
RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight", "Attention.o.weight", "DenseReluDense.wo.weight")


def new_model(config: PairConfig, role: str, tokenizer: Any) -> Any:
    """A freshly initialised drafter or verifier (``role``); weights depend on the seed and the role alone."""
    size = config.verifier if role == "verifier" else config.drafter
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed * 2 + (role == "verifier"))
        build = _t5 if config.kind == "t5" else _llama
        model = build(
            size, config.context, {"vocab_size": len(tokenizer), "tie_word_embeddings": True, **ids}
        )
        _start_shallow(model)
        if size.copies:
            start_copying(model, config.context)
        return model


def _start_shallow(model: Any) -> Any:
    """Zero what each layer adds at first: a deep model then learns the easy things as fast as a shallow one.

    With the few hundred steps of a small pair this is worth half a nat a token of the six-layer verifier.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(RESIDUAL_OUTPUTS):
                parameter.zero_()
    return model


def load_trained(config: PairConfig, folder: Path) -> Any:
    """A finished model of the pair, frozen, in eval mode."""
    from transformers import LlamaForCausalLM, T5ForConditionalGeneration

    kind = T5ForConditionalGeneration if config.kind == "t5" else LlamaForCausalLM
    with without_bars():
        return kind.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def _t5(size: ModelSize, context: int, common: dict[str, Any]) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=size.width,
        d_kv=size.width // size.heads,
        d_ff=size.feed_forward,
        num_layers=size.layers,
        num_decoder_layers=size.layers,
        num_heads=size.heads,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        **{"decoder_start_token_id": common["pad_token_id"], **common},
    )
    return T5ForConditionalGeneration(config)


def _llama(size: ModelSize, context: int, common: dict[str, Any]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=size.width,
        intermediate_size=size.feed_forward,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=max(1024, 4 * context),
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        attention_bias=size.copies,
        bos_token_id=None,
        **common,
    )
    model = LlamaForCausalLM(config)
    # Rows of length 1: what a token is must not drown in what the layers add, or no layer can copy it.
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=size.width**-0.5)
    return model
