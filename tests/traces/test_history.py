"""Previous tokens worked out from rows, against the texts themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from training.trace_maker import small_language

from deferral_train.collecting.synthetic import collect_synthetic
from deferral_train.pairs.synthetic import sample_sequences
from deferral_train.rules.summary import PREVIOUS_TOKENS
from deferral_train.traces.history import previous_tokens


@pytest.mark.parametrize("selected", [False, True])
def test_previous_tokens_of_traces_are_those_of_the_texts(tmp_path, selected):
    language = small_language()
    traces = collect_synthetic(language, tmp_path / "t", 12, 9, seed=4)
    texts = sample_sequences(language, 12, 9, 4)
    if selected:
        traces, texts = traces.select_prompts(traces.prompt_ids[3:7]), texts[3:7]
    summary = traces.summary([*PREVIOUS_TOKENS, "tv"])
    for back, name in enumerate(PREVIOUS_TOKENS, start=1):
        wanted = torch.nn.functional.pad(texts, (back, 0), value=-1)[:, :9]
        assert torch.equal(summary[name], wanted.flatten())
    assert set(traces.summary().names).isdisjoint(PREVIOUS_TOKENS)


def test_a_row_left_out_breaks_the_history_and_prompts_do_not_mix():
    prompt, position = np.array([0, 0, 0, 1, 1]), np.array([0, 1, 3, 4, 5])
    token = np.array([10, 11, 12, 13, 14])
    assert previous_tokens(prompt, position, token, 1).tolist() == [-1, 10, -1, -1, 13]
    assert previous_tokens(prompt, position, token, 2).tolist() == [-1, -1, -1, -1, -1]
    assert previous_tokens(prompt[:1], position[:1], token[:1], 3).tolist() == [-1]
