"""Rounds of learning from finished texts: label along a path, fit, decode, label along the new cascade's own text.

The first path is the verifier's own text. Every further round follows the cascade of the current head at the asked-for
price, and refits on everything labelled so far: a head's own prefixes are not the verifier's. Round, head and price are
chosen by decoding validation prompts, not by the error of a regression. Everything that is finished is taken as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deferral_train import provenance
from deferral_train.collecting.api import collect
from deferral_train.collecting.config import CollectConfig
from deferral_train.collecting.first_look import CorpusMetric
from deferral_train.decoding.outputs import OUTPUTS, read_lines
from deferral_train.decoding.pair import Pair, load_pair
from deferral_train.decoding.settings import VLLM, DecodeConfig, Settings
from deferral_train.errors import InputError
from deferral_train.evaluation.bootstrap import MIN_PROMPTS, PromptBootstrap
from deferral_train.evaluation.scorers import make_scorers
from deferral_train.evaluation.sequence import (
    Decoded,
    composite_loss,
    counted_loss,
    predicted_loss,
    quantiles_of_estimates,
    score_decoded,
)
from deferral_train.heads.base import DeferralHead
from deferral_train.heads.fingerprint import weights_key
from deferral_train.heads.rules import learned_rule, rule_from_spec
from deferral_train.pairs.overlap import content_hash
from deferral_train.pairs.prompts import Prompt
from deferral_train.pipeline.ask import execution_accuracy
from deferral_train.pipeline.config import RoundsSettings, RunConfig
from deferral_train.pipeline.decoder import StageDecoder, engine_settings
from deferral_train.pipeline.heads import BEST
from deferral_train.pipeline.text import read_part
from deferral_train.redaction import redacted
from deferral_train.traces import Traces, open_traces
from deferral_train.training.config import FitConfig, plain_settings
from deferral_train.training.fit import fit
from deferral_train.training.resuming import traces_key

LEVELS = (0.3, 0.45, 0.6, 0.75, 0.88)  # shares of the places that are kept, by estimates of the latest traces
PROBE = 0.15  # first price on length that is tried, in deviations
MOST_PRICE = 1.0
MOST_PRICES = 5  # each is a fit and a decoding of the validation prompts
LOSSLESS = "lossless"
ROUNDS = "rounds"  # what the head of rounds is called in a run, and their folder


@dataclass(frozen=True)
class DecodedPoint:
    """A head's rule at one alpha, decoded on the validation prompts.

    Attributes:
        alpha: its dial.
        calls: verifier calls per token over lossless's.
        loss: quality lost against lossless, in the labels' unit.
        length: words over lossless's.
        scores: metric to mean.
    """

    alpha: float
    calls: float
    loss: float
    length: float
    scores: dict[str, float]


@dataclass(frozen=True)
class Candidate:
    """A fitted head and what decoding showed of it.

    Attributes:
        head: folder.
        objective: that it was fitted by.
        length_price: in deviations of the change in words.
        points: ascending in calls.
        at_calls: all of a point's numbers at the calls that are aimed for, linear between neighbours.
    """

    head: str
    objective: str
    length_price: float
    points: tuple[DecodedPoint, ...]
    at_calls: DecodedPoint


def at_calls(points: Sequence[DecodedPoint], calls: float) -> DecodedPoint:
    """A point's numbers at given calls, linear between its neighbours, the nearest end beyond the last.

    Args:
        points: ascending in calls.
        calls: as a share of lossless's.
    """
    known = [point.calls for point in points]

    def between(values: Sequence[float]) -> float:
        return float(np.interp(calls, known, list(values)))

    scores = {name: between([point.scores[name] for point in points]) for name in points[0].scores}
    return DecodedPoint(
        between([point.alpha for point in points]),
        float(np.clip(calls, known[0], known[-1])),
        between([point.loss for point in points]),
        between([point.length for point in points]),
        scores,
    )


def next_price(excess: Mapping[float, float], tolerance: float) -> float | None:
    """The price on length to try next, from the excess of length over lossless's at those tried, in their order.

    The first is `PROBE` towards the length that is missing; then on the line through the two nearest prices of which
    one writes too long and one too short, or as long as there is none, through the last two. None where one is within
    the tolerance, where enough were tried, or where nothing new is left.
    """
    prices = list(excess)
    if min(map(abs, excess.values())) <= tolerance or len(prices) >= MOST_PRICES:
        return None
    if len(prices) == 1:
        return PROBE if excess[prices[0]] > 0 else -PROBE
    longer = [price for price in prices if excess[price] > 0]
    shorter = [price for price in prices if excess[price] < 0]
    a, b = prices[-2:]
    if longer and shorter:
        a, b = min(longer, key=lambda one: excess[one]), max(shorter, key=lambda one: excess[one])
    if excess[a] == excess[b]:
        return None
    price = round(
        float(np.clip(a - excess[a] * (b - a) / (excess[b] - excess[a]), -MOST_PRICE, MOST_PRICE)), 3
    )
    return None if price in excess else price


class Learning:
    """The rounds of one pair.

    Args:
        pair: that learns to defer.
        fit_prompts: labelled and fitted on.
        validation: decoded to choose by.
        scorers: by metric.
        settings: what is asked for.
        out: folder.
        decoder: decodes, and finishes the texts of labels, in the pair's place.
    """

    def __init__(
        self,
        pair: Pair,
        fit_prompts: Sequence[Prompt],
        validation: Sequence[Prompt],
        scorers: Mapping[str, Any],
        settings: RoundsSettings,
        out: str | Path,
        decoder: StageDecoder | None = None,
    ) -> None:
        self.pair, self.validation = pair, validation
        self.decoder = decoder or StageDecoder(lambda: pair.models)
        # Once each: a fit sets some aside by prompt, and texts that repeat would be on both sides.
        first: dict[str, Prompt] = {}
        for prompt in fit_prompts:
            first.setdefault(content_hash(prompt.prompt), prompt)
        self.fit_prompts = list(first.values())
        self.scorers, self.settings, self.out = dict(scorers), settings, Path(out)
        # By text: ids that were made of a file's name and the row are equal in two files of one name.
        shared = [prompt.id for prompt in validation if content_hash(prompt.prompt) in first]
        if shared:
            raise InputError(
                f"{len(shared)} validation prompts have the text of a prompt that is fitted on, first {min(shared)}; "
                "use others"
            )
        self._check_references()
        self.references: dict[
            str, str
        ] = {}  # of the validation prompts, where they are the verifier's own texts
        self.ran: dict[str, Any] | None = None  # what decoded, where that is not the loop
        self.traces: list[Traces] = []
        self.records: list[dict[str, Any]] = []
        self.matrix = pair.models.verifier.get_output_embeddings().weight.detach().float().cpu()

    def run(self) -> dict[str, Any]:
        """Every round; writes ``rounds.json`` after each, and the chosen head to ``head/``."""
        lossless = self._decode_lossless()
        spec: str | None = None
        for number in range(self.settings.rounds + 1):
            self._collect(number, spec)
            found = [self._priced(number, name, lossless) for name in self.settings.objectives]
            best = min(found, key=lambda one: one.at_calls.loss)
            spec = f"learned:head={best.head},alpha={best.at_calls.alpha:.6g}"
            self.records.append(self._record(number, found, best))
            self._write(lossless)
        return self._choose(lossless)

    def _check_references(self) -> None:
        """Refuse, before anything is computed, validation prompts that a metric cannot score."""
        wanting = [
            name for name, one in self.scorers.items() if not getattr(one, "without_references", False)
        ]
        missing = [prompt.id for prompt in self.validation if prompt.reference is None]
        if self.settings.label_reference == "given" and wanting and missing:
            raise InputError(
                f"label_metric {wanting[0]} needs references, and {len(missing)} of {len(self.validation)} validation "
                f"prompts have none (first: {missing[0]}); give --validation_reference_path, or use "
                "--label_reference verifier"
            )

    # One round

    def _collect(self, number: int, spec: str | None) -> None:
        """Label along the verifier's own text, or along the cascade's."""
        settings = self.settings
        config = CollectConfig(
            prefixes="verifier" if spec is None else "cascade",
            rule=spec,
            temperature=settings.temperature,
            log_top_k=0,
            hidden="verifier",
            labels="sequence",
            label_metric=settings.metrics,
            label_share=settings.label_share if spec is None else settings.own_share,
            label_reference=settings.label_reference,
            label_form=settings.label_form,
            label_samples=settings.label_samples,
            label_scales=self.scales if spec is not None else (),
            max_new_tokens=settings.max_new_tokens,
            num_draft_tokens=settings.num_draft_tokens,
            blocks="served" if self.decoder.served and spec is not None else "tight",
            seed=settings.seed + number,
        )
        folder = self.out / "traces" / f"round-{number}"
        sampled = settings.temperature > 0
        with self.decoder.writer(self.fit_prompts, settings.max_new_tokens, sampled) as engine:
            collect(
                config, folder, models=self.pair.models, prompts=self.fit_prompts, scores=self.scorers, engine=engine
            )  # fmt: skip
        self.traces.append(open_traces(folder))

    @property
    def scales(self) -> tuple[float, ...]:
        """Deviations of the metrics' gaps in the first fit set, kept for all rounds."""
        return tuple(self.traces[0].manifest.labels["scales"])

    def _priced(self, number: int, objective: str, lossless: Decoded) -> Candidate:
        """The head whose decoded text is as long as lossless's: a price on length where that is needed."""
        tried: list[Candidate] = []
        price: float | None = 0.0
        while price is not None:
            tried.append(self._candidate(number, objective, price, lossless))
            excess = {one.length_price: one.at_calls.length - 1 for one in tried}
            price = next_price(excess, self.settings.length_tolerance)
        return min(tried, key=lambda one: abs(one.at_calls.length - 1))

    def _candidate(self, number: int, objective: str, price: float, lossless: Decoded) -> Candidate:
        folder = self.out / f"round-{number}" / f"{objective}-length{price:+g}"
        head = self._fitted(folder, objective, price)
        alphas = quantiles_of_estimates(self.traces[-1], head, LEVELS)
        points = sorted(self._points(folder, head, alphas, lossless), key=lambda point: point.calls)
        constraint = at_calls(points, self.settings.calls)
        return Candidate(str(folder / "head"), objective, price, tuple(points), constraint)

    def _fitted(self, folder: Path, objective: str, price: float) -> DeferralHead:
        config = FitConfig(
            train=list(self.traces),
            head="token_gap" if self.settings.label_form == "token" else "gap",
            truth=f"sequence:length={price:g}" if price else "sequence",
            body="linear",
            objective=objective,
            seed=self.settings.seed,
            verifier=self.matrix,
        )
        # What lies there is taken up only where it was made from these traces and settings.
        made = {
            "settings": plain_settings(config) | {"train": [traces_key(traces) for traces in self.traces]},
            "matrix": weights_key({"matrix": self.matrix}),
        }
        record = folder / "head_made_from.json"
        now = json.loads(json.dumps(provenance.record_of(made)))
        before = provenance.read_object(record, "remove it")
        if before is not None and before.get("made_from") == now:
            head = DeferralHead.from_pretrained(folder / "head")
            if before.get("weights") == weights_key(head):
                return head
        head = fit(config, folder / "fit", resume=False).head
        head.save_pretrained(folder / "head")
        provenance.write_json(record, {"made_from": now, "weights": weights_key(head)})
        return head

    def _points(
        self, folder: Path, head: DeferralHead, alphas: Sequence[float], lossless: Decoded
    ) -> list[DecodedPoint]:
        rules = {f"alpha={alpha:g}": learned_rule(head, alpha) for alpha in dict.fromkeys(alphas)}
        rows = self._decoded(rules, folder / "decode")
        points = []
        for label, rule in rules.items():
            assert rule.dial_value is not None
            found = score_decoded(rows[label], self.scorers)
            points.append(self._point(rule.dial_value, found, lossless))
        return points

    def _point(self, alpha: float, found: Decoded, lossless: Decoded) -> DecodedPoint:
        loss = composite_loss(found, lossless, self.settings.metrics, self.scales)
        return DecodedPoint(
            alpha, found.calls / lossless.calls, loss, found.words / lossless.words, found.scores
        )

    def _decode_lossless(self) -> Decoded:
        rows = self._decoded({LOSSLESS: rule_from_spec(LOSSLESS)}, self.out / LOSSLESS)[LOSSLESS]
        if self.settings.label_reference == "verifier":
            self.references = {row["id"]: row["text"] for row in rows if row["repetition"] == 0}
            rows = [row | {"reference": row["text"]} for row in rows]
        return score_decoded(rows, self.scorers)

    def _decoded(self, rules: Mapping[str, Any], out: Path) -> dict[str, list[dict[str, Any]]]:
        """Lines of every rule on the validation prompts."""
        settings = self.settings
        how = Settings(
            num_draft_tokens=settings.num_draft_tokens,
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
            temperature=settings.temperature,
            seed=settings.seed,
        )
        summary = self.decoder.decode(self.validation, rules, DecodeConfig(how), out)
        self.ran = next((rule["ran"] for rule in summary["rules"].values() if "ran" in rule), None)
        found: dict[str, list[dict[str, Any]]] = {label: [] for label in rules}
        for row in read_lines(out / OUTPUTS):
            given = {"reference": self.references[row["id"]]} if self.references else {}
            found[row["rule"]].append(row | given)
        return found

    # What is written

    def _record(self, number: int, found: Sequence[Candidate], best: Candidate) -> dict[str, Any]:
        traces = self.traces[-1]
        record: dict[str, Any] = {
            "round": number,
            "prefixes": traces.manifest.prefixes,
            "labelled": int((~np.isnan(traces.column("sequence_gap"))).sum()),
            "drift": traces.manifest.labels.get("drift"),
            "candidates": [asdict(one) for one in found],
            "best": best.head,
        }
        if (
            number and self.settings.label_form == "position"
        ):  # else labels are of other tokens than the kept ones
            # On the fit prompts, along the text of the head before: what its kept places cost by their labels.
            record["predicted"] = self._prediction(traces)
        return record

    def _prediction(self, traces: Traces) -> dict[str, Any]:
        """Mean loss per text that the kept places' labels predict, and what the same texts lost, by metric of texts."""
        single = {name: one for name, one in self.scorers.items() if not isinstance(one, CorpusMetric)}
        predicted = predicted_loss(traces).loss
        if not single or self.settings.temperature or self.settings.label_reference != "given":
            return {name: {"predicted": float(predicted[:, n].mean())} for n, name in enumerate(self.scorers)}
        references = {prompt.id: prompt.reference for prompt in self.fit_prompts}
        counted = counted_loss(traces, self.traces[0], self.pair.text, references, single)
        redraws = PromptBootstrap(len(counted), 1000 if len(counted) >= MIN_PROMPTS else 0)
        found = {}
        for place, name in enumerate(single):
            mine = predicted[:, list(self.scorers).index(name)]
            found[name] = {
                "predicted": float(mine.mean()),
                "counted": float(counted[:, place].mean()),
                "difference": redraws.mean(mine - counted[:, place]).as_dict(),
            }
        return found

    def _write(self, lossless: Decoded, chosen: Mapping[str, Any] | None = None) -> dict[str, Any]:
        content = {
            "settings": asdict(self.settings),
            **({"ran": self.ran} if self.ran else {}),
            "scales": dict(zip(self.settings.metrics, self.scales)),
            "lossless": asdict(lossless),
            "rounds": self.records,
            "chosen": chosen,
        }
        provenance.write_json(self.out / "rounds.json", redacted(content))
        return content

    def _choose(self, lossless: Decoded) -> dict[str, Any]:
        """The head of least decoded loss at the calls that are aimed for, exported with its alpha."""
        best = min(self.records, key=lambda record: _best_of(record)["at_calls"]["loss"])
        found = _best_of(best)
        head = DeferralHead.from_pretrained(found["head"])
        alpha = float(f"{found['at_calls']['alpha']:.6g}")
        head.metadata = {**head.metadata, "alpha": alpha}
        head.save_pretrained(self.out / "head")
        chosen = {
            "round": best["round"],
            "objective": found["objective"],
            "length_price": found["length_price"],
            "alpha": alpha,
            "at_calls": found["at_calls"],
            "head": "head",
        }
        return self._write(lossless, chosen)


