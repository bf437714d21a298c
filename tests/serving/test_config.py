"""What a user may say, at start and per request, and what is refused in one line."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from deferral_train.errors import InputError
from deferral_train.rules import make_rule
from deferral_train.serving.checks import (
    check_graphs,
    check_scheduling,
    check_served,
    check_version,
    forced_runner,
    version_warning,
)
from deferral_train.serving.config import LogConfig, RequestOptions, ServingConfig
from deferral_train.serving.counters import BLOCK_COUNTERS, OTHER_COUNTERS, REFUSALS
from deferral_train.serving.layout import last_tokens, previous_tokens
from deferral_train.serving.runner_v1 import check_proposer


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ([], r"deferral is \[\]; write an object"),
        ({}, "nothing to do; give a rule, a head, or a log"),
        ({"rul": "opt"}, "deferral.rul is unknown; known: rule, head"),
        ({"rule": 3}, "deferral.rule is 3; write a text"),
        ({"rule": "opt", "head": "h"}, "both a rule and a head"),
        ({"rule": "opt", "alpha": 0.1}, "deferral.alpha belongs to a head"),
        ({"rule": "opt", "shadow_file": "s.json"}, 'shadow_file belongs to "mode": "shadow"'),
        ({"log": {"folder": "f", "settings": 3}}, "deferral.log.settings is 3; write an object"),
        ({"rule": "opt", "mode": "dark"}, "deferral.mode is 'dark'; use one of serve, shadow"),
        ({"rule": "opt", "max_request_loss": -1}, "max_request_loss is -1; use a number >= 0"),
        ({"rule": "opt", "max_request_loss": "much"}, "max_request_loss is 'much'; use a finite number"),
        ({"rule": "opt", "dial_range": [1]}, r"dial_range is \[1\]; write \[lowest, highest\]"),
        ({"rule": "opt", "dial_range": [1, 0]}, "dial_range"),
        ({"rule": "opt", "guard": [0.1]}, r"guard is \[0.1\]; write \[lowest, highest\]"),
        ({"rule": "opt", "guard": [0.2, 0.1]}, r"guard is \[0.2, 0.1\]; write \[lowest, highest\]"),
        ({"rule": "opt", "guard": [0, "x"]}, "guard is 'x'; use a finite number"),
        ({"rule": "opt", "guard_after": 0}, "guard_after is 0; use a whole number above 0"),
        ({"log": {}}, "log.folder is not given"),
        ({"log": {"folder": "t", "fraction": 0}}, "log.fraction is 0.0; use a share above 0"),
        ({"log": {"folder": "t", "fraction": True}}, "log.fraction is True; use a finite number"),
        ({"log": {"folder": "t", "queue": 0}}, "log.queue is 0; use a whole number above 0"),
        ({"log": {"folder": "t", "text": 1}}, "log.text is 1; use true or false"),
        ({"log": {"folder": "t", "speed": 1}}, "log.speed is unknown"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(value, line):
    with pytest.raises(InputError, match=line) as found:
        ServingConfig.parse(value)
    assert "\n" not in str(found.value)


def test_a_rule_is_named_as_on_the_command_line():
    config = ServingConfig.parse({"rule": "opt:alpha=0.25", "max_request_loss": 2, "dial_range": [0, 0.5]})
    rule = config.make_rule()
    assert (rule.name, rule.dial_value, config.max_request_loss) == ("opt", 0.25, 2.0)
    assert ServingConfig.parse({"head": "folder", "alpha": 0.1}).spec == "learned:head=folder,alpha=0.1"
    assert ServingConfig.parse({"log": {"folder": "t"}}).make_rule().is_lossless


@pytest.mark.parametrize(
    ("extra", "line"),
    [
        ({"deferral_alpha": 1}, "deferral_alpha is unknown; a request may say deferral_lossless"),
        ({"deferral_lossless": "yes"}, "deferral_lossless is 'yes'"),
        ({"deferral_lossless": 2}, "deferral_lossless is 2"),
        ({"deferral_dial": "x"}, "deferral_dial is 'x'; use a finite number"),
        ({"deferral_max_request_loss": -0.1}, "deferral_max_request_loss is -0.1"),
        ({"deferral_max_request_loss": 3}, "this server allows at most 2"),
        ({"deferral_dial": 0.6}, "deferral_dial is 0.6; this server allows 0 to 0.5"),
    ],
)
def test_a_requests_wrong_wish_is_refused_in_one_line(extra, line):
    config = ServingConfig.parse({"rule": "opt:alpha=0.25", "max_request_loss": 2, "dial_range": [0, 0.5]})
    with pytest.raises(InputError, match=line):
        RequestOptions.parse(extra).admit(config, config.make_rule())


def test_a_dial_must_suit_the_rule():
    config = ServingConfig(rule="token_v3:alpha=0.5")
    with pytest.raises(InputError, match="rule token_v3: alpha is 7"):
        RequestOptions.parse({"deferral_dial": 7}).admit(config, config.make_rule())
    with pytest.raises(InputError, match="has no dial"):
        RequestOptions.parse({"deferral_dial": 7}).admit(config, make_rule("lossless"))


def test_other_peoples_extra_arguments_pass():
    assert RequestOptions.parse({"kv_transfer_params": {}, "deferral_lossless": 1}).lossless
    assert RequestOptions.parse(None) == RequestOptions()


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0", "dev"])
def test_an_untested_engine_is_refused_by_its_version(version):
    with pytest.raises(
        InputError, match=f"vLLM {version}: this release of deferral-train works with >=0.32,<0.33"
    ):
        check_version(version)


def test_the_tested_engine_is_taken():
    check_version("0.32.0")
    check_version("0.32.1+cpu")
    assert version_warning("0.32.0") is None


def test_the_engines_refusal_of_a_forced_runner_is_one_line_with_a_remedy():
    said = (
        "1 validation error for VllmConfig\n  Value error, Model Runner V2 does not yet support: speculative method "
        "'suffix', dual batch overlap [type=value_error, input_value=1]\n    For further information"
    )
    line = str(forced_runner(said))
    assert "VLLM_USE_V2_MODEL_RUNNER=1 asks for" in line
    assert "speculative method 'suffix', dual batch overlap; unset" in line
    assert "VLLM_USE_V2_MODEL_RUNNER=0" in str(
        forced_runner("Model Runner V1 does not support: diffusion models")
    )
    assert forced_runner("max_model_len is too large") is None


def test_a_release_whose_python_alone_was_tested_is_taken_with_a_warning():
    check_version("0.33.0")
    assert "vLLM 0.33.1 as it is distributed was not tested" in str(version_warning("0.33.1"))


def test_requests_name_their_traces_only_where_the_server_lets_them():
    options, rule = RequestOptions.parse({"deferral_name": "corpus:7"}), make_rule("opt")
    with pytest.raises(InputError, match="requests do not name their traces"):
        options.admit(ServingConfig(rule="opt"), rule)
    options.admit(ServingConfig(rule="opt", log=LogConfig("f", names=True)), rule)
    with pytest.raises(InputError, match="deferral_name is 7; write a text"):
        RequestOptions.parse({"deferral_name": 7})


def test_previous_tokens_are_refused_where_the_worker_learns_them_late():
    class Remembering:
        features, stage = ("previous_token_1",), "verify"

        def gap(self, summary):
            return summary.previous_token_1

    rule, late = make_rule("learned", head=Remembering(), alpha=0.1), SimpleNamespace(async_scheduling=True)
    check_served(rule, SimpleNamespace(method="draft_model", draft_sample_method="probabilistic"))
    with pytest.raises(InputError, match=r"reads previous tokens.*start with --no-async-scheduling"):
        check_scheduling(rule, SimpleNamespace(scheduler_config=late))
    check_scheduling(rule, SimpleNamespace(scheduler_config=SimpleNamespace(async_scheduling=False)))


def test_previous_tokens_of_a_block():
    before = last_tokens([[], [7], [5, 6, 7, 8]], 3)
    found = previous_tokens(before, torch.tensor([[1, 2, 3], [4, 5, 6], [9, 9, 9]]))
    assert found[0].tolist() == [[-1, 1, 2], [7, 4, 5], [8, 9, 9]]
    assert found[1].tolist() == [[-1, -1, 1], [-1, 7, 4], [7, 8, 9]]
    assert found[2].tolist() == [[-1, -1, -1], [-1, -1, 7], [6, 7, 8]]


def test_a_rule_that_judges_blocks_needs_drafts_longer_than_its_window():
    speculative = SimpleNamespace(method="draft_model", num_speculative_tokens=3)
    check_served(make_rule("fly", window=2), speculative)
    check_served(make_rule("fly", window=3, threshold=1.1), speculative)
    with pytest.raises(
        InputError, match="rule fly waits for 3 drafted tokens behind one, and num_speculative_tokens is 3"
    ):
        check_served(make_rule("fly", window=3), speculative)


def test_hidden_states_of_a_drafter_in_a_cuda_graph_are_refused_by_who_reads_them():
    def engine(method, full):
        mode = SimpleNamespace(has_full_cudagraphs=lambda: full)
        return SimpleNamespace(
            speculative_config=SimpleNamespace(method=method),
            compilation_config=SimpleNamespace(cudagraph_mode=mode),
        )

    class Reading:
        features, stage = ("drafter_hidden",), "verify"

        def gap(self, summary):
            return summary.drafter_hidden.sum(-1)

    rule, plain = make_rule("learned", head=Reading()), ServingConfig(rule="opt")
    line = "rule learned reads the drafter's hidden states, .* method 'eagle3'; start with --enforce-eager"
    with pytest.raises(InputError, match=line):
        check_graphs(rule, plain, engine("eagle3", True))
    logging = ServingConfig(rule="opt", log=LogConfig("f", hidden=True))
    with pytest.raises(InputError, match=r"log\.hidden reads the drafter's hidden states"):
        check_graphs(make_rule("opt"), logging, engine("mtp", True))
    check_graphs(rule, logging, engine("draft_model", True))  # whose steps are never replayed
    check_graphs(rule, logging, engine("eagle3", False))
    check_graphs(make_rule("opt"), plain, engine("eagle3", True))


def test_a_proposer_of_its_own_is_refused_on_v1():
    class Gemma4Proposer:
        pass

    class EagleProposer:
        pass

    check_proposer(EagleProposer())
    with pytest.raises(
        InputError, match=r"proposer of its own \(Gemma4Proposer\), .* VLLM_USE_V2_MODEL_RUNNER=1"
    ):
        check_proposer(Gemma4Proposer())


def test_the_queries_of_the_page_ask_for_counters_that_are_exported():
    page = (Path(__file__).resolve().parents[2] / "docs" / "serving_vllm.md").read_text(encoding="utf-8")
    asked = set(re.findall(r"deferral:(\w+)_total", page))
    exported = {*BLOCK_COUNTERS, *OTHER_COUNTERS, "refused", *(f"shadow_{name}" for name in BLOCK_COUNTERS)}
    assert len(asked) > 10
    assert asked <= exported
    reasons = re.search(r"`refused_total\{reason\}` \| served lossless: (.*) \|", page)[1]
    assert re.findall(r"`(\w+)`", reasons) == list(REFUSALS)
