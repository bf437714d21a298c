"""Settings of a run. Every field is a YAML key and a flag; defaults are for a pair that the user brings."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deferral_train.collecting.config import SEQUENCE_METRICS, CollectConfig
from deferral_train.decoding.settings import ENGINES, Settings
from deferral_train.errors import InputError, config_errors
from deferral_train.pairs.scratch.train_config import PairConfig

STYLES = ("drawn", "house")  # of queries
PARTS = ("fit", "validation", "calibration", "test")


@dataclass(frozen=True)
class PromptPart:
    """Where the prompts of one part come from; the fields are those of ``pairs.read_prompts``.

    Attributes:
        path: prompts file, data set folder or the name of one for ``datasets``.
        format: of its rows, where its suffix does not say it: mbpp, spec_bench, speed_bench, mmlu and others.
        reference_path: second file of parallel text.
        prompt_field, reference_field: column names; the usual ones are found by themselves.
        template: text around every prompt, with ``{prompt}`` in it.
        subset, split: configuration and split of a data set.
        start, limit: rows to pass over, and most rows to take.
    """

    path: str = ""
    format: str | None = None
    reference_path: str | None = None
    prompt_field: str | None = None
    reference_field: str | None = None
    template: str = "{prompt}"
    subset: str | None = None
    split: str = "train"
    start: int = 0
    limit: int | None = None


@dataclass(frozen=True)
class QuestionsConfig:
    """Questions about the standard library's own database, answered in SQL; see ``deferral_train.questions``.

    Quality is then execution accuracy, and a pair to be trained learns from questions of its own.

    Attributes:
        pair, fit, validation, calibration, test: questions of each part; no two parts share a name.
        test_shapes: questions of families that no other part has.
        style: "drawn" writes every query in habits of its own, "house" all in one style.
    """

    pair: int = 16000
    fit: int = 600
    validation: int = 300
    calibration: int = 1000
    test: int = 600
    test_shapes: int = 120
    style: str = "drawn"

    def __post_init__(self) -> None:
        for name in ("pair", *PARTS, "test_shapes"):
            if getattr(self, name) < 1:
                raise InputError(f"text.questions.{name}={getattr(self, name)}: give at least 1 question")
        if self.style not in STYLES:
            raise InputError(f"text.questions.style={self.style!r}: use {' or '.join(STYLES)}")


@dataclass(frozen=True)
class TextConfig:
    """Real text in four parts that never overlap: a head learns, is chosen, is tuned and is judged on different ones.

    Attributes:
        stdlib: take the Python standard library's sources instead of files.
        questions: take questions about a database of the standard library instead of files.
        fit, validation, calibration, test: the parts; ignored with ``stdlib`` but for their ``limit``.
        prompt_characters, reference_characters: size of a window of source text, with ``stdlib``.
    """

    stdlib: bool = False
    questions: QuestionsConfig | None = None
    fit: PromptPart = field(default_factory=PromptPart)
    validation: PromptPart = field(default_factory=PromptPart)
    calibration: PromptPart = field(default_factory=PromptPart)
    test: PromptPart = field(default_factory=PromptPart)
    prompt_characters: int = 400
    reference_characters: int = 240

    def __post_init__(self) -> None:
        for part in PARTS:
            if not self.stdlib and self.questions is None and not getattr(self, part).path:
                raise InputError(f"text.{part}.path is empty; name a prompts file, or set text.stdlib: true")


@dataclass(frozen=True)
class PairSection:
    """The two models: a pair to train, or one that exists.

    Attributes:
        drafter, verifier: checkpoint folders or hub ids.
        train: how to train a pair instead; see ``deferral-train train-pair``.
        device, dtype, drafter_device, device_map: as ``pairs.load_models`` takes them.
    """

    drafter: str = ""
    verifier: str = ""
    train: PairConfig | None = None
    device: str = "auto"
    dtype: str = "auto"
    drafter_device: str | None = None
    device_map: str | None = None

    def __post_init__(self) -> None:
        if self.train is None and not (self.drafter and self.verifier):
            raise InputError("pair: name drafter and verifier (folders or hub ids), or give pair.train")


@dataclass(frozen=True)
class GateConfig:
    """Requirements on a pair, checked before hours are spent on it.

    Attributes:
        min_nats: the verifier's advantage on held-out text, nats a token.
        min_cost_ratio: the verifier's pass in drafter passes; below, drafting cannot pay.
        required: False reports the numbers and goes on.
    """

    min_nats: float = 0.2
    min_cost_ratio: float = 3.0
    required: bool = False


@dataclass(frozen=True)
class TracesConfig:
    """How distributions are logged; see ``deferral-train collect``.

    Attributes:
        prefixes: "reference" (teacher-forced) or an on-policy source.
        temperature: sampling temperature that D_TV is logged at besides 1.
        log_top_k: logged candidates of each model.
        chunk_prompts: prompts a shard.
        batch_tokens: most tokens of a padded batch.
        max_new_tokens: most tokens per prefix; default 128 on-policy, unlimited on references.
    """

    prefixes: str = "reference"
    temperature: float = 0.0
    log_top_k: int = 16
    chunk_prompts: int = 64
    batch_tokens: int = 4096
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class RoundsSettings:
    """Settings of rounds of learning.

    Attributes:
        rounds: collections along the cascade's own text, after the first along the verifier's.
        calls: verifier calls per token to aim for, as a share of lossless's.
        metrics: that texts are labelled and chosen by.
        label_share: of the places of each prompt that are labelled; ``own_share`` in the rounds.
        label_reference: ``given``, or ``verifier``.
        label_form, label_samples: above temperature 0: ``position`` or ``token`` (a head that reads the drafted token),
            and continuations of each side of a place.
        objectives: of the heads that are fitted in each round: ridge, squared or huber, all linear.
        length_tolerance: of the length of decoded validation text against lossless's; beyond it length is priced.
        temperature, num_draft_tokens, max_new_tokens, batch_size, seed: of collecting and decoding.
    """

    rounds: int = 2
    calls: float = 0.7
    metrics: tuple[str, ...] = SEQUENCE_METRICS
    label_share: float = CollectConfig.label_share
    own_share: float = 0.5
    label_reference: str = CollectConfig.label_reference
    label_form: str = CollectConfig.label_form
    label_samples: int = CollectConfig.label_samples
    objectives: tuple[str, ...] = ("ridge",)
    length_tolerance: float = 0.01
    temperature: float = Settings.temperature
    num_draft_tokens: int = Settings.num_draft_tokens
    max_new_tokens: int = Settings.max_new_tokens
    batch_size: int = 32
    seed: int = Settings.seed

    def __post_init__(self) -> None:
        if self.rounds < 0:
            raise InputError(f"rounds={self.rounds}: give 0 (the verifier's own text alone) or more")
        if not 0 < self.calls < 1:
            raise InputError(
                f"calls={self.calls:g}: give a share of lossless's verifier calls between 0 and 1"
            )
        if not 0 < self.own_share <= 1:
            raise InputError(f"own_share={self.own_share:g}: give a share above 0 and up to 1")
        if not self.objectives:
            raise InputError("objectives is empty; give at least ridge")
        if self.label_form == "token" and (not self.temperature or "ridge" in self.objectives):
            raise InputError(
                f"label_form='token', temperature={self.temperature:g}, objectives={list(self.objectives)}: labels of "
                "drafted tokens need a temperature above 0 and heads of objective squared or huber; ridge solves those "
                "of positions"
            )
        if not 0 <= self.length_tolerance < 1:
            raise InputError(
                f"length_tolerance={self.length_tolerance:g}: give a share between 0 and 1, such as 0.01"
            )


@dataclass(frozen=True)
class HeadsConfig:
    """Which heads are fitted; the one with the least val/regret is exported.

    Attributes:
        candidates: name to settings; the settings are those of ``training.FitConfig`` besides its traces.
        rounds: above 0: learn from finished texts instead, as ``deferral-train rounds`` does, in so many rounds along
            the cascade's own text; the candidates are fitted to compare with.
        calls: verifier calls per token that these aim for, as a share of lossless's.
        label_metric: that finished texts are scored by; default execution accuracy with ``text.questions``, else
            sentence BLEU and chrF1.
        label_share: of the places of each prompt that are labelled.
    """

    candidates: dict[str, dict[str, Any]] = field(default_factory=lambda: {"gap": {"head": "gap"}})
    rounds: int = 0
    calls: float = RoundsSettings.calls
    label_metric: tuple[str, ...] = ()
    label_share: float = RoundsSettings.label_share

    def __post_init__(self) -> None:
        if not self.candidates:
            raise InputError("heads.candidates is empty; give at least one, such as gap: {head: gap}")
        if self.rounds < 0:
            raise InputError(f"heads.rounds={self.rounds}: give 0 (none) or a number of rounds")


@dataclass(frozen=True)
class OperatingPointConfig:
    """How every rule's dial is set on the calibration part, so that rules are compared at the same price.

    Attributes:
        rejection_share: the rejection rate to match, as a share of lossless's.
        max_loss: a constraint instead, for the rule that is chosen: most mean loss of the metric per prompt against
            lossless, in (0, 1) (0.02 is two points). The best plug-in rule and the dial values to try are taken from
            the validation part; that rule and the head are decoded with them on the calibration part, and the setting
            of fewest verifier calls that `choose` certifies is taken.
        metric: of quality, a mean per prompt as ``deferral-train choose --metric`` takes it; default execution
            accuracy with ``text.questions``, else sentence chrF.
        shares: of lossless's rejection rate, one tried dial value each; from the first on they are tested, and a test
            that fails ends its rule's sequence.
        max_quality_loss: most points of the metric's mean below lossless that still count as help.
        confidence: of max_loss, and of the bounds on the loss per prompt and on the local token risk.
    """

    rejection_share: float = 0.5
    max_loss: float | None = None
    metric: str | None = None
    shares: tuple[float, ...] = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
    max_quality_loss: float = 1.0
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if not 0 <= self.rejection_share <= 1:
            raise InputError(
                f"point.rejection_share={self.rejection_share:g}: give a share between 0 and 1, such as 0.5"
            )
        if self.max_loss is not None and not 0 < self.max_loss < 1:
            raise InputError(
                f"point.max_loss={self.max_loss:g}: give a loss between 0 and 1, such as 0.02 for two points"
            )
        wrong = [share for share in self.shares if not 0 <= share <= 1]
        if wrong or not self.shares:
            raise InputError(f"point.shares: {wrong or 'empty'}; give shares between 0 and 1, such as 0.5")
        if not 0 < self.confidence < 1:
            raise InputError(
                f"point.confidence={self.confidence:g}: give a probability between 0 and 1, such as 0.95"
            )


@dataclass(frozen=True)
class DecodeSection:
    """How held-out prompts are decoded; see ``deferral-train decode``.

    Attributes:
        limit: most test prompts.
        num_draft_tokens: drafted block.
        max_new_tokens: per prompt.
        temperature: 0 is greedy.
        batch_size: prompts side by side; with engine vllm, requests that run at once.
        repetitions: interleaved, for timing.
        timed: decode so many of the prompts again one by one for the wall clock, with these repetitions; then the
            others are decoded once. None takes the time of the decoding itself.
        metrics: besides BLEU, chrF and exact match, as ``deferral-train decode --metrics`` takes them.
    """

    limit: int = 200
    num_draft_tokens: int = Settings.num_draft_tokens
    max_new_tokens: int = 64
    temperature: float = 0.0
    batch_size: int = 1
    repetitions: int = 3
    timed: int | None = None
    metrics: tuple[str, ...] = ()

    def settings(self, seed: int) -> Settings:
        """How one batch of prompts is decoded."""
        return Settings(
            num_draft_tokens=self.num_draft_tokens,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            batch_size=self.batch_size,
            seed=seed,
        )


@dataclass(frozen=True)
class FrontierConfig:
    """Quality against cost of whole rules, decoded: Figures 1, 3, 4 and 5 and Table 2 of the paper.

    Every rule is decoded at several values of its dial, which lie at given shares of lossless's rejection rate
    on the calibration part, so that one config serves any pair.

    Attributes:
        temperatures: of the sampling; empty decodes nothing.
        rules: by spec without a dial value; the learned head and the ends are always decoded.
        shares: of lossless's rejection rate, one dial value each.
        token_cascades, sequence_cascades: specs with dial values, decoded token by token and text by text.
        limit: most test prompts, for quality, rates and calls. batch_size: prompts side by side there.
        timed: how many of them are decoded again one by one, for latency. repetitions: of that, interleaved.
        metric: for the axis of quality: bleu, chrf, exact_match, or what ``deferral-train decode --metrics`` takes.
    """

    temperatures: tuple[float, ...] = ()
    rules: tuple[str, ...] = ("chow", "diff", "opt", "token_v1", "token_v2", "token_v3", "lossy", "bild")
    shares: tuple[float, ...] = (0.9, 0.7, 0.5, 0.3, 0.1)
    token_cascades: tuple[str, ...] = ()
    sequence_cascades: tuple[str, ...] = ()
    limit: int = 400
    batch_size: int = 32
    timed: int = 50
    repetitions: int = 1
    metric: str = "bleu"

    def __post_init__(self) -> None:
        wrong = [share for share in self.shares if not 0 <= share <= 1]
        if wrong or not self.shares:
            raise InputError(f"frontier.shares: {wrong or 'empty'}; give shares between 0 and 1, such as 0.5")
        bare = [spec for spec in (*self.token_cascades, *self.sequence_cascades) if "=" not in spec]
        if bare:
            raise InputError(f"frontier: cascade {bare[0]} has no dial value; write {bare[0]}:alpha=0.2")


@dataclass(frozen=True)
class RunConfig:
    """A whole run.

    Attributes:
        out: the run folder.
        seed: of everything that draws.
        rules: plug-in rules to score offline, by spec without a dial value.
        decoded: which of them are decoded beside ``verifier_only``, ``lossless``, the learned head and the plug-in
            rule that loses least on the calibration part.
        engine: transformers, the loop of this package; or vllm: stages that decode do so in vLLM, rounds have it finish
            the texts of labels, and the verdict speaks of served tokens a second.
        bootstrap: redraws of prompts for intervals.
        on_policy: test prompts along whose own prefixes predictions are held against counts (stage ``skew``); None
            takes all that are decoded.
        expected: stage to the seconds that it takes on the machine the config was made for; said at the start and
            beside what each stage took.
        control: a sentence for the page of a run with questions about a comparison that was made beside it, with its
            conditions; empty says nothing.
    """

    text: TextConfig
    pair: PairSection
    out: str = "runs/run"
    seed: int = 0
    gate: GateConfig = field(default_factory=GateConfig)
    traces: TracesConfig = field(default_factory=TracesConfig)
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    rules: tuple[str, ...] = (
        "chow",
        "diff",
        "opt",
        "opt_verifier",
        "token_v1",
        "token_v2",
        "token_v3",
        "bild",
    )
    decoded: tuple[str, ...] = ("opt", "token_v3")
    point: OperatingPointConfig = field(default_factory=OperatingPointConfig)
    decode: DecodeSection = field(default_factory=DecodeSection)
    frontier: FrontierConfig = field(default_factory=FrontierConfig)
    engine: str = ENGINES[0]
    bootstrap: int = 1000
    on_policy: int | None = None
    expected: dict[str, float] = field(default_factory=dict)
    control: str = ""

    def __post_init__(self) -> None:
        absent = [rule for rule in self.decoded if rule not in self.rules]
        if absent:
            raise InputError(
                f"decoded: {', '.join(absent)} not among rules; add it there, its dial is set on traces"
            )


def read_config(path: str | Path, **overrides: Any) -> RunConfig:
    """The config of a YAML file, with top-level fields replaced.

    Raises:
        InputError: a key or value that does not fit, named.
    """
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RunConfig, sub_configs=True)
    with config_errors(f"{path}: "):
        parsed = parser.instantiate(parser.parse_path(str(path)))
    return RunConfig(**{**parsed.as_dict(), **overrides})
