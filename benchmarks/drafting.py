"""Cascade speculative drafting on the shared pair: cost of Max-Gram, drafter passes, SWI, predictions against counts.

    OMP_NUM_THREADS=1 python -m benchmarks.smaller_drafter --out runs/smaller
    OMP_NUM_THREADS=1 python -m benchmarks.drafting --smaller runs/smaller --out benchmarks/results/drafting.json

Greedy and lossless throughout, so that every contestant writes the verifier's own text (checked). Texts: Multi30k
test captions; the same with long copies (two captions and the first again); GSM8K questions. Each has its own
calibration prompts, where acceptance is counted; the speed model then chooses every contestant's K, plain drafters
included, and predicts the mean acceptance length; all numbers are of other prompts. SWI = tokens / (verifier calls +
sum of cost times drafter passes), Max-Gram for nothing as in the paper, under three cost systems: `pw` (.04, .02:
the paper's from previous work), `ms` (the paper's parameter counts, T5-XXL with base and small: 220/11300 and
60/11300) and `own` (parameter counts of these models). Intervals: 95%, bootstrap over prompts.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.common import SHARED, begin, finish, flags
from deferral_train.decoding.generate import cascade_generate
from deferral_train.decoding.pair import pad_batch
from deferral_train.drafting import DraftCascade, MaxGram, Plan
from deferral_train.drafting.counts import ReviewCounts
from deferral_train.drafting.speed import expect
from deferral_train.pairs.load import ModelPair, load_models, load_smaller
from deferral_train.pairs.prompts import read_prompts

Team = tuple[int, ...]  # drafters by number, 0 the pair's own, 1 the smaller
LIMITS = {"max_gram_us": 20.0, "acceptance_length": 0.05}
CONTEXT, NEW = 2000, 48
MATRICES = {  # plans of no, one and two drafters
    0: [[[tokens]] for tokens in (2, 4, 8, 12)],
    1: [[[k, tail], [0, copies]] for k in range(1, 11) for tail in (0, 4, 8) for copies in (0, 4, 8)],
    2: [
        [[a, b, tail], [0, c, 0], [0, 0, copies]]
        for a in range(1, 7) for b in (0, 2, 4, 6) for c in (0, 1, 2, 3) for tail in (0, 8) for copies in (0, 8)
        if b + c > 0
    ],
}  # fmt: skip
# Each of these tries every pair of its drafters.
CALIBRATION = {0: [[8]], 1: [[5, 8], [0, 8]], 2: [[4, 4, 8], [0, 3, 6], [0, 0, 8]]}
PW, MS = (0.04, 0.02), (220 / 11300, 60 / 11300)


def main() -> int:
    parser = flags(__doc__, devices=("cpu",))
    parser.add_argument("--smaller", help="checkpoint of a drafter below the pair's own")
    parser.add_argument("--prompts", type=int, default=200, help="test prompts per text")
    parser.add_argument("--calibration", type=int, default=100)
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
    result["texts"] = {
        name: Study(pair, drafters, texts, options).result(result["costs"])
        for name, texts in prompts(options).items()
    }
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


def timing(pair: ModelPair, drafters: list[Any]) -> list[float]:
    """Time of a pass of one token of each drafter over the verifier's, batch 1: medians of CPU time, by turns."""
    ids = torch.tensor([[0]])
    models = [pair.verifier, *drafters]
    states = [m.get_encoder()(input_ids=torch.arange(5, 25)[None]) for m in models]
    times: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for _, (model, state, column) in itertools.product(range(60), list(zip(models, states, times))):
            began = time.process_time()
            model(encoder_outputs=state, decoder_input_ids=ids)
            column.append(time.process_time() - began)
    medians = [statistics.median(column[10:]) for column in times]
    return [median / medians[0] for median in medians[1:]]


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


@dataclass
class Run:
    """Counts of each prompt, and what was reviewed."""

    tokens: list[int]
    calls: list[int]
    passes: list[list[int]]
    reviews: ReviewCounts
    texts: list[list[int]]

    @property
    def passes_per_token(self) -> float:
        """Drafter passes, all drafters together."""
        return sum(map(sum, self.passes)) / sum(self.tokens)

    def cost(self, costs: Sequence[float]) -> list[float]:
        """Of each prompt, in verifier passes."""
        return [
            calls + sum(cost * count for cost, count in zip(costs, row))
            for calls, row in zip(self.calls, self.passes)
        ]


def decode(pair: ModelPair, drafters: Sequence[Any], plan: Plan, texts: list[str]) -> Run:
    run, parts = Run([], [], [], ReviewCounts(plan.drafters), []), []
    cascade = DraftCascade(drafters, plan)
    for start in range(0, len(texts), 20):
        rows = [pair.tokenizer(text).input_ids for text in texts[start : start + 20]]
        output = pair.verifier.generate(
            **pad_batch(rows, pair.tokenizer.pad_token_id, pair), custom_generate=cascade_generate,
            drafter=cascade, vocab_size=pair.vocab_size, max_new_tokens=NEW, do_sample=False,
            return_dict_in_generate=True,
        )  # fmt: skip
        emitted = output.stats.emitted.tolist()
        run.tokens += emitted
        run.calls += output.stats.verifier_calls.tolist()
        run.passes += output.passes.tolist()
        run.texts += [row[1 : 1 + count] for row, count in zip(output.sequences.tolist(), emitted)]
        parts.append(output.reviews)
    run.reviews = ReviewCounts.joined(parts)
    return run


