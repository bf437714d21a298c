"""The ONNX form of every kind of head gives torch's numbers to 1e-6, one row at a time and all at once."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from heads.distributions import every_head, shaken, summary_of

from deferral_train.collecting import CollectConfig, collect
from deferral_train.errors import InputError
from deferral_train.heads import DeferralHead, GapHead
from deferral_train.heads.cost import call_inputs
from deferral_train.heads.onnx import BOUND, Parity, export_onnx, open_session, parity
from deferral_train.pairs.prompts import read_prompts
from deferral_train.traces import Traces, open_traces
from deferral_train.training.config import VERIFY_FEATURES
from deferral_train.training.preparation import fit_memory, fit_recalibration

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

HIDDEN = 64  # width of the shared drafter
REAL = (
    "gap_platt",
    "gap_isotonic",
    "gap_draft",
    "gap_log_default_features",
    "gap_hidden_state",
    "gap_memory",
    "cost_sensitive",
    "cost_sensitive_draft",
    "truth_mixture",
    "token",
    "token_prob",
    "plug_in",
)


def more_heads() -> dict[str, DeferralHead]:
    """Inputs and sizes that the small heads of ``every_head`` lack."""
    state = {"drafter_hidden": HIDDEN}
    return {
        "gap_log_default_features": GapHead(VERIFY_FEATURES, loss="log"),
        "gap_hidden_state": GapHead(("drafter_max", "drafter_hidden"), widths=state, hidden=(8,)),
        "gap_memory": GapHead(("drafter_max:logit", "memory_2"), hidden=(8,)),
    }


@pytest.fixture(scope="module")
def real(t5_pair: Path, multi30k: Path, tmp_path_factory: pytest.TempPathFactory) -> Traces:
    """Several hundred positions of real text under the shared pair."""
    source, target = (str(multi30k / f"test_2016_flickr.{side}.gz") for side in ("en", "de"))
    prompts = read_prompts(source, reference_path=target, limit=32)
    names = str(t5_pair / "drafter"), str(t5_pair / "verifier")
    config = CollectConfig(*names, device="cpu", dtype="float32", hidden="drafter", log_top_k=0)
    folder = tmp_path_factory.mktemp("real") / "traces"
    collect(config, folder, progress=False, prompts=prompts)
    return open_traces(folder)


def fitted(head: DeferralHead, traces: Traces) -> DeferralHead:
    """Memory, recalibration and normalisation of the real rows; random weights, scaled as layers start."""
    fit_memory(head, traces)
    fit_recalibration(head, traces)
    head.fit_normalisation([head.columns(traces.summary(head.features))])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return head.eval()


@pytest.mark.parametrize("name", REAL)
def test_every_kind_of_head_on_real_text(name: str, real: Traces, tmp_path: Path) -> None:
    head = fitted({**every_head(), **more_heads()}[name], real)
    columns = head.columns(real.summary(head.features))
    assert len(columns) > 300
    single, whole = parity(head, export_onnx(head, tmp_path / "model.onnx"), columns)
    assert (single.rows, whole.rows) == (1, len(columns))
    assert max(single.error, whole.error) <= BOUND == 1e-6
    with torch.no_grad():
        values = next(iter(head(*call_inputs(head, columns)).values()))
    assert values.std() > 0.01  # equal constants would show nothing


@pytest.mark.parametrize("name", ["gap_isotonic", "cost_sensitive", "truth_mixture"])
def test_onnx_gives_torchs_numbers_in_one_file(name, tmp_path, capfd):
    head = every_head()[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        path = export_onnx(head, tmp_path / "model.onnx")
    assert capfd.readouterr().err == ""
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    columns = head.columns(summary_of(130, seed=5))
    for report in parity(head, path, columns):
        assert report.error <= 1e-6
        report.check()
    described = {
        entry.key: json.loads(entry.value)
        for entry in onnx.load(path).metadata_props
        if "deferral" in entry.key
    }
    assert described["deferral.columns"] == list(head.inputs.names)
    assert described["deferral.config"]["schema_hash"] == head.inputs.schema_hash
    assert open_session(path).get_inputs()[0].name == "columns"


def test_a_graph_of_other_weights_is_refused(tmp_path):
    head = every_head()["gap"]
    path = export_onnx(head, tmp_path / "model.onnx")
    other = shaken(every_head()["gap"], seed=2)
    whole = parity(other, path, head.columns(summary_of(40)))[1]
    assert whole.error > 1e-3
    with pytest.raises(InputError, match="too large"):
        whole.check()
    with pytest.raises(InputError, match="too large"):
        Parity(1, float("nan")).check()
