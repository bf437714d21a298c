"""Cascade speculative drafting on the shared pair: cost of Max-Gram, drafter passes, SWI, predictions against counts.

    OMP_NUM_THREADS=1 python -m benchmarks.studies.smaller_drafter --out runs/smaller
    OMP_NUM_THREADS=1 python -m benchmarks.studies.drafting --smaller runs/smaller --out OUT.json

Greedy and lossless throughout, so that every contestant writes the verifier's own text (checked). Texts: Multi30k
test captions; the same with long copies (two captions and the first again); GSM8K questions. Max-Gram fills up with
bigrams of the pair's training text, as published. Each text has its own calibration prompts: their texts are replayed
under every plan, which chooses every contestant's K, plain drafters included, and predicts the mean acceptance
length, beside the i.i.d. speed model fitted to the same prompts; all numbers are of other prompts. SWI = tokens /
(verifier calls + sum of cost times drafter passes), Max-Gram for nothing as in the paper, under three cost systems:
`pw` (.04, .02: the paper's from previous work), `ms` (the paper's parameter counts, T5-XXL with base and small:
220/11300 and 60/11300) and `own` (parameter counts of these models). Last, drafter size and lenience against speed
and quality. Intervals: 95%, bootstrap over prompts.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.common import SHARED, begin, finish, flags
from benchmarks.studies.drafting_study import NEW, WITHIN, Contestants, Study
from deferral_train import make_rule
from deferral_train.decoding.drafting import BigramTable, MaxGram
from deferral_train.evaluation.quality import per_prompt
from deferral_train.pairs.load import ModelPair, load_models, load_smaller
from deferral_train.pairs.passes import pass_seconds
from deferral_train.pairs.prompts import Prompt, read_prompts

LIMITS = {"max_gram_us": 20.0, "acceptance_length": WITHIN}
CONTEXT, TRAINING_LINES = 2000, 23_000
PW, MS = (0.04, 0.02), (220 / 11300, 60 / 11300)
LENIENCE, OPT, BELOW = (1.0, 2.0, 5.0), 0.2, {1: [[5, 0], [0, 8]], 2: [[5, 0, 0], [0, 2, 0], [0, 0, 8]]}


def main() -> int:
    parser = flags(__doc__, devices=("cpu",))
    parser.add_argument("--smaller", help="checkpoint of a drafter below the pair's own")
    parser.add_argument("--prompts", type=int, default=180, help="test prompts per text")
    parser.add_argument("--calibration", type=int, default=120)
    parser.add_argument("--timed", type=int, default=15, help="test prompts per text for the clock")
    options = parser.parse_args()
    begin(options)
    pair = load_models(
        *(str(SHARED / "models" / "multi30k-en-de" / role) for role in ("drafter", "verifier"))
    )
    drafters = [pair.drafter, *load_smaller([options.smaller] if options.smaller else [], pair)]
    sizes = [sum(p.numel() for p in model.parameters()) for model in (pair.verifier, *drafters)]
    result: dict[str, Any] = {
        "parameters": sizes,
        "new_tokens": NEW,
        "limits": LIMITS,
        "max_gram": max_gram(pair),
    }
    own = tuple(size / sizes[0] for size in sizes[1:])
    result["costs"] = {"pw": PW[: len(drafters)], "ms": MS[: len(drafters)], "own": own}
    result["timing"] = timing(pair, drafters)
    who = Contestants(pair, drafters, bigrams(pair), options.seed)
    result["texts"] = {
        name: Study(who, texts, options.calibration).result(result["costs"], options.timed)
        for name, texts in prompts(options).items()
    }
    result["lenience"] = lenience(who, own, options.prompts)
    return finish("drafting", options, result, table(result))


def max_gram(pair: ModelPair) -> dict[str, Any]:
    """Microseconds of CPU time of a proposal of 10 tokens at CONTEXT tokens: alone, and with the five drafted
    tokens of a round taken back and five others put in first.
    """
    questions = read_prompts(SHARED / "data/gsm8k/train.jsonl.gz", prompt_field="question", limit=200)
    ids = list(itertools.chain.from_iterable(pair.tokenizer(one.prompt).input_ids for one in questions))
    found = {}
    for name, text in (
        ("gsm8k", ids[:CONTEXT]),
        ("loop", [7, 8, 9] * (CONTEXT // 3)),
        ("copies", ids[:500] * 4),
    ):
        for match in ("earliest", "latest"):
            reader = MaxGram(match).read(text)
            drafts = [text[start : start + 5] for start in range(0, 400, 5)]
            alone, rounds = [], []
            for _ in range(20):
                began = time.process_time()
                for _ in drafts:
                    reader.propose(10)
                alone.append((time.process_time() - began) / len(drafts))
                began = time.process_time()
                for draft in drafts:
                    reader.follow(0, draft)
                    reader.propose(10)
                rounds.append((time.process_time() - began) / len(drafts))
            found[f"{name}/{match}"] = {
                "proposal_us": 1e6 * statistics.median(alone),
                "round_us": 1e6 * statistics.median(rounds),
            }
    return found


def bigrams(pair: ModelPair) -> BigramTable:
    """Successors in the German lines that the pair was trained on."""
    with gzip.open(SHARED / "data" / "multi30k" / "train.de.gz", "rt", encoding="utf-8") as file:
        lines = [line.strip() for line in itertools.islice(file, TRAINING_LINES)]
    texts = pair.tokenizer(lines).input_ids
    return BigramTable.learn(texts, pair.vocab_size, pair.fingerprints["tokenizer"])


def timing(pair: ModelPair, drafters: list[Any]) -> list[float]:
    """Time of a pass of one token of each drafter over the verifier's, batch 1."""
    caption = [Prompt("caption", "A man in a blue shirt is standing on a ladder cleaning a window.")]
    times = [pass_seconds(replace(pair, drafter=model), caption)[1] for model in drafters]
    return [drafter / verifier for drafter, verifier in times]


