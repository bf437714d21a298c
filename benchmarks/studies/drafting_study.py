"""One text of the drafting benchmark: plans chosen by replaying calibration prompts, then counted on others."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from deferral_train.decoding.drafting import BigramTable, DraftCascade, MaxGram, Plan
from deferral_train.decoding.drafting.counts import ReviewCounts
from deferral_train.decoding.drafting.replay import Path, fit_ending, replay
from deferral_train.decoding.drafting.speed import expect
from deferral_train.decoding.generate import cascade_generate
from deferral_train.decoding.pair import pad_batch
from deferral_train.pairs.load import ModelPair
from deferral_train.rules.base import Rule

Team = tuple[int, ...]  # drafters by number, 0 the pair's own, 1 the smaller
Matrix = Sequence[Sequence[int]]
NEW, BATCH, WITHIN, REDRAWS = 48, 20, 0.05, 2000
MATRICES: dict[int, list[Matrix]] = {  # plans of no, one and two drafters
    0: [[[tokens]] for tokens in (2, 4, 8, 12)],
    1: [[[k, tail], [0, copies]] for k in range(1, 11) for tail in (0, 4, 8) for copies in (0, 4, 8)],
    2: [
        [[a, b, tail], [0, c, 0], [0, 0, copies]]
        for a in range(1, 7) for b in (0, 2, 4, 6) for c in (0, 1, 2, 3) for tail in (0, 8) for copies in (0, 8)
        if b + c > 0
    ],
}  # fmt: skip
# Each of these tries every pair of its drafters: what the i.i.d. speed model is fitted to.
REVIEWED: dict[int, Matrix] = {0: [[8]], 1: [[5, 8], [0, 8]], 2: [[4, 4, 8], [0, 3, 6], [0, 0, 8]]}


@dataclass
class Contestants:
    """The pair, its drafters (largest first) and the table of bigrams that Max-Gram fills up with."""

    pair: ModelPair
    drafters: list[Any]
    bigrams: BigramTable
    seed: int

    @property
    def teams(self) -> list[Team]:
        """No drafter, each alone, all together."""
        everyone = tuple(range(len(self.drafters)))
        return [(), *((one,) for one in everyone), *([everyone] if len(everyone) > 1 else [])]

    def plan(self, k: Matrix, lenience: float = 1.0, bigrams: bool = True) -> Plan:
        return Plan(k, lenience, MaxGram(bigrams=self.bigrams if bigrams else None))

    def ids(self, text: str) -> list[int]:
        return list(self.pair.tokenizer(text).input_ids)

    def decode(
        self, team: Team, plan: Plan, texts: list[str], rule: Rule | str = "lossless", batch: int = BATCH
    ) -> Run:
        """Greedy, with counts of every prompt."""
        run, parts = Run([], [], [], ReviewCounts(plan.drafters), []), []
        cascade = DraftCascade([self.drafters[one] for one in team], plan)
        for start in range(0, len(texts), batch):
            rows = [self.ids(text) for text in texts[start : start + batch]]
            began = time.process_time()
            output = self.pair.verifier.generate(
                **pad_batch(rows, self.pair.tokenizer.pad_token_id, self.pair), custom_generate=cascade_generate,
                drafter=cascade, rule=rule, vocab_size=self.pair.vocab_size, max_new_tokens=NEW, do_sample=False,
                return_dict_in_generate=True,
            )  # fmt: skip
            run.seconds += time.process_time() - began
            emitted = output.stats.emitted.tolist()
            run.tokens += emitted
            run.calls += output.stats.verifier_calls.tolist()
            run.passes += output.passes.tolist()
            run.texts += [row[1 : 1 + count] for row, count in zip(output.sequences.tolist(), emitted)]
            parts.append(output.reviews)
        run.reviews = ReviewCounts.joined(parts)
        return run

    def alone(self, texts: list[str]) -> tuple[int, float]:
        """Tokens and CPU seconds of the verifier alone, one prompt at a time."""
        tokens, seconds = 0, 0.0
        for text in texts:
            batch = pad_batch([self.ids(text)], self.pair.tokenizer.pad_token_id, self.pair)
            began = time.process_time()
            output = self.pair.verifier.generate(
                **batch, custom_generate=cascade_generate, drafter=self.drafters[0], rule="verifier_only",
                vocab_size=self.pair.vocab_size, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True,
            )  # fmt: skip
            seconds += time.process_time() - began
            tokens += int(output.stats.emitted.sum())
        return tokens, seconds

    @torch.inference_mode()
    def paths(self, texts: Sequence[str], emitted: Sequence[list[int]]) -> list[Path]:
        """What each drafter would hand on along the texts that the verifier wrote: a pass of each model a text."""
        found = []
        for text, tokens in zip(texts, emitted):
            ids, guesses = self.ids(text), []
            for model in self.drafters:
                written = torch.tensor([[model.config.decoder_start_token_id, *tokens[:-1]]])
                logits = model(input_ids=torch.tensor([ids]), decoder_input_ids=written).logits
                guesses.append(logits[0, :, : self.pair.vocab_size].argmax(-1).tolist())
            stands = [[one == token for one, token in zip(guess, tokens)] for guess in guesses]
            found.append(Path(ids, tokens, guesses, stands, NEW, separate=True))
        return found


@dataclass
class Run:
    """Counts of each prompt, what was reviewed, and CPU seconds."""

    tokens: list[int]
    calls: list[int]
    passes: list[list[int]]
    reviews: ReviewCounts
    texts: list[list[int]]
    seconds: float = 0.0

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


@dataclass
class Calibration:
    """What the calibration prompts say of any plan: by replaying them, and as rates for the i.i.d. speed model."""

    who: Contestants
    texts: list[str]
    seen: dict[tuple[Team, Plan], tuple[int, int, list[int]]] = field(default_factory=dict)

    @cached_property
    def learned(self) -> tuple[list[Path], list[float]]:
        """Paths, and each drafter's chance of ending behind a wrong token."""
        plain = self.who.plan([[8, 0], [0, 0]])
        runs = [self.who.decode((one,), plain, self.texts) for one in range(len(self.who.drafters))]
        paths = self.who.paths(self.texts, runs[0].texts)
        endings = [
            fit_ending(plain, pick(paths, (one,)), self.who.pair.eos_ids, sum(map(sum, run.passes)))
            for one, run in enumerate(runs)
        ]
        return paths, endings

    @cached_property
    def rates(self) -> dict[Team, Any]:
        """Acceptance by reviewer, source and place, of each team."""
        return {
            team: self.who.decode(team, self.who.plan(REVIEWED[len(team)]), self.texts).reviews.acceptance()
            for team in self.who.teams
        }

    def replayed(self, team: Team, plan: Plan) -> tuple[int, int, list[int]]:
        """Tokens, verifier calls, passes of each drafter."""
        if (team, plan) not in self.seen:
            paths, endings = self.learned
            ending = [endings[one] for one in team]
            work = [replay(plan, path, self.who.pair.eos_ids, ending) for path in pick(paths, team)]
            passes = [sum(one.passes[place] for one in work) for place in range(plan.drafters)]
            self.seen[team, plan] = sum(one.tokens for one in work), sum(one.calls for one in work), passes
        return self.seen[team, plan]

    def swi(self, team: Team, plan: Plan, costs: Sequence[float]) -> float:
        tokens, calls, passes = self.replayed(team, plan)
        return tokens / (calls + sum(costs[one] * count for one, count in zip(team, passes)))

    def chosen(self, team: Team, costs: Sequence[float], plain: bool) -> Plan:
        """The plan of the best SWI here."""
        plans = [self.who.plan(k) for k in MATRICES[len(team)]]
        return max(
            (plan for plan in plans if is_plain(plan) == plain), key=lambda plan: self.swi(team, plan, costs)
        )


