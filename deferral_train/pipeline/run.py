"""A run: text or questions to pair, traces, head, operating points, evaluation, decoding, verdict and report.

Every stage writes below the run folder and is reused while its settings and inputs stay the same.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from deferral_train import provenance
from deferral_train.collecting import CollectConfig, collect
from deferral_train.decoding.settings import VLLM
from deferral_train.errors import InputError
from deferral_train.heads import DeferralHead
from deferral_train.heads.export import export_head
from deferral_train.heads.rules import learned_rule, rule_from_spec
from deferral_train.pipeline import answers, ask, drafting, online, operating_point, serving_speed
from deferral_train.pipeline import probe as ceilings
from deferral_train.pipeline.breakdowns import break_down
from deferral_train.pipeline.config import PARTS, RunConfig
from deferral_train.pipeline.console import RunConsole
from deferral_train.pipeline.constraint import FOLDER
from deferral_train.pipeline.contents import (
    check_values,
    head_inputs,
    metric_inputs,
    pair_inputs,
    spec_inputs,
    text_inputs,
)
from deferral_train.pipeline.decoder import StageDecoder, engine_facts, engine_settings
from deferral_train.pipeline.heads import BEST, LEARNED, fit_candidates
from deferral_train.pipeline.learning import ROUNDS, learn_in_rounds
from deferral_train.pipeline.pair import open_pair, prepare_pair
from deferral_train.pipeline.print_summary import close
from deferral_train.pipeline.stages import Stage, StageRunner, open_run
from deferral_train.pipeline.text import part_path, prepare_text
from deferral_train.pipeline.verdict import Measured, make_verdict
from deferral_train.rules.base import Rule
from deferral_train.serving.engine_command import engine_line
from deferral_train.traces import Traces, open_traces

TRACES = tuple(f"traces/{part}" for part in PARTS)
PROBE = "probe/traces"
SLIDER_PROMPTS = 20
Results = Mapping[str, Any]
# What a run writes besides the user's own pair; small runs need far less.
MIN_FREE_BYTES = 1 << 30


def run(config: RunConfig, *, fresh: bool = False, probe: bool = False) -> dict[str, Any]:
    """Run every unfinished stage and return the verdict; see the class docstrings of ``pipeline.config``.

    With ``probe`` only the prompts, the pair and a hundred prompts' traces are made, and the ceiling is
    returned, see :mod:`deferral_train.pipeline.probe`; a run without it goes on from there.

    Raises:
        InputError: anything the user can mend, in one line; finished stages stay.
    """
    folder = Path(config.out)
    free = shutil.disk_usage(
        next(p for p in [folder.absolute(), *folder.absolute().parents] if p.exists())
    ).free
    if free < MIN_FREE_BYTES:
        raise InputError(
            f"out: {folder} has {free >> 20} MiB free, a run needs {MIN_FREE_BYTES >> 20}; free some disk"
        )
    check_values(config)
    with provenance.one_writer(folder, "run"):
        work = Run(config, open_run(folder, config, fresh))
        return work.probe() if probe else work.execute()


class Run:
    """The stages of one run and what they need from each other."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.config, self.folder, self.console = config, folder, RunConsole(config.expected)
        self.engine = engine_facts(config.engine)

    def execute(self) -> dict[str, Any]:
        """Run all stages; returns the verdict."""
        self.console.budget()
        records = self.runner().run(self.stages())
        self.console.spent(records.values())
        close(self.console, records, self.folder)
        return dict(records["verdict"].result)

    def runner(self) -> StageRunner:
        """Runs stages in this folder and says so on the console."""
        return StageRunner(self.folder, self.console.announce, self.console.line)

    def probe(self) -> dict[str, Any]:
        """Prompts, pair and a hundred prompts; returns and prints the ceiling."""
        c, before = self.config, ("database", "text", "pair")
        first = [stage for stage in self.stages() if stage.name in before]
        settings = {
            "traces": c.traces,
            "rules": c.rules,
            "point": c.point,
            "num_draft_tokens": c.decode.num_draft_tokens,
            "seed": c.seed,
        }
        title = f"the ceiling on {ceilings.PROMPTS} prompts"
        stage = Stage(
            "probe",
            title,
            settings,
            ("text", "pair"),
            ("probe",),
            self.ceiling,
            inputs=spec_inputs(c.rules),
            replace=True,
        )
        records = self.runner().run([*first, stage])
        found = dict(records["probe"].result)
        ceilings.show(self.console, found)
        return found

    def ceiling(self, results: Results) -> Any:
        """Log a hundred calibration prompts and see what could be gained on them."""
        collect(
            CollectConfig(
                **self.collecting(results["pair"], "calibration"),
                **asdict(self.config.traces),
                limit=ceilings.PROMPTS,
            ),
            self.folder / PROBE,
        )
        found = ceilings.ceiling(
            open_traces(self.folder / PROBE),
            self.config.rules,
            self.costs(results["pair"]),
            self.config.point,
            self.config.decode.num_draft_tokens,
            self.config.seed,
        )
        provenance.write_json(self.folder / "probe" / "probe.json", found)
        return found

    def stages(self) -> list[Stage]:
        """The table of contents of a run."""
        return [
            *self.first_stages(),
            *self.learning_stages(),
            *self.scoring_stages(),
            *self.question_stages(),
            *self.last_stages(),
        ]

    def learning_stages(self) -> list[Stage]:
        """From a pair to a head with its operating point."""
        c = self.config
        constraint = () if c.point.max_loss is None else (FOLDER,)
        asked = c.decode if constraint else c.decode.num_draft_tokens
        return [
            Stage(
                name="pair",
                title="a drafter and a verifier",
                settings={"pair": c.pair, "gate": c.gate},
                after=("text",),
                outputs=("pair",),
                work=self.pair,
                inputs=pair_inputs(c.pair),
                replace=self.asks,  # what it learns from is made by the run, and no part of its config
            ),
            Stage(
                name="traces",
                title="both models' token distributions",
                settings={"traces": c.traces, "seed": c.seed},
                after=("text", "pair"),
                outputs=TRACES,
                work=self.traces,
            ),
            Stage(
                name="fit",
                title="heads learn the loss gap",
                # Rounds decode, and label by metrics.
                settings={"heads": c.heads, "seed": c.seed}
                | ({"decode": c.decode, **self.engine} if c.heads.rounds else {}),
                inputs=head_inputs(c),
                after=("traces",),
                outputs=("fit",),
                work=self.fit,
                replace=True,
            ),
            Stage(
                name="point",
                title="dials set on calibration",
                settings={"point": c.point, "rules": c.rules, "decode": asked, "seed": c.seed}
                | (self.engine if constraint else {}),
                after=("fit",),
                outputs=("point.json", "head", *constraint),
                work=self.point,
                inputs=spec_inputs([*c.rules, *c.decoded]) | metric_inputs([c.point.metric]),
                replace=bool(constraint),
            ),
        ]

    def scoring_stages(self) -> list[Stage]:
        """Rules on the test prompts: from their traces, and decoded."""
        c = self.config
        evaluated = (
            "evaluation/scores.json",
            "evaluation/scores.csv",
            "evaluation/prefixes.json",
            "evaluation/breakdowns.json",
            "evaluation/breakdowns.csv",
            "evaluation/figures",
        )
        rules = spec_inputs([*c.rules, *c.decoded])
        return [
            Stage(
                name="evaluate",
                title="all rules on the test traces",
                settings={
                    "rules": c.rules,
                    "decoded": c.decoded,
                    "bootstrap": c.bootstrap,
                    "num_draft_tokens": c.decode.num_draft_tokens,
                    "seed": c.seed,
                },
                after=("point",),
                outputs=evaluated,
                work=self.evaluate,
                inputs=rules,
            ),
            Stage(
                name="decode",
                title="the cascade on test prompts",
                settings={"decode": c.decode, "decoded": c.decoded, "seed": c.seed, **self.engine},
                after=("point",),
                outputs=("decode", *((online.TIMING,) if c.decode.timed else ())),
                work=partial(online.decode_rules, self),
                inputs=rules | metric_inputs([c.point.metric, *c.decode.metrics]),
                replace=True,
            ),
        ]

    def last_stages(self) -> list[Stage]:
        """Costs of whole rules, predictions against counts, drafting, verdict and page."""
        c = self.config
        more = [*(["answers"] if self.asks else []), *(stage.name for stage in self.serving_stages())]
        cascades = (*c.frontier.rules, *c.frontier.token_cascades, *c.frontier.sequence_cascades)
        return [
            Stage(
                name="frontier",
                title="quality against cost of whole rules",
                settings={"frontier": c.frontier, "decode": c.decode, "seed": c.seed, **self.engine},
                after=("point",),
                outputs=("frontier", "evaluation/frontier.json", "evaluation/frontier"),
                work=partial(online.decode_frontiers, self),
                inputs=spec_inputs(cascades) | metric_inputs([c.frontier.metric]),
                replace=True,
            ),
            Stage(
                name="skew",
                title="offline against online",
                settings={
                    "bootstrap": c.bootstrap,
                    "seed": c.seed,
                    **({} if c.on_policy is None else {"on_policy": c.on_policy}),
                    **self.engine,
                },
                after=("decode",),
                outputs=(online.ON_POLICY, "evaluation/skew.json"),
                work=partial(online.compare_skew, self),
                replace=True,
            ),
            Stage(
                name="drafting",
                title="how to draft on this machine",
                settings={"decode": c.decode, "bootstrap": c.bootstrap, "seed": c.seed, **self.engine},
                after=("skew",),
                outputs=(drafting.FILE,),
                work=partial(drafting.propose_drafting, self),
            ),
            *self.serving_stages(),
            Stage(
                name="verdict",
                title="what is gained and lost",
                settings={"point": c.point, "control": c.control},
                after=("evaluate", "skew", "frontier", "drafting", *more),
                outputs=("verdict.json",),
                work=self.verdict,
            ),
            Stage(
                name="report",
                title="one page",
                settings={},
                after=("verdict",),
                outputs=("report.html", "tensorboard"),
                work=self.report,
            ),
        ]

    def serving_stages(self) -> list[Stage]:
        """The stage of a run in a serving engine alone: served tokens a second."""
        c = self.config
        if c.engine != VLLM:
            return []
        return [
            Stage(
                name="served",
                title="served tokens a second, 1, 8 and 32 at once",
                settings={"decode": c.decode, "seed": c.seed, **self.engine},
                after=("decode",),
                outputs=(serving_speed.FOLDER, serving_speed.FILE),
                work=partial(serving_speed.measure_served, self),
                inputs=spec_inputs([*c.rules, *c.decoded]),
                replace=True,
            )
        ]

    def first_stages(self) -> list[Stage]:
        """Where the prompts come from: files, or questions about a database that is made first."""
        text = self.config.text
        if not self.asks:
            return [
                Stage(
                    name="text",
                    title="prompts in four parts that never overlap",
                    settings={"text": text},
                    after=(),
                    outputs=("data",),
                    work=self.text,
                    inputs=text_inputs(text),
                )
            ]
        parts = ("pair", *PARTS, ask.SHAPES)
        return [
            Stage(
                name="database",
                title="modules, functions and imports of the standard library",
                settings={"python": sys.version},
                after=(),
                outputs=(str(ask.database_path(Path())),),
                work=lambda _: ask.prepare_database(self.folder),
            ),
            Stage(
                name="text",
                title="questions in parts that share no name",
                settings={"text": text, "seed": self.config.seed},
                after=("database",),
                outputs=tuple(str(part_path(Path(), part)) for part in parts),
                work=self.text,
            ),
        ]

    def question_stages(self) -> list[Stage]:
        """The stages of a run with questions alone: shapes that nobody learned, and answers with their rows."""
        if not self.asks:
            return []
        return [
            Stage(
                name="shapes",
                title="questions of families that no part has",
                settings={"decode": self.config.decode, "seed": self.config.seed, **self.engine},
                after=("point",),
                outputs=(online.SHAPES,),
                work=partial(online.decode_shapes, self),
                inputs=spec_inputs([*self.config.rules, *self.config.decoded]),
                replace=True,
            ),
            Stage(
                name="answers",
                title="queries and their rows, side by side",
                settings={},
                after=("text", "decode", "shapes"),
                outputs=(answers.FILE,),
                work=self.answers,
            ),
        ]

    def answers(self, results: Results) -> Any:
        """Share of right answers by rule, and three questions with the rows of their answers."""
        constant = results["text"]["constant_answer"]["test"]
        chosen = self.chosen(results)["label"]
        return answers.show_answers(self.folder, chosen, constant, results["shapes"])

    @property
    def asks(self) -> bool:
        """True for a run that asks questions about a database of its own."""
        return self.config.text.questions is not None

    @property
    def metric(self) -> str:
        """Of quality, per prompt."""
        default = ask.execution_accuracy(self.folder) if self.asks else "chrf"
        return self.config.point.metric or default

    def text(self, _: Results) -> Any:
        return prepare_text(self.config.text, self.folder, self.config.seed)

    def pair(self, _: Results) -> Any:
        found = prepare_pair(self.config.pair, self.config.gate, self.folder, self.console, self.asks)
        if self.config.engine == VLLM:
            # What the engine does not serve is refused now.
            engine_settings(self.config.pair, found, self.config.seed).models()
        return found

    def decoder(self, pair: Mapping[str, Any]) -> StageDecoder:
        """The thing that decodes with the pair."""
        served = (
            engine_settings(self.config.pair, pair, self.config.seed) if self.config.engine == VLLM else None
        )
        return StageDecoder(lambda: open_pair(self.config.pair, pair), served)

    def traces(self, results: Results) -> Any:
        """Log every part; unfinished folders are taken up where they stopped."""
        rows = {}
        for part in PARTS:
            settings = CollectConfig(**self.collecting(results["pair"], part), **asdict(self.config.traces))
            collect(settings, self.trace_folder(part), existing="replace")
            rows[part] = len(self.open(part))
        return rows

    def collecting(self, pair: Mapping[str, Any], part: str) -> dict[str, Any]:
        """Settings that every collection of this run shares."""
        return {
            "drafter": pair["drafter"],
            "verifier": pair["verifier"],
            "prompts": str(part_path(self.folder, part)),
            "device": self.config.pair.device,
            "dtype": self.config.pair.dtype,
            "seed": self.config.seed,
        }

    def fit(self, results: Results) -> Any:
        """Fit every candidate, keep the best on validation; or with rounds the one chosen by decoding."""
        found = fit_candidates(
            self.config.heads.candidates,
            self.open("fit"),
            self.open("validation"),
            self.folder,
            self.config.seed,
        )
        if self.config.heads.rounds:
            found |= {"best": ROUNDS, "rounds": learn_in_rounds(self.config, results["pair"], self.folder)}
        return found

    def point(self, results: Results) -> Any:
        # What a certificate is for must not be chosen on the prompts that certify it.
        part = "calibration" if self.config.point.max_loss is None else "validation"
        found = operating_point.choose_points(
            self.open(part),
            self.rules(),
            self.config.point,
            self.config.decode.num_draft_tokens,
            self.config.seed,
            LEARNED,
        )
        best = DeferralHead.from_pretrained(self.folder / BEST)
        export_head(best, self.folder / "head", found["points"][LEARNED]["value"])
        if self.config.point.max_loss is not None:
            found["constraint"] = online.certify_constraint(self, results, found["best_plug_in"])
        provenance.write_json(self.folder / "point.json", found)
        return found

    def evaluate(self, results: Results) -> Any:
        """Curves, areas and matched comparisons on the test traces; the loss bound of the chosen point."""
        from deferral_train.evaluation import score_rules
        from deferral_train.evaluation.figures import draw_scores

        table = score_rules(
            self.open("test"),
            self.rules(),
            bootstrap=self.config.bootstrap,
            seed=self.config.seed,
            costs=self.costs(results["pair"]),
            num_draft_tokens=self.config.decode.num_draft_tokens,
            prefixes=SLIDER_PROMPTS,
        )
        out = self.folder / "evaluation"
        table.to_json(out / "scores.json")
        table.to_csv(out / "scores.csv")
        provenance.write_json(out / "prefixes.json", table.prefixes)
        draw_scores(table, out / "figures")
        shares = ("area", self.config.point.rejection_share)
        chosen = rule_from_spec(self.chosen(results)["spec"], typed=self.config.rules)
        break_down(
            self.open("test"),
            part_path(self.folder, "test"),
            results["pair"]["verifier"],
            {self.chosen(results)["name"]: chosen},
            self.config,
        ).write(out)
        return {
            "matched": [row for row in table.matched() if row["share"] in shares],
            "bound": operating_point.token_risk_bound(
                self.open("test"), chosen, self.config.point.confidence
            ),
        }

    def verdict(self, results: Results) -> Any:
        timed = self.config.decode.timed is not None
        verdict = make_verdict(
            Measured(
                decode=self.folder / "decode",
                timing=self.folder / (online.TIMING if timed else "decode"),
                gate=results["pair"]["gate"],
                bound=results["evaluate"]["bound"],
                skew=results["skew"],
                metric=self.metric,
                served=results.get("served"),
            ),
            self.chosen(results),
            self.config.point,
            self.config.seed,
            self._engine_line(results),
        )
        if self.asks:
            verdict["said"] = answers.say(verdict, results)
            verdict["control"] = self.config.control
        verdict["drafting"] = results["drafting"]
        verdict["training"] = f"fit/{results['fit']['best']}"
        provenance.write_json(self.folder / "verdict.json", verdict)
        return verdict

    def _engine_line(self, results: Results) -> tuple[str | None, str | None]:
        from transformers import AutoConfig

        pair = results["pair"]
        config = AutoConfig.from_pretrained(pair["verifier"])
        return engine_line(
            self.chosen(results), pair["drafter"], pair["verifier"], bool(config.is_encoder_decoder)
        )

    def report(self, _: Results) -> Any:
        from deferral_train.report import write_report

        return {"page": write_report(self.folder).name}

    def open(self, part: str) -> Traces:
        """The traces of a part."""
        return open_traces(self.trace_folder(part))

    def trace_folder(self, part: str) -> Path:
        return self.folder / "traces" / part

    def rules(self) -> dict[str, Rule | str]:
        """Every rule scored offline, the head last; their dials are swept."""
        head = DeferralHead.from_pretrained(self.folder / BEST)
        return {**{rule: rule for rule in self.config.rules}, LEARNED: learned_rule(head, alpha=0.0)}

    def decoded(self, results: Results) -> dict[str, str]:
        """Specs of the decoded rules at their operating points."""
        if results["point"]["best_plug_in"] not in self.config.rules:  # stage files may come from elsewhere
            raise InputError(
                f"{self.folder}/stages/point.json names a rule that the config does not; use fresh"
            )
        plug_ins = dict.fromkeys([*self.config.decoded, results["point"]["best_plug_in"]])
        specs = {
            **{rule: rule for rule in plug_ins},
            LEARNED: f"learned:head={self.folder / 'head'}",
        }
        return {
            name: operating_point.with_value(spec, *self.dial(results, name)) for name, spec in specs.items()
        }

    def dial(self, results: Results, name: str) -> tuple[str | None, float | None]:
        """A rule's dial and value: the certified one where it was asked for, else that of the common price."""
        point = results["point"]
        constraint = point.get("constraint")
        found = constraint if constraint is not None and constraint["name"] == name else point["points"][name]
        return found["parameter"], found["value"]

    def chosen(self, results: Results) -> dict[str, Any]:
        """The rule that `choose` certified, else the decoded one that lost least on calibration at the common price."""
        points, decoded, constraint = (
            results["point"]["points"],
            self.decoded(results),
            results["point"].get("constraint"),
        )
        certified = constraint is not None and constraint["name"] is not None
        name = (
            constraint["name"] if certified else min(decoded, key=lambda rule: points[rule]["risk_at_match"])
        )
        parameter, value = self.dial(results, name)
        return {
            "name": name,
            "label": name,
            "rule": name.partition(":")[0],
            "spec": decoded[name],
            "head": str(self.folder / "head") if name == LEARNED else None,
            "parameter": parameter,
            "value": value,
            "num_draft_tokens": self.config.decode.num_draft_tokens,
            "certificate": constraint["certificate"] if certified else None,
            "uncertified": constraint["reason"] if constraint is not None and not certified else None,
        }

    def costs(self, pair: Mapping[str, Any]) -> dict[str, float]:
        """Seconds of a drafter and a verifier pass, as the gate measured them."""
        return {"drafter": pair["gate"]["drafter_seconds"], "verifier": pair["gate"]["verifier_seconds"]}
