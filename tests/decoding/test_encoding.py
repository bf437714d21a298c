"""Encoder states of ragged prompts, worked out without their padding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from decoding.helpers import pair_of, prompts_for

from deferral_train.decoding.encoding import TOGETHER, encode
from deferral_train.decoding.pair import load_pair


@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_states_of_tokens_are_those_of_one_pass(side: str) -> None:
    _, verifier, _ = pair_of("t5")
    inputs = prompts_for("t5", rows=2 * TOGETHER + 3)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    if side == "left":
        ids, mask = ids.flip(1), mask.flip(1)
    found = encode(verifier, ids, mask)
    wanted = verifier.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    present = mask.bool()
    torch.testing.assert_close(found[present], wanted[present], rtol=1e-5, atol=1e-6)
    assert bool(torch.isfinite(found).all())


def test_a_text_is_the_same_alone_and_among_others(t5_pair: Path) -> None:
    pair = load_pair(str(t5_pair / "drafter"), str(t5_pair / "verifier"), "cpu")
    texts = [
        " ".join(["ein Mann", "sieht den Hund", "und geht"][: 1 + n % 3] * (1 + n % 5)) for n in range(20)
    ]
    options = {"max_new_tokens": 12, "num_draft_tokens": 3}
    alone = pair.generate(texts, "lossless", batch_size=1, queue=1, **options)
    together = pair.generate(texts, "lossless", batch_size=4, queue=8, **options)
    assert together.sequences == alone.sequences
    assert len({tuple(row) for row in alone.sequences}) > 1
