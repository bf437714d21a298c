"""Seconds of one cached pass of each model on this machine, by the number of tokens that go through it together.

On a CPU the calling thread's own time, which equals wall clock on a quiet machine and is not stretched by other work;
on a GPU wall clock.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from deferral_train.pairs.load import ModelPair
from deferral_train.pairs.prompts import Prompt

PREFIX = 48  # cached tokens that a timed pass attends to
REPETITIONS, WARM_UP = 60, 5  # timed passes of each model and width, and those before them


def pass_seconds(
    pair: ModelPair, texts: Sequence[Prompt], widths: Sequence[int] = (1,), repetitions: int = REPETITIONS
) -> Mapping[int, tuple[float, float]]:
    """Median seconds of a (drafter's, verifier's) cached pass over so many tokens, batch 1, measured in turns.

    Args:
        texts: the first that has tokens is the prefix. widths: tokens of a pass.
    """
    prefix = next(
        (ids for text in texts if (ids := pair.tokenizer(text.prompt, verbose=False)["input_ids"])), [0]
    )
    passes = {
        (width, role): _pass(pair, model, list(prefix)[:PREFIX], width)
        for width in widths
        for role, model in enumerate((pair.drafter, pair.verifier))
    }
    times: dict[tuple[int, int], list[float]] = {key: [] for key in passes}
    for repetition in range(repetitions + WARM_UP):
        for key, run in passes.items():
            taken = run()
            if repetition >= WARM_UP:
                times[key].append(taken)
    medians = {key: statistics.median(column) for key, column in times.items()}
    return {width: (medians[width, 0], medians[width, 1]) for width in widths}


def _pass(pair: ModelPair, model: Any, prefix: list[int], width: int) -> Callable[[], float]:
    """A function that runs one pass over ``width`` tokens behind the prefix and returns its seconds."""
    ids = torch.tensor([prefix], device=model.device)
    tokens = ids[:, -1:].expand(1, width)
    inputs: dict[str, Any] = {"input_ids": tokens}
    with torch.inference_mode():
        if pair.is_encoder_decoder:
            encoded = model.get_encoder()(input_ids=ids)
            inputs = {"encoder_outputs": encoded, "decoder_input_ids": tokens}
            start = model(encoder_outputs=encoded, decoder_input_ids=ids[:, :8], use_cache=True)
        else:
            start = model(input_ids=ids, use_cache=True)

    @torch.inference_mode()
    def run() -> float:
        cache = copy.deepcopy(start.past_key_values)  # a pass lengthens it
        begun = now(model.device)
        model(**inputs, past_key_values=cache, use_cache=True)
        return now(model.device) - begun

    return run


def now(device: torch.device) -> float:
    """Seconds on the clock that everything here is timed with, after what runs on an accelerator is done."""
    if device.type == "cpu":
        return time.thread_time()
    synchronize = torch.get_device_module(device).synchronize
    synchronize(device) if device.type == "cuda" else synchronize()
    return time.perf_counter()
