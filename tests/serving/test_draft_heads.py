"""EAGLE, EAGLE-3 and MTP heads as drafters, on both runners: which tokens a rule lets stand, and with what probability.

The heads are tiny and fitted on the spot (draft_heads.py); a chi-square test fails by chance with probability at most
FAILURE, and there are 12 of them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from draft_heads import Reference, register_mimo, save_eagle, save_eagle3, save_mtp
from engines import (
    DRAFTS,
    counts,
    drafted_and_accepted,
    generate,
    per_block,
    prompts,
    save_pair,
    seam_of,
    start,
    stop,
    uniformity,
    use,
)

from deferral_train.errors import InputError
from deferral_train.heads import DeferralHead
from deferral_train.rules import make_rule
from deferral_train.traces import open_traces
from deferral_train.training.config import FitConfig
from deferral_train.training.fit import fit

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "fit"
pytestmark = pytest.mark.engine
FAILURE = 1e-7
LENGTH, REDUCED = 16, 26
SPECS = ("opt:alpha=0.3", "chow:alpha=0.6", "token_v3:alpha=0.5")
SLOW = pytest.mark.slow
CASES = [
    ("eagle3_reduced", "V1"),
    *(pytest.param(method, "V1", marks=SLOW) for method in ("eagle", "eagle3", "mtp")),
    pytest.param("eagle3_reduced", "V2", marks=pytest.mark.v2),
    *(pytest.param(method, "V2", marks=[pytest.mark.v2, SLOW]) for method in ("eagle", "eagle3", "mtp")),
]


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


@pytest.mark.parametrize(("method", "runner"), CASES)
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
        few = runner == "V2"  # whose kernels are interpreted
        checks_greedy(engine, reference, asked[:4] if few else asked, SPECS[:1] if few else SPECS)
        checks_law(engine, reference, 64 if few else 240)
    finally:
        stop(engine)


def checks_greedy(engine, reference, asked, specs):
    said, kept = {}, 0
    for spec in specs:
        seam = use(engine, rule=spec)
        rule = seam.config.make_rule()
        before = drafted_and_accepted(engine)
        said[spec] = generate(engine, asked, max_tokens=LENGTH)
        after, found = drafted_and_accepted(engine), counts(seam)
        expected = [reference.text(rule, row, LENGTH, DRAFTS) for row in asked]
        assert said[spec] == [text for text, _, _ in expected], spec
        assert found["drafted"] == after[0] - before[0] > 0
        assert found["refused_drafter_law"] == found["refused_fault"] == 0
        assert found["accepted"] + found["kept"] > 0
        assert found["rejected"] > 0
        kept += found["kept"]
    assert kept > 0
    seam = use(engine, rule=SPECS[0])
    plain = [reference.text(make_rule("lossless"), row, LENGTH, DRAFTS)[0] for row in asked]
    assert generate(engine, asked, {"deferral_lossless": 1}, max_tokens=LENGTH) == plain
    assert plain != said[SPECS[0]]
    use(engine, rule=SPECS[0], max_request_loss=0.0)
    assert generate(engine, asked, max_tokens=LENGTH) == plain


def checks_law(engine, reference, count):
    """The first drafted token of every answer, whose prefix fixes both distributions."""
    prompt, rule = [2, 5, 6, 7], make_rule("opt", alpha=-0.2)
    use(engine, rule="opt:alpha=-0.2")
    tokens = generate(engine, [prompt] * count, max_tokens=2, temperature=1.0)
    found = {}
    for first in {row[0] for row in tokens}:
        verifier, begin = reference.verifier_logits([*prompt, first])
        found[first] = (verifier[-1], reference.step(begin[-2], first)[0])
    verifier, drafter = (torch.stack([found[row[0]][part] for row in tokens]).double() for part in (0, 1))
    second = torch.tensor([row[1] for row in tokens])
    pi, order = rule.target(drafter, verifier), (verifier - drafter).argsort(-1)
    assert uniformity(pi, second, order) > FAILURE
    # The test can tell pi from at least one of the two that it lies between.
    assert min(uniformity(one.softmax(-1), second, order) for one in (drafter, verifier)) < 1e-4


def test_an_eagle3_drafter_goes_from_log_to_a_served_head(tmp_path):
    """Of a pair that no other program runs; with a reduced draft vocabulary KL is infinite, and refused by `fit`."""
    pair, drafter = made(tmp_path, "eagle3_reduced")
    speculative, asked = {"model": str(drafter), "method": "eagle3"}, prompts(150, seed=21)
    log = {"folder": str(tmp_path / "traces"), "fraction": 1.0, "queue": 100_000}
    engine = start(pair, {"log": log}, speculative=speculative)
    try:
        generate(engine, asked, temperature=1.0)
    finally:
        stop(engine)
    traces = open_traces(tmp_path / "traces", verify=True)
    assert traces.manifest.pair["drafter"]["name"] == "head"
    assert np.isfinite(traces.column("tv")).all()
    assert np.isinf(traces.column("kl")).all()
    with pytest.raises(InputError, match=r"feature kl is not finite in .* fit without it"):
        fit(FitConfig(train=str(tmp_path / "traces"), truth="verifier", epochs=1), tmp_path / "refused")
    told = yaml.safe_load((CONFIGS / "reduced_vocabulary.yaml").read_text())
    features = tuple(told["model"]["head"]["init_args"]["features"])
    config = FitConfig(
        train=str(tmp_path / "traces"), truth=told["data"]["truth"], features=features, hidden=(8,), epochs=4
    )
    head = fit(config, tmp_path / "fit").head
    head.metadata["alpha"] = 0.1
    DeferralHead.save_pretrained(head, tmp_path / "served")
    engine = start(pair, {"head": str(tmp_path / "served"), "mode": "shadow"}, speculative=speculative)
    try:
        seam = seam_of(engine)
        assert not seam.requests.mismatch
        generate(engine, asked, temperature=1.0)
        predicted = per_block(counts(seam), "shadow_")
        seam = use(engine, head=str(tmp_path / "served"))
        generate(engine, asked, temperature=1.0)
        served, found = per_block(counts(seam), ""), counts(seam)
    finally:
        stop(engine)
    assert min(found["kept"], found["rejected"]) > 0
    # Means per block; a false alarm at 5 standard errors has probability below 1e-6.
    assert abs(predicted[0] - served[0]) < 5 * (predicted[1] ** 2 + served[1] ** 2) ** 0.5, (
        predicted,
        served,
    )