class Study:
    """One text: plans from its calibration prompts, counts from the others."""

    def __init__(self, who: Contestants, texts: list[str], calibration: int) -> None:
        self.who, self.test = who, texts[calibration:]
        self.calibration = Calibration(who, texts[:calibration])
        self.runs: dict[tuple[Team, Plan], Run] = {}

    def run(self, team: Team, plan: Plan) -> Run:
        """Counts on the test prompts, once for each plan."""
        if (team, plan) not in self.runs:
            self.runs[team, plan] = self.who.decode(team, plan, self.test)
        return self.runs[team, plan]

    def result(self, costs: Mapping[str, Sequence[float]], timed: int) -> dict[str, Any]:
        """Everything that is reported of this text."""
        five, below = [[5, 0], [0, 0]], [[5, 0], [0, 8]]
        alone = self.run((0,), self.who.plan(five))
        contrast = {
            "plain, k = 5": alone,
            "Max-Gram below": self.run((0,), self.who.plan(below, bigrams=False)),
            "with bigrams": self.run((0,), self.who.plan(below)),
        }
        found: dict[str, Any] = {
            "prompts": len(self.test),
            "tokens": sum(alone.tokens),
            "passes_per_token": {
                name: {"drafter": one.passes_per_token, "verifier": sum(one.calls) / sum(one.tokens)}
                for name, one in contrast.items()
            },
            "fewer_passes": self.interval(*([sum(r) for r in contrast[n].passes] for n in list(contrast)[::2])),
            "swi": {system: self.system(list(cost)) for system, cost in costs.items()},
        }  # fmt: skip
        found["predictions"] = [self.prediction(team, plan) for team, plan in self.runs]
        found["replayed_exactly"] = self.replayed_exactly(alone.texts)
        found["clock"] = self.clock(found["swi"]["own"], timed)
        if any(run.texts != alone.texts for run in self.runs.values()):
            raise RuntimeError("a contestant wrote another text than the verifier's")
        return found

    def system(self, costs: list[float]) -> dict[str, Any]:
        """SWI of the chosen plan of each team under one cost system, and the best cascade over the best plain one."""
        rows = []
        for team, plain in itertools.product(self.who.teams, (True, False)):
            if plain and len(team) != 1:
                continue
            plan = self.calibration.chosen(team, costs, plain)
            run = self.run(team, plan)
            spent = run.cost([costs[one] for one in team])
            rows.append(
                {"drafters": team, "k": plan.k, "plain": plain, "predicted": self.calibration.swi(team, plan, costs),
                 "swi": sum(run.tokens) / sum(spent), "spent": spent}
            )  # fmt: skip
        # The cascade is chosen before its count is seen; the plain drafter it must beat is the better one by count.
        single = max((row for row in rows if row["plain"]), key=lambda row: row["swi"])
        best = max((row for row in rows if not row["plain"]), key=lambda row: row["predicted"])
        gain = self.interval(single["spent"], best["spent"])
        for row in rows:
            del row["spent"]
        return {"rows": rows, "best_single": single, "best_cascade": best, "gain": gain}

    def prediction(self, team: Team, plan: Plan) -> dict[str, Any]:
        """Mean acceptance length: replayed on the calibration prompts, by the i.i.d. model, and counted."""
        run = self.runs[team, plan]
        tokens, calls, _ = self.calibration.replayed(team, plan)
        said, rates = {"replayed": tokens / calls}, self.calibration.rates[team]
        if plan.pairs <= set(rates):  # few prompts may never come to some pair
            said["i.i.d."] = expect(plan, rates, [0.0] * len(team)).tokens
        counted, low, high = self.interval(run.tokens, run.calls)
        fits = {name: abs(one / counted - 1) <= WITHIN or low <= one <= high for name, one in said.items()}
        return {
            "drafters": team, "k": plan.k, "bigrams": plan.max_gram.bigrams is not None, "predicted": said,
            "counted": counted, "interval": (low, high), "fits": fits,
        }  # fmt: skip

    def replayed_exactly(self, texts: list[list[int]]) -> dict[str, int]:
        """Runs whose verifier calls replaying the test texts gives for every single prompt."""
        paths = self.who.paths(self.test, texts)
        same = [
            [replay(plan, path, self.who.pair.eos_ids).calls for path in pick(paths, team)] == run.calls
            for (team, plan), run in self.runs.items()
        ]
        return {"runs": len(same), "same": sum(same)}

    def clock(self, system: Mapping[str, Any], prompts: int) -> dict[str, float]:
        """CPU time per token against the verifier alone, batch 1, by turns; above 1 is faster."""
        texts = self.test[:prompts]
        spent = {"best_single": 0.0, "best_cascade": 0.0}
        alone = 0.0
        for _ in range(2):
            alone += self.who.alone(texts)[1]
            for name in spent:
                row = system[name]
                spent[name] += self.who.decode(
                    row["drafters"], self.who.plan(row["k"]), texts, batch=1
                ).seconds
        return {name: alone / seconds for name, seconds in spent.items()} | {"prompts": len(texts)}

    def interval(self, above: Sequence[float], below: Sequence[float]) -> tuple[float, float, float]:
        """Ratio of sums and its 95% interval, prompts drawn anew."""
        size, generator = len(above), torch.Generator().manual_seed(self.who.seed)
        draws = torch.randint(size, (REDRAWS, size), generator=generator)
        top, bottom = (torch.tensor(column, dtype=torch.float64) for column in (above, below))
        ratios = top[draws].sum(dim=1) / bottom[draws].sum(dim=1)
        low, high = torch.quantile(ratios, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return float(top.sum() / bottom.sum()), low, high


def pick(paths: Sequence[Path], team: Team) -> list[Path]:
    """Paths with the guesses of a team's drafters only."""
    return [
        Path(
            path.prompt, path.tokens, [path.guesses[one] for one in team], [path.stands[one] for one in team],
            path.limit, path.separate,
        )
        for path in paths
    ]  # fmt: skip


def is_plain(plan: Plan) -> bool:
    """One drafter that writes alone."""
    return plan.drafters == 1 and plan.k == ((plan.k[0][0], 0), (0, 0))
