"""A head goes to a hub and comes back through the real huggingface_hub client, over HTTP on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from heads import hub as local
from heads.distributions import every_head, summary_of

from deferral_train.errors import InputError
from deferral_train.heads import DeferralHead

pytest.importorskip("huggingface_hub")
# One process does all of it, because importing is what takes long.
THERE_AND_BACK = """
import json, sys
from deferral_train import DeferralHead, InputError
from deferral_train.cli import main
flags = ["export", "--checkpoint", "head", "--out", "out", "--push_to_hub", "someone/my-head", "--token"]
found = {"pushed": main([*flags, "hf_secret"])}
head = DeferralHead.from_pretrained("someone/my-head")
found["back"] = [head.config, head.metadata["alpha"]]
found["denied"] = main([*flags, "hf_wrong"])
try:
    DeferralHead.from_pretrained("someone/nothing")
except InputError as error:
    found["absent"] = str(error)
print(json.dumps(found))
"""


def test_push_with_a_token_and_load_by_hub_id(tmp_path):
    head = every_head()["gap"]
    head.metadata = {"alpha": 0.25, "pair": {"vocab_size": 9}}
    head.save_pretrained(tmp_path / "head")
    with local.serve("hf_secret") as hub:
        environment = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", THERE_AND_BACK],
            env={**os.environ, **environment, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["pushed"] == 0
    assert found["back"] == [head.config, 0.25]
    assert set(hub.files["someone/my-head"]) == {"config.json", "model.safetensors", "README.md"}
    weights = hub.files["someone/my-head"]["model.safetensors"]
    assert weights == (tmp_path / "out" / "model.safetensors").read_bytes()
    posts = [token for method, _, token in hub.requests if method == "POST"]
    assert set(posts) == {"Bearer hf_secret", "Bearer hf_wrong"}

    assert found["denied"] == 2
    refusal = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(refusal) == 1
    assert "someone/my-head" in refusal[0]
    assert "hf_wrong" not in done.stderr
    assert "someone/nothing" in found["absent"]


def test_offline_is_said_in_one_line(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="someone/absent"):
        DeferralHead.from_pretrained("someone/absent")


def test_card_and_config_state_what_a_stranger_needs(tmp_path):
    """The list of what an exported head says about itself, on a head that was fitted, chosen and measured."""
    from deferral_train.commands import export
    from deferral_train.heads import set_operating_point

    head = every_head()["gap_isotonic"]
    head.metadata = {
        "pair": {
            "drafter": {"weights": "aa"},
            "verifier": {"weights": "bb"},
            "tokenizer": "cc",
            "vocab_size": 9,
        },
        "training": {"rows": 100, "prefixes": "reference", "versions": {"torch": "2"}},
        "evaluation": {"dataset": "validation traces", "metrics": {"regret": -0.125}},
    }
    head.save_pretrained(tmp_path / "head")
    export.run(export.ExportConfig(str(tmp_path / "head"), str(tmp_path / "out")))
    certificate = {
        "metric": "exact_match",
        "limit": 0.01,
        "prompts": 500,
        "temperature": 0.0,
        "dtype": "float32",
    }
    set_operating_point(tmp_path / "out", 0.25, {**certificate, "engine": "transformers 5"})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["lossy"] is True
    assert {"deferral_head_type", "stage", "features", "schema_hash", "recalibration", "alpha"} <= set(config)
    assert config["certificate"]["engine"] == "transformers 5"
    assert config["pair"] == head.metadata["pair"]
    assert config["training"] == head.metadata["training"]
    assert config["cost"]["microseconds_per_token"] > 0
    card = (tmp_path / "out" / "README.md").read_text()
    from huggingface_hub import ModelCard

    data = ModelCard(card).data
    result = data.eval_results[0]
    assert (result.metric_type, result.metric_value, result.dataset_name) == (
        "regret",
        -0.125,
        "validation traces",
    )
    for said in ("exact\\_match", "float32", "microseconds\\_per\\_token", "Lossy", "bb", "prefixes"):
        assert said in card
    again = DeferralHead.from_pretrained(tmp_path / "out")
    assert again.gap(summary_of(20)).equal(head.gap(summary_of(20)))
