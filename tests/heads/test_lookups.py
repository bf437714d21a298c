"""Features that look tokens up, folding them into tables, and the artifacts of both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from deferral_train.errors import InputError
from deferral_train.heads import DeferralHead, GapHead
from deferral_train.heads.check import check_head
from deferral_train.heads.folding import fold
from deferral_train.rules.summary import Summary, summarize

VOCABULARY, WIDTH = 11, 6
FEATURES = (
    "tv",
    "drafter_argmax_embedding",
    "drafter_max:logit",
    "verifier_argmax_embedding",
    "argmax_cosine",
    "verifier_margin:sqrt",
)


def open_head(features: tuple[str, ...] = FEATURES) -> GapHead:
    """A linear head with weights, normalisation and a matrix of its own."""
    widths = {"vocabulary": VOCABULARY, "matrix": WIDTH}
    head = GapHead(features, loss="sequence", body="linear", widths=widths)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in head.body.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        head.mean.copy_(torch.randn(head.mean.shape, generator=generator))
        head.scale.copy_(torch.rand(head.scale.shape, generator=generator) + 0.5)
    assert head.inputs.lookups is not None
    head.inputs.lookups.set_matrix(torch.randn(VOCABULARY + 2, WIDTH, generator=generator))
    return head.eval()


def summary() -> Summary:
    generator = torch.Generator().manual_seed(5)
    drafter, verifier = (2 * torch.randn(64, VOCABULARY, generator=generator) for _ in range(2))
    return summarize(drafter, verifier, token=torch.zeros(64, dtype=torch.int64))


def test_columns_are_rows_of_the_matrix_and_their_cosine() -> None:
    head, at = open_head(), summary()
    assert head.inputs.lookups is not None
    matrix = head.inputs.lookups.matrix.float()
    x = head.columns(at)
    first = head.inputs.start["drafter_argmax_embedding"]
    assert torch.equal(x[:, first : first + WIDTH], matrix[at.drafter_argmax])
    rows = matrix[at.drafter_argmax], matrix[at.verifier_argmax]
    cosine = (rows[0] * rows[1]).sum(1) / (rows[0].norm(dim=1) * rows[1].norm(dim=1))
    assert torch.allclose(head.inputs.column(x, "argmax_cosine"), cosine, atol=1e-5)


def test_a_folded_head_estimates_the_same_from_one_number_per_token() -> None:
    head, at = open_head(), summary()
    folded = fold(head)
    assert torch.allclose(folded.gap(at), head.gap(at), atol=2e-5)
    assert (folded.gap(at) != 0).any()
    assert folded.inputs.lookups is not None
    assert folded.inputs.lookups.get_buffer("drafter_argmax_worth").shape == (VOCABULARY,)
    bare = fold(open_head(tuple(name for name in FEATURES if name != "argmax_cosine")))
    assert bare.inputs.lookups is not None
    assert "matrix" not in dict(bare.inputs.lookups.named_buffers())
    assert bare.body[0].weight.shape == (1, 5)


def test_both_forms_pass_the_contract_and_come_back_the_same(tmp_path: Path) -> None:
    at = summary()
    for name, head in (("open", open_head()), ("folded", fold(open_head()))):
        check_head(head)
        head.save_pretrained(tmp_path / name)
        again = DeferralHead.from_pretrained(tmp_path / name)
        assert torch.equal(again.gap(at), head.gap(at))


def test_an_mlp_over_embeddings_is_not_folded() -> None:
    head = GapHead(FEATURES, loss="sequence", widths={"vocabulary": VOCABULARY, "matrix": WIDTH})
    with pytest.raises(InputError, match="only a linear head can be folded"):
        fold(head)


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({}, "give the size of the vocabulary"),
        ({"vocabulary": 11}, "need its width"),
        ({"vocabulary": 1 << 30, "matrix": 6}, "size of the vocabulary"),
        ({"vocabulary": 1 << 20, "matrix": 1 << 20}, "at most"),
    ],
)
def test_sizes_are_checked_before_anything_is_allocated(widths: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GapHead(FEATURES, loss="sequence", body="linear", widths=widths)


def test_a_matrix_of_another_verifier_is_refused() -> None:
    head = open_head()
    assert head.inputs.lookups is not None
    with pytest.raises(InputError, match=r"output matrix is \[9, 6\]"):
        head.inputs.lookups.set_matrix(torch.zeros(9, 6))


def test_heads_of_schema_1_load_and_a_later_one_is_refused_by_name(tmp_path: Path) -> None:
    head = GapHead(["drafter_max", "tv"], body="linear")
    head.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["schema"]["version"] == 2
    old = {**config, "schema": head.inputs.schema_of(1)}
    from deferral_train.provenance import hash_of

    old["schema_hash"] = hash_of(old["schema"])
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert DeferralHead.from_pretrained(tmp_path).config == head.config
    later = {**config, "schema": {**config["schema"], "version": 3}}
    (tmp_path / "config.json").write_text(json.dumps(later))
    with pytest.raises(InputError, match="version '3', here 2"):
        DeferralHead.from_pretrained(tmp_path)


def test_the_gap_of_a_finished_text_is_0_where_the_argmaxes_agree_at_temperature_0_alone() -> None:
    at = summary()
    agree = at.drafter_argmax == at.verifier_argmax
    assert agree.any()
    assert (open_head().gap(at)[agree] == 0).all()
    sampled = GapHead(["tv"], loss="sequence_sampled", body="linear")
    torch.nn.init.ones_(sampled.body[0].bias)
    assert (sampled.gap(at) == 1).all()
