"""The fitted threshold against walking along every chain, and where it must end up."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import WORDS, save_tiny_pair

from deferral_train import cli
from deferral_train.collecting import CollectConfig, collect
from deferral_train.decoding.drafting.stop_fit import fit_chains, fit_cumulative
from deferral_train.errors import InputError
from deferral_train.traces import open_traces


def walked(confidence, acceptance, prompt, cost: float, longest: int, threshold: float) -> float:
    """Tokens per verifier time, block by block, as CumulativeStop would have cut it."""
    tokens = spent = 0.0
    for start in range(len(prompt)):
        chance = reach = 1.0
        tokens, spent = tokens + 1, spent + 1
        for row in range(start, min(start + longest, len(prompt))):
            if prompt[row] != prompt[start]:
                break
            chance, reach = chance * confidence[row], reach * acceptance[row]
            tokens, spent = tokens + reach, spent + cost
            if chance < threshold:
                break
    return tokens / spent


def test_the_fit_is_the_best_of_all_thresholds() -> None:
    numbers = random.Random(3)
    confidence = [numbers.choice([0.3, 0.6, 0.9, 0.95]) for _ in range(60)]
    acceptance = [float(numbers.random() < value) for value in confidence]
    prompt = [row // 20 for row in range(60)]
    fit = fit_chains(*map(torch.tensor, (confidence, acceptance, prompt)), cost=0.2, longest=6)
    arguments = (confidence, acceptance, prompt, 0.2, 6)
    # Single precision columns: a product may fall on either side of itself.
    around = [fit.threshold * (1 - 1e-5), fit.threshold * (1 + 1e-5)]
    assert max(walked(*arguments, value) for value in around) == pytest.approx(fit.speed, rel=1e-6)
    assert walked(*arguments, 0.0) == pytest.approx(fit.constant)
    assert fit.speed > fit.constant
    grid = [walked(*arguments, step / 400) for step in range(401)]
    assert fit.speed >= max(grid) - 1e-9


def test_the_best_constant_is_the_best_of_all_lengths() -> None:
    numbers = random.Random(4)
    confidence = [numbers.choice([0.3, 0.9]) for _ in range(60)]
    acceptance = [float(numbers.random() < value) for value in confidence]
    prompt = [row // 20 for row in range(60)]
    fit = fit_chains(*map(torch.tensor, (confidence, acceptance, prompt)), cost=0.2, longest=6)
    speeds = [walked(confidence, acceptance, prompt, 0.2, length, 0.0) for length in range(1, 7)]
    assert fit.best_constant == pytest.approx(max(speeds))
    assert fit.best_length == speeds.index(max(speeds)) + 1
    assert fit.best_constant >= fit.constant


def collected(root: Path, name: str, **settings: Any) -> Path:
    """Traces of a tiny pair along the verifier's text."""
    out = root / name
    config = CollectConfig(
        *(str(root / role) for role in ("drafter", "verifier")), str(root / "prompts.jsonl"), "verifier",
        max_new_tokens=12, device="cpu", **settings,
    )  # fmt: skip
    collect(config, out, progress=False)
    return out


def test_traces_to_threshold_to_decoding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Collect, fit, paste: with greedy decoding the stop drafts as the fit said, in the verifier's own words."""
    save_tiny_pair("llama", tmp_path)
    draw = random.Random(0)
    rows = [{"id": str(n), "prompt": " ".join(draw.choices(WORDS, k=5))} for n in range(24)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    traces = collected(tmp_path, "traces", temperature=0.0)
    command = ["choose", "--stop=cumulative", "--num-draft-tokens=8", f"--out={tmp_path / 'choice'}"]
    seconds = ["--drafter-seconds=0.001", "--verifier-seconds=0.004"]
    assert cli.main([*command, *seconds, f"--traces={traces}"]) == 0
    record = json.loads((tmp_path / "choice" / "stop.json").read_text())
    printed = capsys.readouterr().out
    assert f"--num-draft-tokens 8 --stop {record['stop']}" in printed
    fit = fit_cumulative(open_traces(traces), 0.25, 8)
    assert record["expected_tokens_per_second"] == pytest.approx(fit.speed / 0.004)
    assert record["expected_tokens_per_second"] > record["best_constant"]["tokens_per_second"]
    flags = {role: tmp_path / role for role in ("drafter", "verifier")}
    flags |= {"prompts": tmp_path / "prompts.jsonl", "max-new-tokens": 12, "num-draft-tokens": 8}
    counted = {}
    for name, more in (("with", [f"--stop={record['stop']}"]), ("without", [])):
        out = tmp_path / name
        words = [f"--{flag}={value}" for flag, value in flags.items()]
        assert cli.main(["decode", *words, *more, f"--out={out}"]) == 0
        texts = [json.loads(line)["tokens"] for line in (out / "outputs.jsonl").read_text().splitlines()]
        summary = json.loads((out / "summary.json").read_text())["rules"]["lossless"]["counts"]
        counted[name] = texts, summary["drafted"], summary["verifier_calls"], summary["emitted"]
    assert counted["with"][0] == counted["without"][0]
    speeds = {
        name: emitted / (calls + 0.25 * drafted) for name, (_, drafted, calls, emitted) in counted.items()
    }
    assert speeds["with"] > speeds["without"]
    # Two folders are one: the fit does not run from one into the other.
    half = collected(tmp_path, "half", temperature=0.0, limit=10)
    both = fit_cumulative([open_traces(half), open_traces(half)], 0.25, 8)
    assert both.speed == pytest.approx(fit_cumulative(open_traces(half), 0.25, 8).speed)
    for words, message in (
        ([f"--traces={traces}"], "drafter_seconds=None, verifier_seconds=None: give both, above 0"),
        (seconds, "stop is fitted on traces; give traces of this pair"),
        ([f"--traces={traces}", *seconds, "--metric=chrf"], "reads no metric; leave metric out"),
        ([f"--traces={traces}", *seconds, "--stop=entropy"], "stop='entropy' is not fitted on traces"),
    ):
        assert cli.main([*command, *words]) == 2
        assert message in capsys.readouterr().err


def test_free_drafts_never_stop_and_dear_ones_stop_at_once() -> None:
    columns = torch.full((50,), 0.9), torch.full((50,), 0.9), torch.zeros(50, dtype=torch.long)
    assert fit_chains(*columns, cost=1e-9, longest=5).drafted == pytest.approx(4.8)  # the last rows end
    dear = fit_chains(*columns, cost=5.0, longest=5)
    assert dear.drafted == pytest.approx(1.0)
    assert dear.speed > dear.constant


def test_what_cannot_be_meant_is_refused() -> None:
    columns = torch.ones(2), torch.ones(2), torch.zeros(2)
    with pytest.raises(InputError, match="cost is 0"):
        fit_chains(*columns, cost=0, longest=3)
    with pytest.raises(InputError, match="longest is 0"):
        fit_chains(*columns, cost=0.1, longest=0)
    with pytest.raises(InputError, match="no rows"):
        fit_chains(*(column[:0] for column in columns), cost=0.1, longest=3)
