"""Rows that end early are filled with the padding id that the caller configured."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_pair

from deferral_train.decoding import cascade_generate


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_finished_rows_hold_the_configured_padding(kind):
    drafter, verifier, _ = tiny_pair(kind)
    ids = torch.tensor([[5, 6, 7], [9, 30, 12]])
    given = {"custom_generate": cascade_generate, "drafter": drafter, "max_new_tokens": 8, "do_sample": False}
    start = 1 if kind == "t5" else ids.shape[1]
    free = verifier.generate(input_ids=ids, eos_token_id=None, pad_token_id=3, **given)[:, start:]
    place = next(n for n in range(8) if free[0, n] not in free[1].tolist())
    ended = verifier.generate(input_ids=ids, eos_token_id=int(free[0, place]), pad_token_id=3, **given)[
        :, start:
    ]
    assert ended[1].tolist() == free[1].tolist()
    assert ended[0].tolist() == [*free[0, : place + 1].tolist(), *[3] * (7 - place)]