def learn_in_rounds(config: RunConfig, pair: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The rounds of a run: on its fit part, chosen by decoding its validation part; the head becomes the run's best.

    Args:
        config: of the run.
        pair: what its stage says of the two models.
        folder: of the run.

    Returns:
        what was chosen, and a line's worth of every round.
    """
    heads, how = config.heads, config.decode
    default = RoundsSettings().metrics if config.text.questions is None else (execution_accuracy(folder),)
    settings = RoundsSettings(
        rounds=heads.rounds,
        calls=heads.calls,
        metrics=tuple(heads.label_metric) or default,
        label_share=heads.label_share,
        temperature=how.temperature,
        num_draft_tokens=how.num_draft_tokens,
        max_new_tokens=how.max_new_tokens,
        batch_size=max(how.batch_size, 32),
        seed=config.seed,
    )
    models = load_pair(pair["drafter"], pair["verifier"], config.pair.device, config.pair.dtype)
    fit_prompts, validation = (read_part(folder, part) for part in ("fit", "validation"))
    scorers = make_scorers(settings.metrics)
    decoder = None
    if config.engine == VLLM:
        decoder = StageDecoder(
            lambda: models.models, engine_settings(config.pair, pair, config.seed, beside=True)
        )
    learning = Learning(models, fit_prompts, validation, scorers, settings, folder / ROUNDS, decoder)
    content = learning.run()
    DeferralHead.from_pretrained(folder / ROUNDS / "head").save_pretrained(folder / BEST)
    rounds = [
        {"round": one["round"], "labelled": one["labelled"]} | _best_of(one)["at_calls"]
        for one in content[ROUNDS]
    ]
    return {"chosen": content["chosen"], "rounds": rounds}


def _best_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The candidate that a round went on with."""
    return next(one for one in record["candidates"] if one["head"] == record["best"])
