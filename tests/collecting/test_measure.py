"""The fast measurement against `summarize` in float64, and its edges."""

from __future__ import annotations

import pytest
import torch

from deferral_train.collecting import measure as module
from deferral_train.collecting.measure import Measure
from deferral_train.rules.summary import FIELDS, summarize
from deferral_train.traces.schema import SUMMARY_COLUMNS, TOKEN_COLUMNS

ROWS, VOCAB, PADDED = 70, 1200, 1230


@pytest.fixture(scope="module")
def logits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Drafter and verifier logits with padding columns that would win if they were read, and tokens."""
    generator = torch.Generator().manual_seed(0)
    drafter = torch.randn(ROWS, PADDED, generator=generator) * 3
    verifier = drafter + torch.randn(ROWS, PADDED, generator=generator)
    drafter[:, VOCAB:], verifier[:, VOCAB:] = 50.0, 60.0
    drafter[0, :VOCAB] = verifier[0, :VOCAB] = 0.0  # flat: every token ties
    drafter[1, :5] = verifier[1, 3:8] = 40.0  # tied and peaked
    verifier[2, 7], drafter[2, 7] = 90.0, -90.0  # nearly one-hot, and far apart
    return drafter, verifier, torch.randint(VOCAB, (ROWS,), generator=generator)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 1.7])
def test_equals_the_float64_reference(logits: tuple, temperature: float) -> None:
    drafter, verifier, token = logits
    columns = Measure(VOCAB, 0, temperature)(drafter, verifier, torch.arange(ROWS), token)
    known = [part[:, :VOCAB].double() for part in (drafter, verifier)]
    reference = summarize(*known, token=token, temperature=temperature)
    assert bool(columns.pop("finite").all())
    assert set(columns) == {*SUMMARY_COLUMNS, *TOKEN_COLUMNS}
    for name in columns:
        if FIELDS[name].dtype == "int":
            assert torch.equal(columns[name], reference[name]), name
        else:
            # float32 sums of 1,200 terms whose logits reach 90: absolute for distributions, relative for sizes.
            torch.testing.assert_close(
                columns[name].double(), reference[name], atol=2e-5, rtol=2e-6, msg=name
            )


@pytest.mark.parametrize("k", [1, 8, 64, VOCAB])
def test_candidates_are_the_k_likeliest_with_their_tails(logits: tuple, k: int) -> None:
    drafter, verifier, token = logits
    rows = torch.arange(2, ROWS)  # without ties
    columns = Measure(VOCAB, k)(drafter, verifier, rows, token[2:])
    distributions = {
        role: part[rows, :VOCAB].double().log_softmax(-1)
        for role, part in (("drafter", drafter), ("verifier", verifier))
    }
    for role, distribution in distributions.items():
        ids = columns[f"{role}_top_ids"].long()
        # As values: two logits that differ by less than a rounding may change places.
        torch.testing.assert_close(
            distribution.gather(1, ids), distribution.topk(k).values, atol=1e-5, rtol=0
        )
        assert all(len(set(row)) == k for row in ids.tolist())
        for other, values in distributions.items():
            stored = columns[f"{role}_top_{other}_logprobs"].double()
            torch.testing.assert_close(stored, values.gather(1, ids), atol=1e-5, rtol=2.0**-11)
        tail = (1 - distribution.gather(1, ids).exp().sum(1)).clamp(min=0)
        torch.testing.assert_close(columns[f"{role}_tail"].double(), tail, atol=1e-5, rtol=0)


def test_ties_go_to_the_lowest_id_and_candidates_stay_distinct(logits: tuple) -> None:
    drafter, verifier, token = logits
    columns = Measure(VOCAB, 64)(drafter, verifier, torch.arange(2), token[:2])
    assert columns["drafter_argmax"].tolist() == [0, 0]
    assert columns["verifier_argmax"].tolist() == [0, 3]
    for role in ("drafter", "verifier"):
        assert all(len(set(row)) == 64 for row in columns[f"{role}_top_ids"].tolist())


def test_blocks_and_order_of_rows_do_not_matter(logits: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    drafter, verifier, token = logits
    rows = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    whole = Measure(VOCAB, 8)(drafter, verifier, torch.arange(ROWS), token)
    monkeypatch.setattr(module, "CPU_BLOCK", 4 * VOCAB)
    shuffled = Measure(VOCAB, 8)(drafter, verifier, rows, token[rows])
    for name, values in whole.items():
        torch.testing.assert_close(shuffled[name], values[rows], atol=1e-6, rtol=1e-6, msg=name)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("model", [0, 1])
def test_rows_that_are_not_finite_are_flagged_and_harm_no_other(
    logits: tuple, bad: float, model: int
) -> None:
    parts = [part.clone() for part in logits[:2]]
    measure = Measure(VOCAB, 8)
    clean = measure(*parts, torch.arange(ROWS), logits[2])
    parts[model][5, 17] = bad
    dirty = measure(*parts, torch.arange(ROWS), logits[2])
    others = torch.arange(ROWS) != 5
    assert dirty["finite"].tolist() == others.tolist()
    for name in clean:
        assert torch.equal(clean[name][others], dirty[name][others]), name


def test_half_precision_logits_are_measured_in_float32(logits: tuple) -> None:
    drafter, verifier, token = (logits[0][2:].bfloat16(), logits[1][2:].bfloat16(), logits[2][2:])
    columns = Measure(VOCAB)(drafter, verifier, torch.arange(len(token)), token)
    reference = summarize(drafter[:, :VOCAB].double(), verifier[:, :VOCAB].double(), token=token)
    torch.testing.assert_close(columns["kl"].double(), reference.kl, atol=2e-5, rtol=2e-6)
    assert columns["kl"].dtype == torch.float32


def test_a_vocabulary_smaller_than_a_group() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    columns = Measure(3, 5)(logits, logits, torch.tensor([0]), torch.tensor([1]))
    assert columns["drafter_top_ids"].tolist() == [[2, 1, 0]]
    assert float(columns["drafter_tail"][0]) < 1e-6
