"""Small models of any architecture from a config, and one call of the verifier's own generate or of ours."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from deferral_train import cascade_generate

IDS = {
    "vocab_size": 40,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "tie_word_embeddings": False,
}
LLM = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    **IDS,
}
SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 128,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    **IDS,
}
ONE = {"input_ids": torch.tensor([[5, 9, 12, 7, 30, 8, 21]])}
TWO = {"input_ids": torch.tensor([[5, 9, 12, 7, 30, 8, 21], [4, 4, 6, 8, 8, 30, 11]])}
LEFT = {
    "input_ids": torch.tensor([[5, 9, 12, 7, 30, 8, 21], [0, 0, 6, 8, 8, 30, 11]]),
    "attention_mask": torch.tensor([[1] * 7, [0, 0] + [1] * 5]),
}
RIGHT = {
    "input_ids": torch.tensor([[5, 9, 12, 7, 30, 8, 21], [6, 8, 8, 30, 11, 1, 0]]),
    "attention_mask": torch.tensor([[1] * 7, [1] * 6 + [0]]),
}


def made(config: Any, auto: Any = transformers.AutoModelForCausalLM) -> Any:
    """A model with weights large enough that its texts are not one token over and over."""
    torch.manual_seed(0)
    model = auto.from_config(config).eval().requires_grad_(False)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.normal_(0, 0.2)
    return model


def llama(layers: int = 2) -> Any:
    return made(transformers.LlamaConfig(**{**LLM, "num_hidden_layers": layers}))


def near(model: Any, scale: float = 0.05) -> Any:
    """A drafter that is right now and then: the model with its weights shaken."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)
    for weight in other.parameters():
        if weight.dim() > 1:
            weight.add_(scale * torch.randn(weight.shape, generator=generator))
    return other


def own(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    return model.generate(**inputs, **{"do_sample": False, "max_new_tokens": 16, **options})


def cascade(model: Any, inputs: dict[str, torch.Tensor], drafter: Any, **options: Any) -> Any:
    return own(model, inputs, custom_generate=cascade_generate, drafter=drafter, **options)


@lru_cache(maxsize=1)
def letters() -> Any:
    """A tokenizer whose ids 4 to 39 are one character each, for stop strings."""
    characters = [chr(ord("a") + n) for n in range(26)] + [str(n) for n in range(9)] + ["\u0120"]
    vocabulary = {token: n for n, token in enumerate(["<pad>", "</s>", "<s>", "<unk>", *characters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>"
    )
