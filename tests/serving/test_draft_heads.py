"""EAGLE, EAGLE-3 and MTP heads as drafters, on both runners: which tokens a rule lets stand, and with what probability.

The heads are tiny and fitted on the spot (draft_heads.py); a chi-square test fails by chance with probability at most
FAILURE, and there are 12 of them.
"""

from __future__ import annotations

import pytest
import torch
from draft_heads import Reference, register_mimo, save_eagle, save_eagle3, save_mtp
from engines import (
    DRAFTS,
    counts,
    drafted_and_accepted,
    generate,
    prompts,
    save_pair,
    start,
    stop,
    uniformity,
    use,
)

from deferral_train.rules import make_rule

pytestmark = pytest.mark.engine
FAILURE = 1e-7
LENGTH, REDUCED = 16, 26
SPECS = ("opt:alpha=0.3", "chow:alpha=0.6", "token_v3:alpha=0.5")
RUNNERS = ["V1", pytest.param("V2", marks=pytest.mark.v2)]


def made(folder, method):
    """The folder of a pair, and that of its head."""
    if method == "mtp":
        register_mimo()
        pair = save_mtp(folder)
        return pair, pair / "verifier"
    pair = save_pair(folder)
    if method == "eagle":
        return pair, save_eagle(pair, folder / "head")
    return pair, save_eagle3(pair, folder / "head", REDUCED if method == "eagle3_reduced" else None)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("method", ["eagle", "eagle3", "eagle3_reduced", "mtp"])
def test_a_draft_head_is_verified_as_its_checkpoint_says(tmp_path, method, runner):
    """Greedy text by the head's own formula; the distribution of drafted tokens; lossless text; limits; metrics."""
    pair, head = made(tmp_path, method)
    name = method.partition("_")[0]
    reference = Reference(pair, head, name)
    asked = prompts(8, seed=6, shortest=4, longest=8)
    engine = start(
        pair, {"rule": SPECS[0], "max_request_loss": 9.0}, speculative={"model": str(head), "method": name}
    )
    try:
        checks_greedy(engine, reference, asked)
        checks_law(engine, reference, 240 if runner == "V1" else 96)
    finally:
        stop(engine)


def checks_greedy(engine, reference, asked):
    said, kept = {}, {}
    for spec in SPECS:
        seam = use(engine, rule=spec)
        rule = seam.config.make_rule()
        before = drafted_and_accepted(engine)
        said[spec] = generate(engine, asked, max_tokens=LENGTH)
        after, found = drafted_and_accepted(engine), counts(seam)
        expected = [reference.text(rule, row, LENGTH, DRAFTS) for row in asked]
        assert said[spec] == [text for text, _, _ in expected], spec
        assert found["drafted"] == after[0] - before[0] > 0
        assert found["refused_drafter_law"] == found["refused_fault"] == 0
        assert min(found["kept"], found["rejected"]) > 0
        kept[spec] = found["kept"]
    seam = use(engine, rule=SPECS[0])
    plain = [reference.text(make_rule("lossless"), row, LENGTH, DRAFTS)[0] for row in asked]
    assert generate(engine, asked, {"deferral_lossless": 1}, max_tokens=LENGTH) == plain
    assert plain != said[SPECS[0]]
    use(engine, rule=SPECS[0], max_request_loss=0.0)
    assert generate(engine, asked, max_tokens=LENGTH) == plain


def checks_law(engine, reference, count):
    """The first drafted token of every answer, whose prefix fixes both distributions."""
    prompt, rule = [2, 5, 6, 7], make_rule("opt", alpha=0.3)
    use(engine, rule="opt:alpha=0.3")
    tokens = generate(engine, [prompt] * count, max_tokens=2, temperature=1.0)
    found = {}
    for first in {row[0] for row in tokens}:
        verifier, begin = reference.verifier_logits([*prompt, first])
        found[first] = (verifier[-1], reference.step(begin[-2], first)[0])
    verifier, drafter = (torch.stack([found[row[0]][part] for row in tokens]).double() for part in (0, 1))
    second = torch.tensor([row[1] for row in tokens])
    pi, order = rule.target(drafter, verifier), (verifier - drafter).argsort(-1)
    assert uniformity(pi, second, order) > FAILURE
    assert uniformity(drafter.softmax(-1), second, order) < FAILURE
    assert uniformity(verifier.softmax(-1), second, order) < 0.01  # the test can tell
