"""Tiny transformers checkpoints made on the spot: seven architectures, one small word tokenizer, no download.

``tiny_pair(kind, seed, drafter=...)`` gives ``(drafter, verifier, tokenizer)`` with a drafter that is
always right ("always": the verifier's own weights), hardly ever ("never": other weights) or now and then
("sometimes": perturbed weights).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

KINDS = ("t5", "llama", "gemma2", "gemma3", "qwen3", "mistral", "gpt2")
DECODER_ONLY = KINDS[1:]
VOCAB = 40  # tokenizer length; models may be padded beyond it
WINDOW = 6  # sliding window of mistral, gemma2 and gemma3: shorter than any test text
SPECIAL = ("<pad>", "</s>", "<s>", "<unk>")  # ids 0..3
WORDS = tuple(f"w{i}" for i in range(VOCAB - len(SPECIAL)))


def tiny_tokenizer(extra_word: str | None = None) -> Any:
    """A word-level fast tokenizer, ``VOCAB`` ids: pad 0, eos 1, bos 2, unk 3, then w0, w1, ...

    ``extra_word`` replaces the last word, to make a tokenizer that differs in one id.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = list(WORDS)
    if extra_word is not None:
        words[-1] = extra_word
    vocab = {word: i for i, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="<s>",
        unk_token="<unk>",
        model_max_length=128,
        padding_side="left",
    )


def tiny_config(kind: str, vocab_size: int = VOCAB, layers: int = 2) -> Any:
    """Config of a model of a few thousand parameters: width 32, 2 heads, untied embeddings."""
    import transformers

    tokens = {"vocab_size": vocab_size, "pad_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False}
    if kind == "t5":
        return transformers.T5Config(
            d_model=32,
            d_kv=16,
            d_ff=64,
            num_layers=layers,
            num_decoder_layers=layers,
            num_heads=2,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=16,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
            **tokens,
        )
    tokens["bos_token_id"] = 2
    if kind == "gpt2":
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return transformers.GPT2Config(
            n_embd=32, n_layer=layers, n_head=2, n_positions=128, **dropout, **tokens
        )
    common = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 128,
        **tokens,
    }
    if kind in ("llama", "qwen3"):
        return {"llama": transformers.LlamaConfig, "qwen3": transformers.Qwen3Config}[kind](**common)
    common["sliding_window"] = WINDOW
    if kind == "mistral":
        return transformers.MistralConfig(**common)
    alternating = [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]
    classes = {"gemma2": transformers.Gemma2Config, "gemma3": transformers.Gemma3TextConfig}
    return classes[kind](query_pre_attn_scalar=16, layer_types=alternating, **common)


def tiny_model(kind: str, seed: int = 0, vocab_size: int = VOCAB, layers: int = 2) -> Any:
    """A model in eval mode with seeded weights, scaled so that its next-token distributions are peaked, not flat."""
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        auto = transformers.AutoModelForSeq2SeqLM if kind == "t5" else transformers.AutoModelForCausalLM
        model = auto.from_config(tiny_config(kind, vocab_size, layers)).eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
        ids = torch.randint(len(SPECIAL), VOCAB, (8, 16))
        inputs = {"decoder_input_ids": ids} if kind == "t5" else {}
        head = model.get_output_embeddings().weight
        head.mul_(2.5 / model(input_ids=ids, **inputs).logits.std())
    return model


def tiny_pair(
    kind: str, seed: int = 0, drafter: str = "sometimes", noise: float = 0.1, layers: int = 2
) -> tuple[Any, Any, Any]:
    """``(drafter, verifier, tokenizer)``; see the module's first lines for what ``drafter`` means."""
    verifier = tiny_model(kind, seed, layers=layers)
    if drafter == "never":
        drafter_model = tiny_model(kind, seed + 1000, layers=layers)
    elif drafter in ("always", "sometimes"):
        drafter_model = tiny_model(kind, seed, layers=layers)
    else:
        raise ValueError(f"drafter={drafter!r}: never, always or sometimes")
    if drafter == "sometimes":
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for parameter in drafter_model.parameters():
                scale = noise * float(parameter.std()) if parameter.numel() > 1 else 0.0
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return drafter_model, verifier, tiny_tokenizer()


def save_tiny_pair(kind: str, folder: Path, seed: int = 0, drafter: str = "sometimes") -> tuple[Path, Path]:
    """Write ``folder/drafter`` and ``folder/verifier`` (checkpoint + tokenizer each); return both."""
    drafter_model, verifier_model, tokenizer = tiny_pair(kind, seed, drafter)
    paths = Path(folder) / "drafter", Path(folder) / "verifier"
    for model, path in zip((drafter_model, verifier_model), paths):
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    return paths
