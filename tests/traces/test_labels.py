"""Labels and candidates against the definitions, computed from full distributions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from deferral_train.errors import InputError
from deferral_train.rules import risks
from deferral_train.rules.summary import summarize
from deferral_train.traces import Manifest, TraceWriter, open_traces, prepare_folder, read_candidates
from deferral_train.traces.schema import SUMMARY_COLUMNS, TOKEN_COLUMNS
from deferral_train.traces.truth import gap

from .conftest import make_columns, make_manifest

VOCAB, K = 30, 4


def _distributions(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, VOCAB, generator=generator).mul(2).log_softmax(-1) for _ in range(3))  # type: ignore[return-value]


@pytest.fixture
def known(tmp_path: Path) -> tuple[Path, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A folder written from full distributions q, p and an exact P, with gold tokens drawn from P."""
    manifest: Manifest = make_manifest(truth="exact", hidden={}, top_k=K, temperature=1.0)
    kept = []
    writer = TraceWriter(str(tmp_path), manifest)
    for chunk in prepare_folder(str(tmp_path), manifest):
        columns = make_columns(manifest, chunk)
        rows = len(columns["prompt"])
        q, p, truth = _distributions(rows, chunk.seed)
        y = torch.multinomial(truth.exp(), 1, generator=torch.Generator().manual_seed(chunk.seed))[:, 0]
        summary = summarize(q, p, token=y)
        columns |= {name: summary[name].numpy() for name in (*SUMMARY_COLUMNS, *TOKEN_COLUMNS)}
        columns["gold"] = y.numpy()
        for role, distribution in (("drafter", q), ("verifier", p)):
            ids = distribution.topk(K).indices
            columns[f"{role}_top_ids"] = ids.numpy()
            for other, values in (("drafter", q), ("verifier", p)):
                columns[f"{role}_top_{other}_logprobs"] = values.gather(1, ids).half().numpy()
            for loss, name, sign, offset in (
                ("zero_one", "argmax", -1, 1),
                ("log", "log", 1, 0),
                ("prob", "prob", -1, 1),
            ):
                expected = risks.expected_loss(loss, distribution.exp(), truth.exp())
                columns[f"truth_{role}_{name}"] = (offset + sign * expected).numpy()
        writer.write(chunk, columns)
        kept.append((q, p, truth, y))
    return (tmp_path, *(torch.cat(part) for part in zip(*kept)))


@pytest.mark.parametrize("loss", risks.LOSSES)
def test_gaps_equal_their_definitions(known: tuple, loss: str) -> None:
    folder, q, p, truth, y = known
    traces = open_traces(folder)
    exact = risks.gap_from_truth(q.exp(), p.exp(), truth.exp(), loss)
    trusting = risks.gap_from_truth(q.exp(), p.exp(), p.exp(), loss)
    observed = risks.token_loss(loss, q.exp(), y) - risks.token_loss(loss, p.exp(), y)
    for name, expected in (("exact", exact), ("verifier", trusting), ("reference", observed)):
        torch.testing.assert_close(gap(traces, name, loss), expected, atol=2e-6, rtol=1e-5)
    part = traces.select_prompts(["p4", "p8"])
    rows = torch.from_numpy(np.isin(traces.prompt_of_row, [4, 8]))
    torch.testing.assert_close(gap(part, "exact", loss), exact[rows], atol=2e-6, rtol=1e-5)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("truth", ["reference", "verifier", "exact"])
def test_gaps_of_a_mapped_shard_warn_of_nothing(tmp_path: Path, truth: str) -> None:
    """One shard: its columns are the file itself, read-only, and no label may write into it."""
    manifest = make_manifest(chunks=make_manifest().chunks[:1], truth="exact", hidden={})
    for chunk in prepare_folder(str(tmp_path), manifest):
        TraceWriter(str(tmp_path), manifest).write(chunk, make_columns(manifest, chunk))
    traces = open_traces(tmp_path)
    assert not traces.column("gold").flags.writeable
    label = gap(traces, truth)
    label += 1.0
    assert len(label) == len(open_traces(tmp_path, verify=True))


def test_truths_that_are_not_logged_are_refused(known: tuple, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="truth='teacher': these traces log the exact distribution"):
        gap(open_traces(known[0]), "teacher")
    with pytest.raises(InputError, match="no distribution of their own"):
        gap(open_traces(folder), "exact")
    with pytest.raises(InputError, match="truth='oracle'"):
        gap(open_traces(folder), "oracle")
    manifest = make_manifest(prefixes="drafter")
    other = tmp_path / "sampled"
    writer = TraceWriter(str(other), manifest)
    for chunk in prepare_folder(str(other), manifest):
        columns = make_columns(manifest, chunk)
        writer.write(chunk, {**columns, "gold": np.full(len(columns["prompt"]), -1)})
    with pytest.raises(InputError, match="prefixes are 'drafter', rows without a gold token"):
        gap(open_traces(other))


def test_candidates_bound_what_they_leave_out(known: tuple) -> None:
    folder, q, p, _, _ = known
    candidates = read_candidates(open_traces(folder))
    for row in range(len(q)):
        union = set(q[row].topk(K).indices.tolist()) | set(p[row].topk(K).indices.tolist())
        valid = candidates.valid[row]
        assert sorted(candidates.ids[row][valid].tolist()) == sorted(union)
        for distribution, rest in ((q, candidates.drafter_rest), (p, candidates.verifier_rest)):
            outside = 1 - distribution[row, sorted(union)].exp().sum()
            assert abs(float(rest[row] - outside)) <= float(candidates.rounding[row]) + 1e-6
    assert float(candidates.rounding.max()) < 2e-3


def test_candidates_of_traces_without_any(tmp_path: Path) -> None:
    manifest = make_manifest(top_k=0)
    writer = TraceWriter(str(tmp_path), manifest)
    for chunk in prepare_folder(str(tmp_path), manifest):
        writer.write(chunk, make_columns(manifest, chunk))
    with pytest.raises(InputError, match="log no candidates"):
        read_candidates(open_traces(tmp_path))
