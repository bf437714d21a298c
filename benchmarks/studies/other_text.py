"""A head on text that it was not fitted on: what is lost there, and what a guard on its own estimates catches.

    python -m benchmarks.studies.other_text --pair en-fr --head runs/rounds-fr/head --rules opt_verifier:alpha=0.265 \
        --limit 300 [--out FILE]

Two kinds of text: captions (lines of ``val`` from 501 on) and sentences of GSM8K questions, which have no translations,
so that both are scored against the verifier's own text. The head's cascade runs at its chosen alpha, a rule without a
head at the dial given, which should take about as many calls on captions. The estimated gap of every kept token, cut at
0, adds up to what a text is estimated to lose. Two guards on it, both set on other captions (the first ``--limit``
lines of ``val``) where they fire on 5% of texts: the loop's own bound on the sum (``max_request_loss``), and a bound on
the sum per emitted token, beyond which the verifier writes the text anew. Means with 95% intervals over 1,000 redraws.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import keep, study_flags
from benchmarks.sequence_labels import prompts_of
from deferral_train.decoding.pair import Pair, Settings, load_pair
from deferral_train.evaluation.bootstrap import PromptBootstrap
from deferral_train.evaluation.scorers import make_scorers
from deferral_train.heads import DeferralHead
from deferral_train.heads.rules import learned_rule, rule_from_spec
from deferral_train.pairs.prompts import Prompt
from deferral_train.rules.base import Rule
from deferral_train.rules.registry import make_rule

METRICS = ("sentence_bleu", "chrf1")
SHARE = 0.05  # of the captions' texts that a guard may fire on
UNBOUNDED = 1e9


def sentences(shared: Path, limit: int) -> list[Prompt]:
    """Different sentences of GSM8K's test questions, as long as captions are: 5 to 20 words."""
    found: dict[str, None] = {}
    with gzip.open(shared / "data" / "gsm8k" / "test.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            for sentence in re.split(r"(?<=[.?!])\s+", json.loads(line)["question"]):
                if 5 <= len(sentence.split()) <= 20:
                    found.setdefault(sentence.strip())
    chosen = np.random.default_rng(0).permutation(list(found))[:limit]
    return [Prompt(f"gsm8k:{number}", str(text)) for number, text in enumerate(chosen)]


@dataclass(frozen=True)
class Decoded:
    """Texts of one setting with their calls, tokens and estimated losses [P]."""

    texts: list[str]
    calls: np.ndarray
    emitted: np.ndarray
    spent: np.ndarray


def decoded(pair: Pair, prompts: Sequence[Prompt], rule: Rule, limit: float = UNBOUNDED) -> Decoded:
    """Decode with the loop's bound on the estimated loss of a text."""
    how = Settings(max_new_tokens=64, max_request_loss=None if rule.is_lossless else limit)
    encoded = pair.encode(prompts, how)
    texts, calls, emitted, spent = [], [], [], []
    for at in range(0, len(encoded), 50):
        batch = encoded[at : at + 50]
        found = pair.decode_batch(batch, rule, how, None, at)
        texts += [pair.text(tokens) for tokens in found.tokens]
        calls += found.stats.verifier_calls.tolist()
        emitted += found.stats.emitted.tolist()
        spent += [0.0] * len(batch) if found.stats.spent is None else found.stats.spent.tolist()
    return Decoded(texts, *(np.array(values, dtype=float) for values in (calls, emitted, spent)))


def summarized(found: Decoded, best: Decoded, handed: np.ndarray | None = None) -> dict[str, Any]:
    """Calls over lossless's and points lost against its texts; texts ``handed`` [P] over are written anew."""
    redraws = PromptBootstrap(len(found.texts), 1000)
    handed = np.zeros(len(found.texts), dtype=bool) if handed is None else handed
    calls = (found.calls + handed * best.calls).sum() / np.where(handed, best.emitted, found.emitted).sum()
    row: dict[str, Any] = {
        "calls": float(calls / (best.calls.sum() / best.emitted.sum())),
        "handed": float(handed.mean()),
    }
    for name, scorer in make_scorers(METRICS).items():
        loss = 100 * (scorer(best.texts, best.texts) - scorer(found.texts, best.texts))
        row[name] = redraws.mean(np.where(handed, 0.0, loss)).as_dict()
    row["spent_per_token"] = redraws.mean(found.spent / np.maximum(found.emitted, 1)).as_dict()
    return row


def main() -> int:
    parser = study_flags(__doc__, "runs/other-text")
    parser.add_argument("--pair", default="en-fr", choices=("en-fr", "en-de"))
    parser.add_argument("--head", type=Path, required=True, help="folder of a head with its chosen alpha")
    parser.add_argument("--rules", nargs="*", default=[], help="rules without a head, at a dial")
    parser.add_argument("--limit", type=int, default=300)
    options = parser.parse_args()
    models = options.shared / "models" / f"multi30k-{options.pair}"
    pair = load_pair(str(models / "drafter"), str(models / "verifier"), options.device)
    captions = prompts_of(options.shared, options.pair, "val", None)
    parts = {
        "captions": captions[500 : 500 + options.limit],
        "gsm8k": sentences(options.shared, options.limit),
    }
    rules = {"head": learned_rule(DeferralHead.from_pretrained(options.head))}
    rules |= {spec: rule_from_spec(spec) for spec in options.rules}
    lossless = make_rule("lossless")
    best = {part: decoded(pair, prompts, lossless) for part, prompts in parts.items()}
    found: dict[str, Any] = {}
    for name, rule in rules.items():
        set_on = decoded(pair, captions[: options.limit], rule)
        bound = float(np.quantile(set_on.spent, 1 - SHARE))
        per_token = float(np.quantile(set_on.spent / np.maximum(set_on.emitted, 1), 1 - SHARE))
        found[name] = {"max_request_loss": bound, "per_token": per_token}
        for part, prompts in parts.items():
            free = decoded(pair, prompts, rule)
            over = free.spent / np.maximum(free.emitted, 1) > per_token
            found[name][part] = {
                "free": summarized(free, best[part]),
                "loop_guard": summarized(decoded(pair, prompts, rule, bound), best[part])
                | {"fired": float((free.spent > bound).mean())},
                "token_guard": summarized(free, best[part], over),
            }
            print(name, part, json.dumps(found[name][part]))
    result = {"study": "other_text", "pair": options.pair, "prompts": options.limit, "rules": found}
    keep(options, result, {"seed": 0})
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(main())
