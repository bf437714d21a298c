import json

import pytest
from heads.laws import every_head, summary_of

from deferral_train.heads.onnx import export_onnx, open_session, parity

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("name", ["gap_isotonic", "cost_sensitive", "truth_mixture"])
def test_onnx_gives_torchs_numbers_in_one_file(name, tmp_path):
    head = every_head()[name]
    path = export_onnx(head, tmp_path / "model.onnx")
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
