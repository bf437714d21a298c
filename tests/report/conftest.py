"""A run folder made by the real parts: traces, scores, decoding by a tiny pair whose every word is a script
tag.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from evaluation.language import VOCABULARY, Language
from report.browser import Browser, chromium
from tiny_models import SPECIAL, VOCAB, tiny_pair

from deferral_train import provenance
from deferral_train.decoding.decode import DecodeConfig, decode
from deferral_train.decoding.pair import Pair, Settings
from deferral_train.evaluation import score_rules
from deferral_train.evaluation.bootstrap import Redraws
from deferral_train.evaluation.breakdowns import make_breakdowns, read_part
from deferral_train.pairs.load import load_models
from deferral_train.pairs.prompts import Prompt

HOSTILE = "<script>document.title='owned{}'</script>"
VERDICT = {
    "status": "ok",
    "headline": f"1.4x as fast {HOSTILE.format('headline')}",
    "chosen": {"rule": "opt", "label": "opt:alpha=0.2", "parameter": "alpha", "value": 0.2, "name": "OPT"},
    "speedup": {"value": 1.4, "low": 1.3, "high": 1.5, "against": "verifier_only"},
    "calls_saved": {"value": 0.6, "lossless": 0.5, "against": "verifier_only"},
    "quality": {"metric": "mean sentence chrF", "value": 50.0, "lossless": 51.0, "difference": -1.0},
    "trust": [f"A sentence with {HOSTILE.format('trust')} & an ampersand."],
    "snippet": "</pre><script>document.title='owned'</script>",
}


def hostile_tokenizer(folder: Path) -> None:
    """Rewrite a saved word-level tokenizer so that every word is a script element of its own."""
    path = folder / "tokenizer.json"
    state = json.loads(path.read_text())
    vocabulary = {word: number for number, word in enumerate(SPECIAL)}
    vocabulary |= {HOSTILE.format(number): number for number in range(len(SPECIAL), VOCAB)}
    state["model"]["vocab"] = vocabulary
    path.write_text(json.dumps(state))


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything a report reads, but for a training log."""
    root = tmp_path_factory.mktemp("runs") / "hostile"
    drafter, verifier, tokenizer = tiny_pair("llama")
    for name, model in (("drafter", drafter), ("verifier", verifier)):
        model.save_pretrained(root / "pair" / name)
        tokenizer.save_pretrained(root / "pair" / name)
        hostile_tokenizer(root / "pair" / name)
    pair = Pair(load_models(str(root / "pair" / "drafter"), str(root / "pair" / "verifier"), "cpu"))
    prompts = [
        Prompt(
            f"p{number} {HOSTILE.format('id')}", HOSTILE.format(4 + number) * 3, HOSTILE.format("reference")
        )
        for number in range(12)
    ]
    settings = Settings(num_draft_tokens=3, max_new_tokens=12, batch_size=1)
    rules = ["verifier_only", "lossless", "drafter_only"]
    from deferral_train import make_rule

    decode(
        pair,
        prompts,
        [*rules, make_rule("opt", alpha=0.2)],
        DecodeConfig(settings, log_tokens=3),
        root / "decode",
    )
    traces = Language(12).write(root / "traces" / "test", 0.0, VOCABULARY)
    table = score_rules(traces, ["opt", "chow", "token_v3"], bootstrap=100, grid=9, prefixes=5)
    table.to_json(root / "evaluation" / "scores.json")
    provenance.write_json(root / "evaluation" / "prefixes.json", table.prefixes)
    part = read_part(traces, HOSTILE.format("domain"))
    make_breakdowns([part], ["position", "domain"], redraws=Redraws(0)).write(root / "evaluation")
    provenance.write_json(root / "verdict.json", VERDICT)
    return root


@pytest.fixture(scope="session")
def browser() -> Browser:  # type: ignore[misc]
    with chromium() as session:
        yield session
