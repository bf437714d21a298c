"""Measures the speed model (``decoding/drafting/speed.py``) of a pair on this machine, at batch 1.

A verifier pass costs what :mod:`deferral_train.pairs.passes` measures for its width. What the loop adds to it in a
round, what a drafter's step and a prompt cost is fitted to a few short decodings, by non-negative least squares.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from deferral_train.decoding.drafting.speed import LoopSeconds, SpeedModel

if TYPE_CHECKING:
    from deferral_train.decoding import Pair
    from deferral_train.pairs.prompts import Prompt
    from deferral_train.rules.base import Rule

WIDTHS, REPETITIONS = (1, 2, 4, 8, 16), 15
PROMPTS, TOKENS, TURNS = 3, 16, 2  # of the short decodings
SECONDS = 15.0  # aimed at for all of them together; dear models decode fewer tokens
Named = dict[str, dict[str, Any]]  # settings of ``Pair.generate`` by name
ALONE: Named = {"alone": {}, "alone, one token": {"max_new_tokens": 1}}
PLAIN: Named = {
    "1 draft token": {"num_draft_tokens": 1},
    "8 draft tokens": {"num_draft_tokens": 8},
    "one token": {"max_new_tokens": 1},
}
CASCADES: Named = {
    "vertical, 1": {"drafting": "vertical:tokens=1,copies=8"},
    "vertical, 4": {"drafting": "vertical:tokens=4,copies=8"},
    "vertical, one token": {"drafting": "vertical:tokens=4,copies=8", "max_new_tokens": 1},
}


def measure_speed(pair: Pair, prompts: Sequence[Prompt], rule: Rule, temperature: float = 0.0) -> SpeedModel:
    """Time passes and a few short decodings of some prompts.

    Args:
        prompts: the first :data:`PROMPTS` are decoded.
        rule: decides, as it will.
    """
    from deferral_train.pairs.passes import pass_seconds

    table = {w: seconds[1] for w, seconds in pass_seconds(pair.models, prompts, WIDTHS, REPETITIONS).items()}
    settings = {**ALONE, **PLAIN, **CASCADES}
    room = SECONDS / (len(settings) * TURNS * PROMPTS * 3 * table[1])
    shared = {"max_new_tokens": int(min(TOKENS, max(4, room))), "batch_size": 1, "temperature": temperature}
    rows = {name: np.zeros(4) for name in settings}
    seconds = {name: [np.inf] * PROMPTS for name in settings}
    _decode(pair, prompts[0], rule, shared)  # warms up
    for _, (name, own) in itertools.product(range(TURNS), settings.items()):
        for number, prompt in enumerate(prompts[:PROMPTS]):
            spent, row = _decode(pair, prompt, "verifier_only" if name in ALONE else rule, shared | own)
            seconds[name][number] = min(seconds[name][number], spent)
            rows[name] += row / TURNS
    taken = {name: sum(column[: len(prompts)]) for name, column in seconds.items()}
    whole, first = (rows[name] for name in ALONE)
    token = (taken["alone"] - taken["alone, one token"]) / max(whole[1] - first[1], 1.0)
    token = max(float(token), table[1])
    prompt = max(0.0, float(taken["alone, one token"] / first[0]) - token)
    blank = SpeedModel(table, LoopSeconds(0, 0, 0), LoopSeconds(0, 0, 0), prompt, token)
    plain, cascade = (_fit(blank, [(rows[n], taken[n]) for n in names]) for names in (PLAIN, CASCADES))
    return SpeedModel(table, plain, cascade, prompt, token)


def _fit(model: SpeedModel, measured: Sequence[tuple[np.ndarray, float]]) -> LoopSeconds:
    """Loop seconds that explain measured ones; rows of prompts, verifier calls, drafter calls, drafted tokens."""
    from scipy.optimize import nnls

    left = [
        max(0.0, seconds - calls * float(model.passes([drafted / calls + 1])[0]))
        for (_, calls, _, drafted), seconds in measured
    ]
    found, _ = nnls(np.array([row[:3] for row, _ in measured]), np.array(left))
    return LoopSeconds(*map(float, found))


def _decode(pair: Pair, prompt: Prompt, rule: Rule | str, own: Mapping[str, Any]) -> tuple[float, np.ndarray]:
    """Seconds, and (1, verifier calls, drafter calls, drafted tokens)."""
    from deferral_train.decoding.drafting.spec import drafting_from_spec
    from deferral_train.pairs.passes import now

    options = dict(own)
    if "drafting" in options:
        options["drafting"] = drafting_from_spec(options["drafting"]).plan
    begun = now(pair.models.device)
    stats = pair.generate([prompt], rule=rule, **options).stats
    spent = now(pair.models.device) - begun
    counts = [stats.verifier_calls, stats.drafter_calls, stats.drafted]
    return spent, np.array([1.0, *(float(column.sum()) for column in counts)])
