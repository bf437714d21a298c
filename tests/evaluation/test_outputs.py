"""More metrics of decoded outputs: the likelihood against a float64 pass of its own, and the decode command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny_pair, tiny_pair

from deferral_train import cli
from deferral_train.evaluation.outputs import log_likelihoods
from deferral_train.pairs.prompts import Prompt, write_prompts

TEXTS = [[5, 9, 7, 12, 1], [8], [], [30, 4, 1], [6, 6, 6, 6, 6, 6, 6]]
PROMPTS = [[4, 5, 6], [10, 11, 12, 13, 14], [7, 8], [9], [20, 21]]


def alone(model, prompt: list[int], text: list[int]) -> float:
    """One text at a time, float64, no padding, from the definition."""
    total = 0.0
    for at, token in enumerate(text):
        if model.config.is_encoder_decoder:
            decoder = torch.tensor([[model.config.decoder_start_token_id, *text[:at]]])
            logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder).logits
        else:
            logits = model(input_ids=torch.tensor([[*prompt, *text[:at]]])).logits
        total += float(logits[0, -1].log_softmax(-1)[token])
    return total


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_log_likelihood_is_the_sum_over_tokens(kind: str) -> None:
    model = tiny_pair(kind)[1]
    found = log_likelihoods(model, PROMPTS, TEXTS, model.config.vocab_size)
    exact = [alone(model.double(), prompt, text) for prompt, text in zip(PROMPTS, TEXTS)]
    assert found == pytest.approx(exact, abs=1e-4)
    assert found[2] == 0.0


@pytest.fixture(scope="module")
def decoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("metrics")
    save_tiny_pair("llama", root / "pair")
    prompts = [Prompt(f"p{n}", f"w{n} w{n + 3} w7", f"w{n} w1 w2 w9") for n in range(6)]
    write_prompts(root / "prompts.jsonl", prompts)
    write_prompts(root / "bare.jsonl", [Prompt(p.id, p.prompt, None) for p in prompts])
    return root


def decode(root: Path, out: str, *words: str, prompts: str = "prompts.jsonl") -> int:
    pair = ["--drafter", str(root / "pair" / "drafter"), "--verifier", str(root / "pair" / "verifier")]
    rules = ["--rules", "lossless", "drafter_only", "--prompts", str(root / prompts), "--device", "cpu"]
    return cli.main(
        ["decode", *pair, *rules, "--max-new-tokens", "8", "--out", str(root / out), "--metrics", *words]
    )


def test_decode_takes_any_metric(decoded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert decode(decoded, "out", "rouge2", "squad_f1", "gsm8k", "log_likelihood", "command:grep -q w") == 0
    header = capsys.readouterr().out.splitlines()[0]
    assert "rouge2" in header
    assert "log_likelihood" in header
    rules = json.loads((decoded / "out" / "summary.json").read_text())["rules"]
    lines = [json.loads(line) for line in (decoded / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 12
    for label, rule in rules.items():
        own = [line for line in lines if line["rule"] == label]
        assert rule["quality"]["squad_f1"] == pytest.approx(sum(line["squad_f1"] for line in own) / 6)
        nats = sum(line["log_likelihood"] for line in own) / sum(line["tokens"] for line in own)
        assert rule["quality"]["log_likelihood"] == pytest.approx(nats)
        assert rule["quality"]["command:grep -q w"] == 1.0
    # Greedy decoding of the verifier is at least as likely under the verifier as the drafter's text, here.
    assert rules["lossless"]["quality"]["log_likelihood"] > rules["drafter_only"]["quality"]["log_likelihood"]


def test_metrics_that_cannot_be_taken_are_refused_before_decoding(
    decoded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert decode(decoded, "bad", "rouge9") == 2
    assert "metric is 'rouge9'" in capsys.readouterr().err
    assert decode(decoded, "bad", "rouge2", prompts="bare.jsonl") == 2
    assert "needs references, and 6 of 6 prompts have none" in capsys.readouterr().err
    assert not (decoded / "bad").exists()
    assert decode(decoded, "likely", "log_likelihood", prompts="bare.jsonl") == 0
