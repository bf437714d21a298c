"""The loop, the V1 runner and the V2 runner decide alike: one text of the loop, which both runners must say.

Prompts of one length, greedily, in float32. The loop begins with the verifier's first token, which no engine drafts, so
that blocks begin at the same places everywhere. All rules go through one step of the engine, a rule to each request.
"""

from __future__ import annotations

import pytest
from engines import (
    DRAFTS,
    counts,
    generate,
    greedy_text,
    looking_up,
    loop,
    prompts,
    save_pair,
    start,
    stop,
    use,
)

from deferral_train.heads.rules import learned_rule
from deferral_train.rules import RULES, make_rule
from deferral_train.serving.blocks import RowSettings

pytestmark = pytest.mark.engine
LENGTH, EACH = 16, 2
RUNNERS = [pytest.param("V1", id="V1"), pytest.param("V2", id="V2", marks=pytest.mark.v2)]
# Those that need a head or a table, one that never drafts, and one for which the loop asks the drafter alone, after
# blocks too.
APART = ("judge", "csd", "learned", "token_gap", "verifier_only", "drafter_only")


def rules_of(pair, folder):
    """Every rule at its default setting, one that is lenient, and heads that look tokens up and read hidden states."""
    rules = {name: make_rule(name) for name in RULES if name not in APART}
    rules |= {
        "opt, lenient": make_rule("opt", alpha=0.9),
        "token_v3, lenient": make_rule("token_v3", alpha=0.9),
    }
    rules |= {"fly, short": make_rule("fly", window=1)}
    for kind in ("gap", "token_gap"):
        head = looking_up(pair, kind, folder / kind)
        rules |= {f"{kind} {alpha}": learned_rule(head, alpha) for alpha in (-0.4, 0.0, 0.4)}
    return rules


@pytest.mark.parametrize("runner", RUNNERS)
def test_every_rule_and_head_decides_as_in_the_loop(tmp_path, runner):
    pair = save_pair(tmp_path / "pair")
    rules, asked = rules_of(pair, tmp_path), prompts(EACH, seed=6, shortest=6, longest=6)
    begun = [row + first for row, first in zip(asked, greedy_text(pair, asked, 1))]
    expected, firsts = {}, [row[-1:] for row in begun]
    for name, rule in rules.items():
        # Longer than is compared: the loop cuts its last block at the limit, the engine runs over it.
        said = loop(pair, rule, begun, LENGTH - 1 + DRAFTS + 1, 0.0).sequences[:, 7 : 6 + LENGTH].tolist()
        expected[name] = [first + text for first, text in zip(firsts, said)]
    assert len({str(texts) for texts in expected.values()}) > 8  # the rules say different things

    llm = start(pair, {"rule": "opt:alpha=0.2"})
    try:
        assert llm.llm_engine.vllm_config.use_v2_model_runner == (runner == "V2")
        seam = use(llm, rule="opt:alpha=0.2")
        seam.adopt(seam.config, rules["gap 0.0"])  # so that hidden states are kept
        if runner == "V2":
            seam.rules = seam.reads = lambda request: True
        admit, each = seam.requests.of, iter([rule for rule in rules.values() for _ in range(EACH)])

        def of(*arguments):
            request = admit(*arguments)
            request.settings, request.logged = (
                RowSettings(next(each)),
                runner == "V1",
            )  # decided by us, whatever its rule
            return request

        seam.requests.of = of
        said = generate(llm, asked * len(rules), max_tokens=LENGTH)
        found = counts(seam)
    finally:
        stop(llm)
    assert next(each, None) is None
    texts = {name: said[EACH * place : EACH * (place + 1)] for place, name in enumerate(rules)}
    assert texts == expected
    assert min(found["kept"], found["accepted"], found["rejected"]) > 0
    assert found["refused_fault"] == found["refused_drafter_law"] == found["engine_steps"] == 0
