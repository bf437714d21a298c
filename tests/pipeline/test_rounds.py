"""Refitting on the cascade's own prefixes: what each round learns from, what it reports, and that it resumes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from decoding.helpers import pair_of

from deferral_train.collecting.config import CollectConfig
from deferral_train.decoding import DecodeConfig, Pair, Settings
from deferral_train.errors import InputError
from deferral_train.heads import DeferralHead
from deferral_train.pairs.load import make_pair
from deferral_train.pairs.prompts import Prompt
from deferral_train.pipeline.rounds import Rounds, learn
from deferral_train.training.config import FitConfig

TOKENS, BLOCK = 10, 3


def prompts(start: int, count: int) -> list[Prompt]:
    text = [
        " ".join([f"w{i // 30}", *(f"w{(i * 7 + j * j) % 30}" for j in range(3 + i % 5))])  # no text twice
        for i in range(start, start + count)
    ]
    return [Prompt(f"p{start + i}", line, f"{line} w1 w2 w3 w4") for i, line in enumerate(text)]


@pytest.fixture
def rounds(tmp_path) -> Rounds:
    return Rounds(
        CollectConfig(temperature=0.0, log_top_k=0, max_new_tokens=TOKENS, num_draft_tokens=BLOCK),
        FitConfig(
            train="", stage="draft", truth="verifier", temperature=0.0, hidden=(8,), batch_size=64, epochs=2,
            figure_every=0,
        ),
        DecodeConfig(Settings(num_draft_tokens=BLOCK, max_new_tokens=TOKENS, temperature=0.0)),
        0.1,
        tmp_path,
    )  # fmt: skip


def test_a_round_adds_the_heads_own_prefixes_and_compares_prediction_with_count(rounds, tmp_path):
    pair = Pair(make_pair(*pair_of("llama")))
    records = learn(pair, prompts(0, 24), prompts(100, 25), rounds, 1)
    first, second = records
    own = f"cascade:learned:head={tmp_path / 'round-0' / 'head'},alpha=0.1"
    assert (first["prefixes"], second["prefixes"]) == ("reference", own)
    assert second["rows"] > first["rows"]
    head = DeferralHead.from_pretrained(tmp_path / "round-1" / "head")
    assert head.metadata["training"]["prefixes"] == f"reference + {own}"
    for record in records:
        assert {row["quantity"] for row in record["skew"]} >= {"acceptance", "tokens per verifier call"}
        assert all(row["prompts"] == 25 for row in record["skew"])
        assert 0 <= record["served"]["tv_brier"] <= 1
    assert not first["skew"][0]["on_policy"]
    # The served prefixes of head 0 are those on which round 1 starts.
    assert first["served"]["gap_brier"] != first["trained"]["gap_brier"]
    assert learn(pair, prompts(0, 24), prompts(100, 25), rounds, 1) == records


def test_labels_must_not_need_gold_tokens(rounds):
    with pytest.raises(InputError, match="gold"):
        replace(rounds, fitting=replace(rounds.fitting, truth="reference"))
