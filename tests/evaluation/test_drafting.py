"""The proposal of how to draft: chosen by replaying, priced with seconds, judged on prompts that did not choose."""

from __future__ import annotations

import pathlib
import random
from collections import Counter

import numpy as np
import pytest
from tiny_models import tiny_pair

from deferral_train.collecting import CollectConfig, collect
from deferral_train.decoding import Pair
from deferral_train.decoding.drafting.replay import UNKNOWN, Path, Work
from deferral_train.decoding.drafting.spec import drafting_from_spec
from deferral_train.errors import InputError
from deferral_train.evaluation.drafting import propose, propose_for, ways
from deferral_train.evaluation.speed import LoopSeconds, SpeedModel, _fit
from deferral_train.pairs.load import make_pair
from deferral_train.pairs.prompts import Prompt
from deferral_train.rules import make_rule
from deferral_train.traces import open_traces


def costs(step: float, width: float = 0.0) -> SpeedModel:
    """A verifier pass takes a second and ``width`` more for each further token, a drafter's ``step``."""
    free = LoopSeconds(0.0, 0.0, step)
    return SpeedModel({1: 1.0, 16: 1.0 + 15 * width}, free, free, prompt=0.0, token=1.0)


def texts(count: int, right: float, copies: bool, length: int = 40) -> list[Path]:
    """Texts whose drafter is right that often; ``copies``: the prompt is the text."""
    draw, found = random.Random(4), []
    for _ in range(count):
        tokens = [draw.randrange(10, 30_000) for _ in range(length)]
        stands = [draw.random() < right for _ in tokens]
        guesses = [token if ok else UNKNOWN for token, ok in zip(tokens, stands)]
        found.append(
            Path([5, *tokens] if copies else [5], tokens, [guesses], [stands], length + 20, separate=True)
        )
    return found


def test_the_best_number_of_draft_tokens_is_that_of_the_formula() -> None:
    """Independent acceptances and no copies: the maximum of EWIF, and its value."""
    from drafting.ewif import ewif_plain

    found = propose(texts(60, 0.8, copies=False, length=200), make_rule("lossless"), costs(0.1), (), used=2)
    tried = (1, 2, 3, 4, 5, 6, 8, 10)
    best = max(tried, key=lambda k: ewif_plain(0.8, k, 0.1))
    assert ewif_plain(0.8, found["num_draft_tokens"], 0.1) > 0.99 * ewif_plain(0.8, best, 0.1)
    # 6,000 judging tokens, 2,100 rounds: 5% is more than four standard deviations.
    assert found["speed"]["value"] == pytest.approx(ewif_plain(0.8, best, 0.1), rel=0.05)
    assert found["used"]["speed"]["value"] == pytest.approx(ewif_plain(0.8, 2, 0.1), rel=0.05)
    assert found["beats_verifier"]
    assert found["speed"]["low"] < found["speed"]["value"] < found["speed"]["high"]


def test_copies_are_used_where_texts_copy() -> None:
    found = propose(texts(24, 0.9, copies=True), make_rule("lossless"), costs(0.5, width=0.01), ())
    assert found["drafting"] is not None
    assert found["flags"] == f"--drafting {found['drafting']}"
    assert drafting_from_spec(found["drafting"]).plan.one_hot_tail
    assert found["speed"]["value"] > 2


def test_a_drafter_that_is_never_right_is_said_not_to_pay() -> None:
    found = propose(texts(24, 0.0, copies=False), make_rule("opt", alpha=0.1), costs(0.3), (), used=5)
    assert not found["beats_verifier"]
    assert found["num_draft_tokens"] == 1
    assert found["speed"]["value"] == pytest.approx(
        1 / 1.3, rel=0.02
    )  # nothing is drafted before the limit only


def test_rules_that_read_the_drafters_confidence_get_no_bare_copies() -> None:
    assert all(not way.plan.one_hot_tail for way in ways(make_rule("opt", alpha=0.1)))
    assert any(way.plan.one_hot_tail for way in ways(make_rule("token_v3", alpha=0.1)))
    with pytest.raises(InputError, match="at least two"):
        propose(texts(1, 1.0, copies=False), make_rule("lossless"), costs(0.1), ())


@pytest.mark.parametrize(
    ("prefixes", "temperature", "message"),
    [
        ("drafter", 0.0, "texts of the drafter, which decoding does not write"),
        ("verifier", 1.0, "temperature is 0, the traces' texts were written at 1"),
    ],
)
def test_texts_that_decoding_does_not_write_are_refused(
    tmp_path: pathlib.Path, prefixes: str, temperature: float, message: str
) -> None:
    models = make_pair(*tiny_pair("llama", 2))
    prompts = [Prompt(str(n), f"w{n} w{n + 1}") for n in range(2)]
    config = CollectConfig(prefixes=prefixes, temperature=temperature, max_new_tokens=4, device="cpu")
    collect(config, tmp_path / "traces", progress=False, models=models, prompts=prompts)
    with pytest.raises(InputError, match=message):
        propose_for(Pair(models), prompts, make_rule("lossless"), open_traces(tmp_path / "traces"))


def test_what_the_loop_adds_to_its_passes_is_found_again() -> None:
    """Prompts, verifier calls, drafter calls, drafted tokens of three short decodings, and their seconds."""
    table = {1: 0.010, 2: 0.012, 4: 0.013, 16: 0.025}
    blank = SpeedModel(table, LoopSeconds(0, 0, 0), LoopSeconds(0, 0, 0), 0.0, 0.0)
    assert blank.passes([1, 3, 10, 20]) == pytest.approx([0.010, 0.0125, 0.019, 0.029])
    known, measured = LoopSeconds(0.004, 0.002, 0.003), []
    for row in ([3, 40, 40, 40], [3, 20, 160, 160], [3, 3, 0, 0]):
        passes = row[1] * float(blank.passes([row[3] / row[1] + 1])[0])
        seconds = passes + row[0] * known.prompt + row[1] * known.round + row[2] * known.step
        measured.append((np.array(row, dtype=float), seconds))
    found = _fit(blank, measured)
    assert (found.prompt, found.round, found.step) == pytest.approx((0.004, 0.002, 0.003))
    # The time of a text: its prompt, its rounds by their width, its drafter steps.
    whole = SpeedModel(table, found, found, 0.0, 0.0)
    work = Work(9, 3, (4,), 0, (Counter({1: 1, 4: 2}), Counter({1: 4})))
    assert whole.of(work, cascade=False) == pytest.approx(0.004 + 0.010 + 2 * 0.013 + 3 * 0.002 + 4 * 0.003)
