"""The certificate on real outputs: a pool of prompts is the population, calibration sets are drawn from it with
replacement, and violations must stay within delta plus its 99% binomial tolerance.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom

from benchmarks.studies.certificate import violations
from deferral_train.collecting import CollectConfig, collect
from deferral_train.decoding.decode import DecodeConfig, decode
from deferral_train.decoding.outputs import OUTPUTS, read_lines
from deferral_train.decoding.pair import Settings, load_pair
from deferral_train.evaluation.certificate import fixed_sequence
from deferral_train.evaluation.choose import _Outputs, _token_losses, choose_from_outputs
from deferral_train.heads.rules import rule_from_spec
from deferral_train.pairs.prompts import read_prompts, write_prompts
from deferral_train.traces import open_traces

DRAWS = 1000
RULES = ("opt_verifier:alpha=0.05", "opt_verifier:alpha=0.2", "opt_verifier:alpha=0.6")


def count(losses: np.ndarray, limit: float, size: int, confidence: float) -> tuple[int, int]:
    """Draws in which a setting above the limit was certified, and in which anything was."""
    found = violations(losses, limit, size, confidence, DRAWS, 0)
    return found["violations"], found["certified_something"]


def tolerated(confidence: float) -> int:
    return int(binom.ppf(0.99, DRAWS, 1 - confidence))


@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_valid_on_a_pool_of_real_chrf_losses(confidence: float) -> None:
    """Limits just below the mean of each setting that loses: the worst case for the guarantee."""
    pool = json.loads(Path(__file__).with_name("pool.json").read_text())
    losses = np.array(pool["losses"])
    risky = [mean for mean in losses.mean(axis=1) if mean > 0.005]
    assert len(risky) == 2
    for mean in risky:
        broken, useful = count(losses, mean * (1 - 1e-6), 300, confidence)
        assert broken <= tolerated(confidence)
    assert useful > 0.9 * DRAWS  # at the larger limit there is something to certify


@pytest.fixture(scope="module")
def real(t5_pair: Path, multi30k: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few real prompts decoded and logged by the shared pair."""
    root = tmp_path_factory.mktemp("real")
    source, target = (str(multi30k / f"test_2016_flickr.{side}.gz") for side in ("en", "de"))
    prompts = read_prompts(source, reference_path=target, limit=60)
    write_prompts(root / "prompts.jsonl", prompts)
    names = str(t5_pair / "drafter"), str(t5_pair / "verifier")
    rules = {name: rule_from_spec(name) for name in ("lossless", *RULES)}
    settings = DecodeConfig(Settings(max_new_tokens=30, batch_size=60))
    decode(load_pair(*names, "cpu", "float32"), prompts, rules, settings, root / "decode")
    config = CollectConfig(
        *names, prompts=str(root / "prompts.jsonl"), device="cpu", dtype="float32", temperature=0.0
    )
    collect(config, root / "traces")
    return root


def test_valid_on_outputs_of_the_shared_pair(real: Path) -> None:
    rows = list(read_lines(real / "decode" / OUTPUTS))
    outputs = _Outputs.of(rows, None, None)
    base = outputs.scores("lossless", "chrf")
    losses = np.stack([base - outputs.scores(rule, "chrf") for rule in RULES])
    limit = losses.mean(axis=1).max() * (1 - 1e-6)
    assert limit > 0
    assert count(losses, limit, 200, 0.9)[0] <= tolerated(0.9)
    # `choose` looks at the same losses in the same order.
    certified = fixed_sequence(losses, 0.3, 0.95, low=-1, high=1).certified
    choice = choose_from_outputs(rows, metric="chrf", max_loss=0.3)
    assert choice.setting.label == RULES[certified - 1]


def test_valid_on_traces_of_the_shared_pair(real: Path) -> None:
    """The local token risk of OPT with P := p, per prompt, at 15 settings."""
    losses = _token_losses(
        open_traces(real / "traces"), "opt_verifier", "opt_verifier", "reference", None, 15
    )
    means = losses.mean(axis=1)
    limit = float(np.quantile(means, 0.6)) * (1 - 1e-6)
    assert (means > limit).any()
    violations, _ = count(losses, limit, 200, 0.9)
    assert violations <= tolerated(0.9)
