"""Shared by the decoding tests: cached tiny pairs, ragged prompts, one call."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from tiny_models import tiny_pair

from deferral_train.decoding import CascadeOutput, cascade_generate

PROMPT_LENGTHS = (9, 4, 7, 1)


@cache
def pair_of(kind: str, drafter: str = "sometimes", seed: int = 3) -> tuple[Any, Any, Any]:
    """(drafter, verifier, tokenizer), built once per process."""
    return tiny_pair(kind, seed, drafter)


def prompts_for(kind: str, rows: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    """A ragged batch of random prompts, padded as the architecture wants it (left, T5 right)."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [PROMPT_LENGTHS[row % len(PROMPT_LENGTHS)] for row in range(rows)]
    width = max(lengths)
    ids = torch.randint(4, 40, (rows, width), generator=generator)
    place = torch.arange(width)
    length = torch.tensor(lengths)[:, None]
    mask = place < length if kind == "t5" else place >= width - length
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def generate(
    drafter: Any, verifier: Any, inputs: dict[str, torch.Tensor], rule: Any, **options: Any
) -> CascadeOutput:
    """One call through transformers' own generate, as users make it; greedy unless asked otherwise."""
    options = {"do_sample": False, "max_new_tokens": 16, "return_dict_in_generate": True, **options}
    return verifier.generate(
        **inputs, custom_generate=cascade_generate, drafter=drafter, rule=rule, **options
    )


def row_of(kind: str, inputs: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """One prompt of a batch without its padding."""
    present = inputs["attention_mask"][row].bool()
    return {name: values[row : row + 1, present] for name, values in inputs.items()}


def emitted(output: CascadeOutput, row: int) -> list[int]:
    """The ids that a row emitted: whatever stands behind its prompt, padding left out."""
    width = output.sequences.shape[1] - int(output.stats.emitted.max())
    return output.sequences[row, width : width + int(output.stats.emitted[row])].tolist()
