"""A tiny Llama checkpoint with a byte-level tokenizer, and the same as a GGUF file that transformers can read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

LETTERS = "abcdefghijklmnopqrstuvwxyz"
MERGES = [f"{LETTERS[i]} {LETTERS[i + 1]}" for i in range(0, 20, 2)]  # "a b" becomes the token "ab"
TOKENS = ["<pad>", "</s>", "<s>", "<unk>", *LETTERS, *(merge.replace(" ", "") for merge in MERGES)]
TENSORS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_gguf(
    model: Any,
    path: Path,
    architecture: str = "llama",
    splitting: str = "default",
    tokens: Sequence[str] = TOKENS,
    merges: Sequence[str] = MERGES,
) -> Path:
    """Write a tiny Llama model (``tiny_models``) and a byte-level tokenizer, this module's own, as one GGUF file."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting)
    writer.add_token_list(list(tokens))
    writer.add_token_types([3 if token.startswith("<") else 1 for token in tokens])
    writer.add_token_merges(list(merges))
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        rotated = next((count for part, count in heads.items() if part in name), None)
        values = tensor.numpy()
        writer.add_tensor(
            _name(name), np.ascontiguousarray(values if rotated is None else _paired(values, rotated))
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _name(name: str) -> str:
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in whole:
        return f"{whole[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{TENSORS[part]}.weight"


def _paired(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows in GGUF's order: rotary halves interleaved."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)
