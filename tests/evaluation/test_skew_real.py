"""Offline meets online on the shared pair, at temperature 0, 0.5 and 1: a few prompts of real text, a few rules of
every family. The whole table is `python -m benchmarks.studies.offline_online`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.studies.offline_online import compare
from deferral_train.pairs.prompts import read_prompts

PROMPTS = 60
# A position, a token and a distribution rule; greedy distributions have one token, and when sampling these need few
# more.
RULES = {
    0.0: ("opt:alpha=0.2", "lossy:alpha=0.3"),
    0.5: ("token_v3:alpha=0.5",),
    1.0: ("opt:alpha=0.2", "lossy:alpha=0.3"),
}
TOP_K = {0.0: 16, 0.5: 128, 1.0: 128}


@pytest.fixture(scope="module", params=[0.0, 0.5, 1.0], ids=lambda value: f"T{value:g}")
def rows(
    request: pytest.FixtureRequest, t5_pair: Path, multi30k: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    source, target = (str(multi30k / f"test_2016_flickr.{side}.gz") for side in ("en", "de"))
    prompts = read_prompts(source, reference_path=target, limit=PROMPTS)
    models = str(t5_pair / "drafter"), str(t5_pair / "verifier")
    root = tmp_path_factory.mktemp("skew")
    return compare(
        models, prompts, RULES[request.param], request.param, root, bootstrap=1000, top_k=TOP_K[request.param]
    )


def test_own_prefixes_predict_what_is_counted(rows: list[dict[str, Any]]) -> None:
    """Within 3%, or the 95% interval over prompts holds no difference; greedy decoding is predicted exactly.

    An interval misses one time in twenty, so seeds are fixed and a change of random numbers may fail this by chance:
    then look at `python -m benchmarks.studies.offline_online` over more prompts before anything else.
    """
    own = [row for row in rows if row["on_policy"]]
    assert {row["rule"] for row in own} == set(RULES[rows[0]["temperature"]])
    for row in own:
        assert row["prompts"] == PROMPTS
        if row["temperature"] == 0:
            assert row["predicted"] == pytest.approx(row["counted"], abs=1e-6), row
            continue
        interval = row["difference"]
        near = abs(row["predicted"] - row["counted"]) <= 0.03 * row["counted"]
        assert near or interval["low"] <= 0 <= interval["high"], row
        assert row["agrees"], row


def test_teacher_forced_prefixes_are_named_as_such(rows: list[dict[str, Any]]) -> None:
    """Their difference is stated. When greedy it is the shift of prefixes alone: own prefixes leave none."""
    forced = [row for row in rows if not row["on_policy"]]
    assert {row["prefixes"] for row in forced} == {"reference"}
    assert {row["rule"] for row in forced} == set(RULES[rows[0]["temperature"]])
    if forced[0]["temperature"] == 0:
        assert max(abs(row["relative"]) for row in forced if row["quantity"] == "acceptance") > 0.005