def prompts(options: argparse.Namespace) -> dict[str, list[str]]:
    """Calibration and test texts, in this order; no caption is in both."""
    count = options.calibration + options.prompts
    captions = [one.prompt for one in read_prompts(SHARED / "data/multi30k/test_2016_flickr.en.gz")]
    questions = [
        one.prompt for one in read_prompts(SHARED / "data/gsm8k/test.jsonl.gz", prompt_field="question")
    ]
    for texts in (captions, questions):  # calibration and test prompts must be alike
        random.Random(options.seed).shuffle(texts)
    copies = [f"{one} {two} {one}" for one, two in zip(captions[::2], captions[1::2])]
    return {
        "multi30k": captions[:count],
        "multi30k with copies": copies[:count],
        "gsm8k": questions[:count],
    }


def lenience(who: Contestants, own: Sequence[float], prompts: int) -> list[dict[str, Any]]:
    """Drafter size and lenience against speed and quality: drafters below one another, first Multi30k test captions.

    Under `lossless` lenience moves the speed alone; under OPT it moves the text too.
    """
    folder = SHARED / "data" / "multi30k"
    given = read_prompts(
        folder / "test_2016_flickr.en.gz", reference_path=folder / "test_2016_flickr.de.gz", limit=prompts
    )
    texts = [one.prompt for one in given]
    rows = []
    for rule, team, much in itertools.product(
        ("lossless", "opt"), [team for team in who.teams if team], LENIENCE
    ):
        plan = who.plan(BELOW[len(team)], much)
        run = who.decode(team, plan, texts, make_rule("opt", alpha=OPT) if rule == "opt" else rule)
        written = [who.pair.tokenizer.decode(ids, skip_special_tokens=True) for ids in run.texts]
        rows.append(
            {"rule": rule, "drafters": team, "k": plan.k, "lenience": much,
             "chrf": 100 * float(per_prompt("chrf", written, [one.reference for one in given]).mean()),
             "calls": sum(run.calls) / sum(run.tokens), "passes": run.passes_per_token,
             "swi": sum(run.tokens) / sum(run.cost([own[one] for one in team]))}
        )  # fmt: skip
    return rows


def table(result: dict[str, Any]) -> str:
    lines = [
        f"Max-Gram {name:<18} proposal {row['proposal_us']:6.2f} us, round {row['round_us']:6.2f} us"
        for name, row in result["max_gram"].items()
    ]
    for name, text in result["texts"].items():
        lines += [f"{name}: {text['prompts']} prompts, {text['tokens']} tokens", *text_lines(text)]
    lines.append("drafter size and lenience, first Multi30k test captions")
    lines += [
        f"  {row['rule']:<8} drafters {row['drafters']} lenience {row['lenience']:g}: SWI {row['swi']:.3f}, calls "
        f"{row['calls']:.3f}, drafter passes {row['passes']:.3f} a token, chrF {row['chrf']:.2f}"
        for row in result["lenience"]
    ]
    return "\n".join(lines)


def text_lines(text: dict[str, Any]) -> list[str]:
    lines = [
        f"  {who:<16} drafter {row['drafter']:.3f}, verifier {row['verifier']:.3f} passes a token"
        for who, row in text["passes_per_token"].items()
    ]
    lines.append(
        "  drafter passes, plain over Max-Gram with bigrams: {:.3f} [{:.3f}, {:.3f}]".format(
            *text["fewer_passes"]
        )
    )
    for system, found in text["swi"].items():
        ratio, low, high = found["gain"]
        lines.append(f"  {system:<4} chosen cascade over best plain {ratio:.3f} [{low:.3f}, {high:.3f}]")
        for row in found["rows"]:
            chosen = ", chosen" if row == found["best_cascade"] else ""
            lines.append(
                f"       drafters {row['drafters']} k {row['k']}: SWI {row['swi']:.3f}, predicted "
                f"{row['predicted']:.3f}{chosen}"
            )
    clock, exact = text["clock"], text["replayed_exactly"]
    lines.append(
        f"  CPU time against the verifier alone, batch 1, {clock['prompts']} prompts: best plain "
        f"{clock['best_single']:.2f}, chosen cascade {clock['best_cascade']:.2f}"
    )
    lines.append(f"  replaying gives every prompt's verifier calls: {exact['same']} of {exact['runs']} runs")
    predictions = text["predictions"]
    for method in ("replayed", "i.i.d."):
        fits = [row["fits"][method] for row in predictions if method in row["fits"]]
        lines.append(f"  mean acceptance length within limits, {method}: {sum(fits)} of {len(fits)}")
    lines += [
        f"       drafters {row['drafters']} k {row['k']}: {row['predicted']['replayed']:.3f}, i.i.d. "
        f"{row['predicted'].get('i.i.d.', float('nan')):.3f}, counted {row['counted']:.3f} "
        f"[{row['interval'][0]:.3f}, {row['interval'][1]:.3f}]"
        for row in predictions
    ]
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
