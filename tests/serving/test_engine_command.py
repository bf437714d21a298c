"""The engine line of a verdict is what the engine takes: its JSON parses, and the start's checks accept it."""

from __future__ import annotations

import json
import shlex
from types import SimpleNamespace

import pytest

from deferral_train.heads import GapHead
from deferral_train.serving.checks import check_served
from deferral_train.serving.config import ServingConfig
from deferral_train.serving.engine_command import engine_line

PAIR = ("runs/my run/pair/drafter", "runs/my run/pair/verifier")


def chosen(spec, **more):
    return {"rule": spec.partition(":")[0], "spec": spec, "num_draft_tokens": 4, **more}


def taken(line):
    """The words of a line as a shell would hand them over: model, and what the two flags say."""
    words = [word for word in shlex.split(line) if word.strip()]
    assert words[:2] == ["vllm", "serve"]
    assert words[3::2] == ["--speculative-config", "--additional-config"]
    return words[2], *(json.loads(word) for word in words[4::2])


@pytest.mark.parametrize(
    "spec", ["opt:alpha=0.2", "token_v3:alpha=0.123456789", "chow:alpha=0.3", "lossless"]
)
def test_the_line_of_a_rule_is_accepted_by_the_plug_ins_own_checks(spec):
    line, reason = engine_line(chosen(spec), *PAIR, False)
    assert reason is None
    model, speculative, extra = taken(line)
    assert (model, speculative["model"], speculative["num_speculative_tokens"]) == (PAIR[1], PAIR[0], 4)
    rule = ServingConfig.parse(extra["deferral"]).make_rule()
    check_served(rule, SimpleNamespace(**speculative))
    assert rule.dial_value == (float(spec.partition("=")[2]) if "=" in spec else None)


def test_a_head_goes_by_its_folder_and_alpha(tmp_path):
    GapHead(("drafter_max", "verifier_max"), hidden=(4,)).save_pretrained(tmp_path / "head")
    spec = f"learned:head={tmp_path / 'head'},alpha=0.25"
    line, reason = engine_line(chosen(spec, head=str(tmp_path / "head"), value=0.2500001), *PAIR, False)
    assert reason is None
    config = ServingConfig.parse(taken(line)[2]["deferral"])
    assert config.make_rule().alpha == 0.2500001
    GapHead(("drafter_max",), stage="draft", hidden=(4,)).save_pretrained(tmp_path / "early")
    line, reason = engine_line(chosen(spec, head=str(tmp_path / "early"), value=0.1), *PAIR, False)
    assert line is None
    assert "draft-stage head" in reason


@pytest.mark.parametrize(
    ("spec", "is_encoder_decoder", "says"),
    [
        ("opt:alpha=0.2", True, "serves decoder-only pairs"),
        ("verifier_only", False, "never drafts"),
        ("my_pkg.mine:Rule", False, "my_pkg.mine"),
    ],
)
def test_what_cannot_be_served_has_a_reason_instead(spec, is_encoder_decoder, says):
    line, reason = engine_line(chosen(spec), *PAIR, is_encoder_decoder)
    assert line is None
    assert says in reason
    assert "\n" not in reason
