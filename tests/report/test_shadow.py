"""What shadow mode wrote, on the page: ratios and intervals against a bootstrap over requests, and hostile names."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from deferral_train.errors import InputError
from deferral_train.report import write_report
from deferral_train.report.shadow import find_shadow, shadow
from deferral_train.rules import make_rule
from deferral_train.serving.blocks import Outcome, RowSettings
from deferral_train.serving.shadow import Shadow

REQUESTS, DRAFTS = 300, 4
SPEC = "opt:alpha=0.2"


def outcome(accepted, loss):
    found = Outcome.empty(len(accepted), DRAFTS)
    found.accepted[:], found.loss[:] = torch.tensor(accepted), torch.tensor(loss)
    return found


def written(path, seed=0, first=0, label="0"):
    """The file of an engine that saw `REQUESTS` requests, and each request's four numbers."""
    generator = np.random.default_rng(seed)
    rule = make_rule("opt", alpha=0.2)
    kept, numbers = Shadow(str(path), SPEC, rule, label), np.zeros((REQUESTS, 4))
    names = [f"r{first + number}" for number in range(REQUESTS)]
    kind = generator.random(REQUESTS)  # blocks of one request resemble each other
    for _ in range(12):
        served = generator.binomial(DRAFTS, 0.2 + 0.4 * kind)
        imagined = np.minimum(DRAFTS, served + generator.binomial(2, 0.3 + 0.4 * kind))
        loss = generator.random(REQUESTS) * (imagined - served)
        here = generator.random(REQUESTS) < 0.3 + 0.7 * kind
        at = np.flatnonzero(here)
        plans = [RowSettings(rule)] * len(at)
        kept.add(
            [names[n] for n in at], plans, outcome(served[at], loss[at]), outcome(imagined[at], loss[at])
        )
        numbers[at] += np.stack([np.ones(len(at)), served[at], imagined[at], loss[at]], axis=1)
    kept.add(
        ["lossless"], [RowSettings()], outcome([4], [0.0]), outcome([4], [0.0])
    )  # not for the rule: not counted
    kept.finished(names[:50])
    kept.close()
    return numbers[numbers[:, 0] > 0]


def test_ratios_and_their_intervals_are_those_of_whole_requests(tmp_path):
    numbers = written(tmp_path / "shadow.json")
    (sums,) = find_shadow(tmp_path).values()
    assert sums.requests == len(numbers)
    generator = np.random.default_rng(1)
    draws = numbers[generator.integers(0, len(numbers), (2000, len(numbers)))].sum(axis=1)
    for above, below, of in (
        ({"blocks": 1, "shadow": 1}, {"blocks": 1}, lambda s: (s[..., 0] + s[..., 2]) / s[..., 0]),
        ({"shadow": 1, "served": -1}, {"blocks": 1}, lambda s: (s[..., 2] - s[..., 1]) / s[..., 0]),
        ({"loss": 1}, {"blocks": 1, "shadow": 1}, lambda s: s[..., 3] / (s[..., 0] + s[..., 2])),
    ):
        value, half = sums.ratio(above, below)
        assert value == pytest.approx(of(numbers.sum(axis=0)))
        # The deviation of 2,000 draws is off by more than 10% with probability below 1e-8.
        assert half == pytest.approx(1.96 * of(draws).std(), rel=0.1)


def test_engines_of_one_rule_are_added_up_and_few_requests_have_no_interval(tmp_path):
    both = written(tmp_path / "shadow.json"), written(tmp_path / "shadow.json", 1, REQUESTS, label="1")
    assert (tmp_path / "shadow-1.json").is_file()
    (sums,) = find_shadow(tmp_path).values()
    assert sums.requests == sum(map(len, both))
    np.testing.assert_allclose(sums.sums, sum(part.sum(axis=0) for part in both))
    few = Shadow(str(tmp_path / "few" / "one.json"), SPEC, make_rule("opt", alpha=0.2))
    few.add(["a"], [RowSettings(make_rule("opt", alpha=0.3))], outcome([1], [0.0]), outcome([3], [0.5]))
    few.close()
    found = find_shadow(tmp_path / "nowhere", tmp_path / "few")
    assert list(found) == [f"{SPEC} at alpha=0.3"]  # a request's own dial is a rule of its own
    row = shadow(found)["rows"][0]
    assert (row["switched"]["value"], row["switched"]["range"], row["gain"]["value"]) == ("4.00", "", "2.00")


def test_the_page_shows_it_and_escapes_what_it_is_called(tmp_path):
    (tmp_path / "run").mkdir()
    written(tmp_path / "away.json")
    content = json.loads((tmp_path / "away.json").read_text())
    content["rules"]["<script>alert(1)</script>"] = content["rules"][SPEC]
    (tmp_path / "away.json").write_text(json.dumps(content))
    page = write_report(tmp_path / "run", None, tmp_path / "away.json").read_text()
    assert SPEC in page
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    (tmp_path / "run" / "shadow.json").write_text(json.dumps(content))
    assert SPEC in write_report(tmp_path / "run").read_text()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(kind="other"), "is no shadow file"),
        (lambda c: c.update(schema_version=9), "this release reads 1"),
        (lambda c: c["rules"][SPEC].pop("sums"), "lacks numbers"),
        (lambda c: c["rules"][SPEC].update(requests=10**9), "1 <= requests <= blocks"),
        (lambda c: c["rules"][SPEC]["sums"].__setitem__(2, -1), "sums >= 0"),
        (lambda c: c["rules"][SPEC]["sums"].__setitem__(2, float("nan")), "all numbers are finite"),
        (lambda c: c["rules"][SPEC]["products"][1].__setitem__(1, 0), "n \\* sum x\\^2"),
        (lambda c: c["rules"][SPEC].update(products=[1]), "products \\[4, 4\\]"),
    ],
)
def test_a_file_whose_numbers_cannot_be_is_refused_by_name(tmp_path, change, says):
    written(tmp_path / "shadow.json")
    content = json.loads((tmp_path / "shadow.json").read_text())
    change(content)
    (tmp_path / "shadow.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=says) as found:
        find_shadow(tmp_path)
    assert "shadow.json" in str(found.value)
    assert "\n" not in str(found.value)


def test_a_name_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        find_shadow(tmp_path, tmp_path / "none.json")
    with pytest.raises(InputError, match="holds no JSON file"):
        find_shadow(tmp_path, tmp_path)
