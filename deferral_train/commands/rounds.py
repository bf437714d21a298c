"""`deferral-train rounds`: learn from finished texts, along the cascade's own text, round after round."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from deferral_train.decoding.settings import ENGINES, VLLM
from deferral_train.pipeline.config import PairSection, RoundsSettings


@dataclass(frozen=True)
class RoundsConfig:
    """Label, fit and decode in rounds; choose round, head and price on validation prompts. Run again to resume.

    Attributes:
        drafter: checkpoint folder or hub id of the small model.
        verifier: checkpoint folder or hub id of the large model, same tokenizer.
        prompts: prompts to label and fit on: jsonl, csv, tsv, parquet or text (.gz too).
        validation: prompts to choose by, disjoint from these.
        out: folder: traces, heads, decoded texts, rounds.json, and head/ with the chosen one.
        reference_path: second file of parallel text, references of the prompts.
        validation_reference_path: the same for the validation prompts.
        start: prompts to pass over first.
        limit: use so many prompts.
        validation_start: validation prompts to pass over first.
        validation_limit: use so many validation prompts.
        prompt_format: jsonl, csv, tsv, parquet, text, mmlu, mbpp, spec_bench or speed_bench; default by suffix.
        prompt_field: column of the prompt.
        reference_field: column of the reference.
        template: text around each prompt, with {prompt} in it.
        rounds: collections along the cascade's own text, after the first along the verifier's.
        calls: verifier calls per token to aim for, as a share of lossless's.
        label_metric: what finished texts are scored by, as collect takes it.
        label_share: share of the places of each prompt that is labelled along the verifier's text.
        own_share: the same along the cascade's own text.
        label_reference: what texts are scored against: given, or verifier (its own text).
        label_form: above temperature 0: position, or token (a head that reads the drafted token).
        label_samples: above temperature 0: continuations of each side of a place.
        objectives: ridge, squared or huber: how heads are fitted; the best by decoding is kept.
        length_tolerance: of the length of decoded text against lossless's; beyond it length gets a price.
        temperature: 0 is greedy.
        num_draft_tokens: drafted block.
        max_new_tokens: per prompt.
        batch_size: prompts side by side in decoding.
        seed: of places, draws and splits.
        engine: transformers; or vllm: validation prompts are decoded and texts of labels finished in vLLM.
        device: auto, cpu, cuda, cuda:N.
        dtype: auto, float32, float16 or bfloat16.
    """

    drafter: str
    verifier: str
    prompts: str
    validation: str
    out: str = "runs/rounds"
    reference_path: str | None = None
    validation_reference_path: str | None = None
    start: int = 0
    limit: int | None = None
    validation_start: int = 0
    validation_limit: int | None = None
    prompt_format: str | None = None
    prompt_field: str | None = None
    reference_field: str | None = None
    template: str = "{prompt}"
    rounds: int = RoundsSettings.rounds
    calls: float = RoundsSettings.calls
    label_metric: list[str] = field(default_factory=lambda: list(RoundsSettings.metrics))
    label_share: float = RoundsSettings.label_share
    own_share: float = RoundsSettings.own_share
    label_reference: str = RoundsSettings.label_reference
    label_form: str = RoundsSettings.label_form
    label_samples: int = RoundsSettings.label_samples
    objectives: list[str] = field(default_factory=lambda: list(RoundsSettings.objectives))
    length_tolerance: float = RoundsSettings.length_tolerance
    temperature: float = RoundsSettings.temperature
    num_draft_tokens: int = RoundsSettings.num_draft_tokens
    max_new_tokens: int = RoundsSettings.max_new_tokens
    batch_size: int = RoundsSettings.batch_size
    seed: int = RoundsSettings.seed
    engine: str = ENGINES[0]
    device: str = "auto"
    dtype: str = "auto"


# The command line takes every field of the config as a flag and a YAML key.
SETTINGS = RoundsConfig


def run(config: RoundsConfig) -> int:
    """Read both sets of prompts, learn in rounds, and print a line of each."""
    from deferral_train.decoding.pair import load_pair
    from deferral_train.evaluation.scorers import make_scorers
    from deferral_train.pairs.prompts import read_prompts
    from deferral_train.pipeline.decoder import StageDecoder, engine_facts, engine_settings
    from deferral_train.pipeline.learning import Learning
    from deferral_train.provenance import one_writer

    engine_facts(config.engine)  # an unknown one, or one that is not installed, is refused first
    given = {name: getattr(config, name) for name in RoundsSettings.__dataclass_fields__ if name != "metrics"}
    settings = RoundsSettings(
        **given | {"metrics": tuple(config.label_metric), "objectives": tuple(config.objectives)}
    )
    columns = {name: getattr(config, name) for name in ("prompt_field", "reference_field", "template")}
    prompts = read_prompts(
        config.prompts,
        config.prompt_format,
        reference_path=config.reference_path,
        start=config.start,
        limit=config.limit,
        **columns,
    )
    validation = read_prompts(
        config.validation,
        config.prompt_format,
        reference_path=config.validation_reference_path,
        start=config.validation_start,
        limit=config.validation_limit,
        **columns,
    )
    scorers = make_scorers(settings.metrics)
    decoder = None
    if config.engine == VLLM:
        named = {"drafter": config.drafter, "verifier": config.verifier}
        section = PairSection(
            drafter=config.drafter, verifier=config.verifier, device=config.device, dtype=config.dtype
        )
        opened = engine_settings(section, named, config.seed, beside=True)
        opened.models()  # a pair that the engine does not serve is refused before anything is loaded
        decoder = StageDecoder(lambda: pair.models, opened)
    pair = load_pair(config.drafter, config.verifier, config.device, config.dtype)
    with one_writer(config.out, "rounds"):
        content = Learning(pair, prompts, validation, scorers, settings, config.out, decoder).run()
    for line in table(content):
        print(line)
    reached = content["chosen"]["at_calls"]["calls"]
    if abs(reached - config.calls) > 0.01:
        print(
            f"calls={config.calls:g} was not reached: the nearest decoded setting takes {reached:.3f} of lossless's"
        )
    print(f"chosen head in {config.out}/head, all rounds in {config.out}/rounds.json")
    return 0


def table(content: dict[str, Any]) -> list[str]:
    """A line for each round: what it was labelled on, and its best head at the calls that are aimed for."""
    lines = [f"{'round':>5} {'labelled':>9} {'price':>7} {'alpha':>9} {'calls':>6} {'loss':>8} {'length':>7}"]
    for record in content["rounds"]:
        best = next(one for one in record["candidates"] if one["head"] == record["best"])
        at = best["at_calls"]
        mark = " <- chosen" if record["round"] == content["chosen"]["round"] else ""
        lines.append(
            f"{record['round']:>5} {record['labelled']:>9,} {best['length_price']:>7g} {at['alpha']:>9.4g} "
            f"{at['calls']:>6.3f} {at['loss']:>8.4f} {at['length']:>7.3f}{mark}"
        )
    return lines
