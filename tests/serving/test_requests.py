"""What is remembered of a request, and counters on their way to the front process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from deferral_train.serving.blocks import Outcome
from deferral_train.serving.config import ServingConfig
from deferral_train.serving.counters import Collector, Counters, read_folder
from deferral_train.serving.requests import MOST_DIALS, Requests, chosen
from deferral_train.serving.shadow import Shadow


class CertifiedHead:
    features = ("drafter_max",)
    stage = "verify"

    def __init__(self, temperature):
        self.metadata = {"certificate": {"temperature": temperature}}

    def gap(self, summary):
        return 0.5 - summary.drafter_max


def requests(rule="opt:alpha=0.2", mismatch=(), **settings):
    config = ServingConfig(rule=rule, **settings)
    return Requests(config, config.make_rule(), mismatch)


def test_a_request_keeps_its_own_dial_limit_and_account():
    known = requests(max_request_loss=2.0)
    first = known.of("a", 1.0, {"deferral_dial": 0.4, "deferral_max_request_loss": 1.0})
    second = known.of("b", 1.0, None)
    assert (first.settings.rule.dial_value, first.settings.limit) == (0.4, 1.0)
    assert (second.settings.rule.dial_value, second.settings.limit) == (0.2, 2.0)
    first.spend(0.25)
    first.spend(0.5)
    # Preempted and back: the same object, with what it has spent.
    assert known.of("a", 1.0, None).settings.spent == 0.75
    assert known.of("b", 1.0, None).settings.spent == 0.0
    assert known.of("c", 1.0, {"deferral_dial": 0.4}).settings.rule is first.settings.rule
    assert known.forget(["a", "never seen", "c"]) == ["a", "c"]
    assert known["a"].idle
    assert known.of("a", 1.0, None).settings.spent == 0.0


def test_any_number_of_dials_is_remembered_up_to_a_number():
    known = requests()
    shadow = Shadow("unused.json", "opt:alpha=0.2", known.rule)
    outcome = Outcome.empty(1, 3)
    for n in range(3 * MOST_DIALS):
        request = known.of(str(n), 1.0, {"deferral_dial": n / 1000})
        assert request.settings.rule.dial_value == n / 1000
        shadow.add([str(n)], [request.settings], outcome, outcome)
        shadow.finished([str(n)])
    assert len(known._dialled) == MOST_DIALS
    assert len(shadow._sums) == MOST_DIALS + 1  # one of them for all others together
    assert sum(count for count, _, _ in shadow._sums.values()) == 3 * MOST_DIALS


@pytest.mark.parametrize(
    ("options", "settings", "reason"),
    [
        ({"deferral_lossless": True}, {}, "asked"),
        ({}, {"mismatch": ["weights differ"]}, "pair"),
        ({"deferral_nonsense": 1}, {}, "options"),
    ],
)
def test_a_request_that_the_rule_is_not_for_is_served_lossless_with_a_reason(options, settings, reason):
    request = requests(**settings).of("a", 1.0, options)
    assert request.refused == reason
    assert request.settings.rule.is_lossless
    assert request.idle


def test_an_uncertified_temperature_is_served_lossless():
    from deferral_train.rules import make_rule

    rule = make_rule("learned", head=CertifiedHead(0.0), alpha=0.1)
    known = Requests(ServingConfig(head="h"), rule)
    assert known.of("greedy", 0.0, None).refused is None
    assert known.of("sampled", 0.7, None).refused == "temperature"


def test_the_logged_share_is_a_matter_of_the_id():
    names = [f"request-{n}" for n in range(4000)]
    share = sum(chosen(name, 0.1) for name in names) / len(names)
    assert abs(share - 0.1) < 5 * (0.1 * 0.9 / 4000) ** 0.5
    assert all(chosen(name, 1.0) for name in names)


def test_counters_of_several_processes_are_added_up(tmp_path):
    code = (
        "import sys; from deferral_train.serving.counters import Counters; import numpy as np\n"
        "c = Counters(sys.argv[1], sys.argv[2]); c.add('drafted', 7); c.add_places('reached', np.ones(40))"
    )
    for label in ("0", "0", "1"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path), label], check=True, env=os.environ)
    found = read_folder(str(tmp_path))
    assert {label: counters.get("drafted") for label, counters in found.items()} == {"0": 14.0, "1": 7.0}
    assert sum(found["0"].places("reached")) == 80
    (tmp_path / "0-bad.f64").write_bytes(b"cut")
    assert read_folder(str(tmp_path))["0"].get("drafted") == 14.0


def test_counters_without_a_folder_stay_in_memory():
    counters = Counters("/nonexistent")
    counters.add("steps", 2)
    assert counters.get("steps") == 2


def test_the_collector_speaks_prometheus(tmp_path):
    prometheus = pytest.importorskip("prometheus_client", reason="comes with vLLM")
    counters = Counters(str(tmp_path), "0")
    counters.add("drafted", 5)
    counters.add("refused_asked", 2)
    registry = prometheus.CollectorRegistry()
    registry.register(Collector(str(tmp_path)))
    assert registry.get_sample_value("deferral:drafted_total", {"engine": "0"}) == 5
    assert registry.get_sample_value("deferral:refused_total", {"engine": "0", "reason": "asked"}) == 2


def test_importing_the_package_needs_no_vllm():
    code = (
        "import sys; sys.modules['vllm'] = None\n"
        "import deferral_train.serving, deferral_train.serving.entry, deferral_train.serving.checks\n"
        "import deferral_train.serving.seam, deferral_train.serving.trace_log"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
