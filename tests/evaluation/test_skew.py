"""Offline meets online on a real (tiny) pair: what traces predict is what the decoding loop counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_tiny_pair

from deferral_train.collecting import CollectConfig, collect
from deferral_train.decoding.decode import DecodeConfig, decode
from deferral_train.decoding.outputs import OUTPUTS, read_lines
from deferral_train.decoding.pair import Pair, Settings
from deferral_train.errors import InputError
from deferral_train.evaluation import skew
from deferral_train.heads.rules import rule_from_spec
from deferral_train.pairs.load import load_models
from deferral_train.pairs.prompts import Prompt, write_prompts
from deferral_train.traces import Traces, open_traces

GREEDY = ("lossless", "opt:alpha=0.2", "token_v3:alpha=0.3")
SAMPLED = ("opt:alpha=0.1", "cactus:delta=0.3")
PROMPTS = 24
COMMON = {"num_draft_tokens": 3, "max_new_tokens": 16, "seed": 0}


class Runs:
    """Decoded outputs of one temperature, and on-policy traces by rule."""

    def __init__(self, root: Path, temperature: float, specs: tuple[str, ...], blocks: str = "tight") -> None:
        drafter, verifier = save_tiny_pair("t5", root / "pair")
        prompts = [
            Prompt(f"p{n}", " ".join(f"w{(n * 7 + i * i) % 30}" for i in range(8)), None)
            for n in range(PROMPTS)
        ]
        write_prompts(root / "prompts.jsonl", prompts)
        pair = Pair(load_models(str(drafter), str(verifier), "cpu"))
        settings = Settings(
            **COMMON,
            temperature=temperature,
            batch_size=8,
            bonus="exact" if temperature else "verifier",
            blocks=blocks,
        )
        repetitions = 4 if temperature else 1
        rules = {spec: rule_from_spec(spec) for spec in specs}
        decode(pair, prompts, rules, DecodeConfig(settings, repetitions), root / "decode")
        self.rows = list(read_lines(root / "decode" / OUTPUTS))
        self.traces: dict[str, Traces] = {}
        for number, spec in enumerate(specs):
            config = CollectConfig(
                drafter=str(drafter),
                verifier=str(verifier),
                prompts=str(root / "prompts.jsonl"),
                prefixes="cascade",
                rule=spec,
                temperature=temperature,
                log_top_k=20,
                blocks=blocks,
                device="cpu",
                **COMMON,
            )
            collect(config, root / f"traces{number}", progress=False)
            self.traces[spec] = open_traces(root / f"traces{number}")

    def compare(self, spec: str, **options: Any) -> list[dict[str, Any]]:
        rule = rule_from_spec(spec)
        return skew.compare(self.traces[spec], spec, rule, self.rows, num_draft_tokens=3, **options)


@pytest.fixture(scope="module")
def greedy(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("greedy"), 0.0, GREEDY)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Blocks as serving engines lay them."""
    return Runs(tmp_path_factory.mktemp("served"), 0.0, GREEDY, "served")


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("sampled"), 1.0, SAMPLED)


@pytest.mark.parametrize("spec", GREEDY)
@pytest.mark.parametrize("blocks", ["greedy", "served"])
def test_greedy_predictions_on_own_prefixes_equal_the_counts_prompt_by_prompt(
    blocks: str, spec: str, request: pytest.FixtureRequest
) -> None:
    greedy = request.getfixturevalue(blocks)
    (predicted,) = skew.predict(greedy.traces[spec], rule_from_spec(spec), num_draft_tokens=3)
    counted = skew.count(row for row in greedy.rows if row["rule"] == spec)
    ours, theirs = predicted.select(predicted.prompt_ids), counted.select(predicted.prompt_ids)
    for name, values in ours.items():
        assert values == pytest.approx(theirs[name], abs=1e-6), name
    rows = greedy.compare(spec)
    assert [row["quantity"] for row in rows] == list(skew.QUANTITIES)
    assert all(row["agrees"] and row["prompts"] == PROMPTS for row in rows)


@pytest.mark.parametrize("spec", SAMPLED)
def test_sampled_predictions_on_own_prefixes_agree_within_noise(sampled: Runs, spec: str) -> None:
    """Different draws on both sides: the difference lies within 4 standard errors, a 95% interval being 2
    wide.
    """
    for row in sampled.compare(spec, bootstrap=400):
        width = (row["difference"]["high"] - row["difference"]["low"]) / 2
        assert abs(row["difference"]["value"]) <= max(2 * width, 0.03 * row["counted"]), row


def test_what_was_not_logged_is_stated(sampled: Runs) -> None:
    """A rule on whole distributions is predicted within what 20 of 40 logged candidates leave open; others exactly."""
    for row in sampled.compare("opt:alpha=0.1"):
        assert row["tail"] == [row["predicted"]] * 2
    open_rows = sampled.compare("cactus:delta=0.3")
    assert any(row["tail"][0] < row["tail"][1] for row in open_rows)
    for row in open_rows:
        assert row["tail"][0] <= row["predicted"] <= row["tail"][1]


def test_the_wrong_rule_is_caught(greedy: Runs) -> None:
    """Predicting with another dial than was decoded, on the same prefixes, does not pass as agreement."""
    rows = skew.compare(
        greedy.traces["opt:alpha=0.2"],
        "opt:alpha=0.2",
        rule_from_spec("lossless"),
        greedy.rows,
        num_draft_tokens=3,
    )
    table = skew.table_of(rows)
    assert not table["meta"]["on_policy"]  # these prefixes are another rule's
    assert table["meta"]["agree"] < table["meta"]["of"]


def test_prompts_that_do_not_meet_are_refused(greedy: Runs) -> None:
    strangers = [{**row, "id": f"x{row['id']}"} for row in greedy.rows]
    with pytest.raises(InputError, match="share no prompt id"):
        skew.compare(greedy.traces["lossless"], "lossless", rule_from_spec("lossless"), strangers)
    with pytest.raises(InputError, match="no outputs of this rule"):
        skew.compare(greedy.traces["lossless"], "absent", rule_from_spec("lossless"), greedy.rows)