class Study:
    """One text: acceptance from its calibration prompts, counts from the others."""

    def __init__(
        self, pair: ModelPair, drafters: list[Any], texts: list[str], options: argparse.Namespace
    ) -> None:
        self.pair, self.drafters, self.seed = pair, drafters, options.seed
        self.test = texts[options.calibration :]
        everyone = tuple(range(len(drafters)))
        self.teams = [(), *((one,) for one in everyone), *([everyone] if len(everyone) > 1 else [])]
        self.acceptance = {
            team: self.decode(
                team, Plan(CALIBRATION[len(team)]), texts[: options.calibration]
            ).reviews.acceptance()
            for team in self.teams
        }
        self.runs: dict[tuple[Team, Plan], Run] = {}

    def decode(self, team: Team, plan: Plan, texts: list[str]) -> Run:
        return decode(self.pair, [self.drafters[one] for one in team], plan, texts)

    def run(self, team: Team, k: Sequence[Sequence[int]]) -> Run:
        """Counts on the test prompts, once for each plan."""
        key = (team, Plan(k))
        if key not in self.runs:
            self.runs[key] = self.decode(*key, self.test)
        return self.runs[key]

    def chosen(self, team: Team, costs: Sequence[float], plain: bool) -> Plan:
        """The plan that the speed model likes best."""
        plans = [Plan(k) for k in MATRICES[len(team)]]
        plans = [
            plan for plan in plans if is_plain(plan) == plain and plan.pairs <= set(self.acceptance[team])
        ]
        own = [costs[one] for one in team]
        return max(plans, key=lambda plan: expect(plan, self.acceptance[team], own).ewif)

    def result(self, costs: Mapping[str, Sequence[float]]) -> dict[str, Any]:
        """Everything that is reported of this text."""
        alone, below = self.run((0,), [[5, 0], [0, 0]]), self.run((0,), [[5, 0], [0, 8]])
        found: dict[str, Any] = {
            "prompts": len(self.test),
            "tokens": sum(alone.tokens),
            "passes_per_token": {
                name: {"drafter": one.passes_per_token, "verifier": sum(one.calls) / sum(one.tokens)}
                for name, one in (("plain, k = 5", alone), ("with Max-Gram", below))
            },
            "swi": {system: self.system(list(cost)) for system, cost in costs.items()},
        }
        found["predictions"] = [self.prediction(team, plan) for team, plan in self.runs]
        if any(run.texts != alone.texts for run in self.runs.values()):
            raise RuntimeError("a contestant wrote another text than the verifier's")
        return found

    def system(self, costs: list[float]) -> dict[str, Any]:
        """SWI of the chosen plan of each team under one cost system, and the best cascade over the best plain one."""
        rows = []
        for team, plain in itertools.product(self.teams, (True, False)):
            if plain and len(team) != 1:
                continue
            plan = self.chosen(team, costs, plain)
            run = self.run(team, plan.k)
            spent = run.cost([costs[one] for one in team])
            swi = sum(run.tokens) / sum(spent)
            said = expect(plan, self.acceptance[team], [costs[one] for one in team]).ewif
            rows.append(
                {"drafters": team, "k": plan.k, "plain": plain, "predicted": said, "swi": swi, "spent": spent}
            )
        # The cascade is chosen before its count is seen; the plain drafter it must beat is the better one by count.
        single = max((row for row in rows if row["plain"]), key=lambda row: row["swi"])
        best = max((row for row in rows if not row["plain"]), key=lambda row: row["predicted"])
        gain = self.interval(single["spent"], best["spent"])
        for row in rows:
            del row["spent"]
        return {"rows": rows, "best_single": single, "best_cascade": best, "gain": gain}

    def prediction(self, team: Team, plan: Plan) -> dict[str, Any]:
        """Mean acceptance length: what the model said and what was counted."""
        run = self.runs[team, plan]
        predicted = expect(plan, self.acceptance[team], [0.0] * len(team)).tokens
        counted, low, high = self.interval(run.tokens, run.calls)
        fits = abs(predicted / counted - 1) <= LIMITS["acceptance_length"] or low <= predicted <= high
        return {
            "drafters": team, "k": plan.k, "predicted": predicted, "counted": counted, "interval": (low, high),
            "fits": fits,
        }  # fmt: skip

    def interval(self, above: Sequence[float], below: Sequence[float]) -> tuple[float, float, float]:
        """Ratio of sums and its 95% interval, prompts drawn anew 2,000 times."""
        draws = torch.randint(
            len(above), (2000, len(above)), generator=torch.Generator().manual_seed(self.seed)
        )
        top, bottom = (torch.tensor(column, dtype=torch.float64) for column in (above, below))
        ratios = top[draws].sum(dim=1) / bottom[draws].sum(dim=1)
        low, high = torch.quantile(ratios, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return float(top.sum() / bottom.sum()), low, high


def is_plain(plan: Plan) -> bool:
    """One drafter that writes alone."""
    return plan.drafters == 1 and plan.k == ((plan.k[0][0], 0), (0, 0))


def table(result: dict[str, Any]) -> str:
    lines = [
        f"Max-Gram {name:<18} proposal {row['proposal_us']:6.2f} us, round {row['round_us']:6.2f} us"
        for name, row in result["max_gram"].items()
    ]
    for name, text in result["texts"].items():
        lines.append(f"{name}: {text['prompts']} prompts, {text['tokens']} tokens")
        for who, row in text["passes_per_token"].items():
            lines.append(
                f"  {who:<16} drafter {row['drafter']:.3f}, verifier {row['verifier']:.3f} passes a token"
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
        good = sum(row["fits"] for row in text["predictions"])
        lines.append(
            f"  mean acceptance length predicted within limits: {good} of {len(text['predictions'])}"
        )
        lines += [
            f"       drafters {row['drafters']} k {row['k']}: {row['predicted']:.3f}, counted {row['counted']:.3f} "
            f"[{row['interval'][0]:.3f}, {row['interval'][1]:.3f}]"
            for row in text["predictions"]
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
