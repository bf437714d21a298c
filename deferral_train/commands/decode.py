"""`deferral-train decode`: prompts in, outputs and a summary out, for any list of rules side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from deferral_train.decoding.settings import ENGINES, VLLM, DecodeConfig, Settings
from deferral_train.errors import InputError

if TYPE_CHECKING:
    from deferral_train.decoding.decoder import Decoder
    from deferral_train.decoding.stopping import StopDrafting
    from deferral_train.pairs.prompts import Prompt
    from deferral_train.rules.base import Rule

STOPS = ("confidence", "cumulative", "entropy", "head", "acceptance", "speed")


@dataclass(frozen=True)
class DecodeSettings:
    """Decode prompts with a drafter and a verifier under any rules, side by side.

    Writes outputs.jsonl (a line per rule, repetition and prompt, as batches finish), batches.jsonl and
    summary.json (quality, tokens/s, ms/token, calls, deferral and rejection rates, output length). The same
    call again resumes.

    Attributes:
        drafter: checkpoint folder or hub id of the small model.
        verifier: checkpoint folder or hub id of the large model.
        prompts: jsonl, csv, parquet or text file, or the name of a data set.
        out: folder for the outputs.
        rules: rules to compare, such as opt:alpha=0.2 or learned:head=FOLDER,alpha=0.1.
        prompt_format: jsonl, csv, tsv, parquet, text, mmlu, mbpp, spec_bench, speed_bench or dataset; default by
            suffix.
        reference_path: second file of parallel text: line by line the reference of each prompt.
        prompt_field: field or column of the prompt.
        reference_field: field or column of the reference.
        template: text around every prompt.
        subset: configuration of a named data set.
        split: split of a data set.
        start: rows to pass over first.
        limit: most prompts to read.
        num_draft_tokens: most tokens drafted per block.
        max_new_tokens: most tokens emitted per prompt.
        batch_size: prompts decoded together.
        temperature: of the sampling; 0 is greedy.
        top_k: truncation of the sampling distributions, 0 for none.
        top_p: truncation of the sampling distributions, 1 for none.
        seed: of the sampling.
        repetitions: times that everything is decoded; rules take turns batch by batch.
        execution: speculative, token, lazy or sequence.
        bonus: distribution of the token after a whole block: verifier or exact.
        verification: token checks drafted tokens one by one, block together: longer drafts stand.
        blocks: tight, or served: the verifier gives the first token and the last block runs over the limit, as
            serving engines do, so that a lossy rule's texts are those of engine vllm (which has no other).
        max_request_loss: bound on the summed estimated loss of kept tokens per prompt; then lossless.
        stop: adaptive draft length: confidence:threshold=0.4, cumulative:threshold=0.2,
            entropy:threshold=0.4,weight=0.2, head:head=FOLDER,alpha=0.1,threshold=0.5,
            acceptance:head=FOLDER,threshold=0.7, speed:cost=0.1.
        drafting: cascade of drafters in place of the drafter alone: vertical:tokens=4,copies=10,
            horizontal:tokens=4,copies=6, max_gram:tokens=10, or a .yaml file with k, lenience, smaller drafters.
        stop_strings: end a text once it holds one of these.
        chat: use the tokenizer's chat template: auto, on or off.
        log_tokens: candidates of both models to record per token, 0 for none.
        metrics: besides BLEU, chrF and exact match: rouge1, rouge2, rougeL, squad_f1, gsm8k, log_likelihood (of the
            text under the verifier), "sql:DATABASE" (execution accuracy: the text is a query, a SQLite file answers
            it as it answers the reference), python_tests (pass@1: the text is a Python program, run with the prompt's
            tests, see allow_code_execution), or "command:PROGRAM" (pass@1: the program reads the text and exits with
            0).
        accept_mismatch: serve a head made for other weights, dtype or temperature; recorded in the summary.
        engine: transformers, the loop of this package, or vllm: the plug-in in vLLM in this process, all prompts
            at once, batch_size of them running; times are those of served tokens.
        baselines: with engine vllm, what it does by itself, without the plug-in, in the same table: no_speculation,
            lossless, block (verification), fly.
        server: address of a vLLM server with the plug-in, http://HOST:PORT, asked in place of local models: rules are
            then lossless, server (its own) and server:dial=X; of verifier the tokenizer is read, and batch_size
            requests are under way at once. Its key is taken from the environment, DEFERRAL_TRAIN_API_KEY.
        kv_gib: with engine vllm, memory of its KV cache in GiB; default its own share of a GPU, 1 on a CPU.
        device: auto, cpu, cuda, cuda:N or mps.
        dtype: auto, float32, float16 or bfloat16.
        drafter_device: device of the drafter, where it is not the verifier's.
        device_map: auto spreads the verifier over several GPUs and the CPU (needs accelerate); also balanced,
            balanced_low_0, sequential.
    """

    drafter: str = ""
    verifier: str = ""
    prompts: str = ""
    out: str = "runs/decode"
    rules: list[str] = field(default_factory=lambda: ["lossless"])
    prompt_format: str | None = None
    reference_path: str | None = None
    prompt_field: str | None = None
    reference_field: str | None = None
    template: str = "{prompt}"
    subset: str | None = None
    split: str = "train"
    start: int = 0
    limit: int | None = None
    num_draft_tokens: int = Settings.num_draft_tokens
    max_new_tokens: int = Settings.max_new_tokens
    batch_size: int = Settings.batch_size
    temperature: float = Settings.temperature
    top_k: int = Settings.top_k
    top_p: float = Settings.top_p
    seed: int = Settings.seed
    repetitions: int = DecodeConfig.repetitions
    execution: str = Settings.execution
    bonus: str = Settings.bonus
    verification: str = Settings.verification
    blocks: str = Settings.blocks
    max_request_loss: float | None = Settings.max_request_loss
    stop: str | None = None
    drafting: str | None = None
    stop_strings: list[str] = field(default_factory=list)
    chat: str = Settings.chat
    log_tokens: int = DecodeConfig.log_tokens
    metrics: list[str] = field(default_factory=list)
    accept_mismatch: bool = Settings.accept_mismatch
    engine: str = ENGINES[0]
    baselines: list[str] = field(default_factory=list)
    kv_gib: float | None = None
    server: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    drafter_device: str | None = None
    device_map: str | None = None


# The command line takes every field of the config as a flag and a YAML key.
SETTINGS = DecodeSettings


def run(config: DecodeSettings, *, fresh: bool = False, allow_code_execution: bool = False) -> int:
    """Decode under every rule, score the outputs and print the summary.

    Args:
        config: see the fields above.
        fresh: remove the outputs of another run from ``out`` and start over.
        allow_code_execution: let the metric python_tests run programs that the models wrote, in isolated processes.
    """
    from deferral_train.evaluation.code import code_execution

    with code_execution(allow_code_execution):
        return _decode(config, fresh)


def _decode(config: DecodeSettings, fresh: bool) -> int:
    from deferral_train.decoding.decode import decode
    from deferral_train.decoding.drafting.spec import drafting_from_spec
    from deferral_train.evaluation.outputs import check_metrics, score_outputs
    from deferral_train.evaluation.specdec_bench import write_specdec_bench
    from deferral_train.provenance import one_writer

    _check(config)
    drafting = drafting_from_spec(config.drafting) if config.drafting is not None else None
    given = {name: getattr(config, name) for name in Settings.__dataclass_fields__}
    settings = Settings(
        **given
        | {
            "stop": stop_from_spec(config.stop),
            "stop_strings": tuple(config.stop_strings),
            "drafting": drafting.plan if drafting is not None else None,
        }
    )
    asked = DecodeConfig(settings, config.repetitions, config.log_tokens)
    rules = _rules(config)
    prompts = _prompts(config)
    check_metrics(config.metrics, prompts)
    opened = (
        _open_server if config.server is not None else _open_engine if config.engine == VLLM else _open_pair
    )
    with opened(config, asked, rules, drafting.smaller if drafting is not None else ()) as (
        pair,
        rules,
        asked,
    ):
        summary = decode(pair, prompts, rules, asked, config.out, fresh)
    with one_writer(config.out, "decode"):
        if config.metrics:
            models = _scoring_models(config, pair)
            summary = score_outputs(config.out, config.metrics, models, prompts, chat=config.chat)
        write_specdec_bench(config.out, summary, config.drafter, config.verifier)
    for line in table(summary, config.metrics):
        print(line)
    print(f"outputs and summary in {config.out}")
    return 0


# Options that place models of one's own, and those of the engine in this process; value where they are not given.
PLACES = {"drafter_device": None, "device_map": None}
OF_ENGINE: dict[str, Any] = {"baselines": [], "kv_gib": None}


def _check(config: DecodeSettings) -> None:
    """Refuse options that what decodes has not, and absent ones that it needs."""
    if config.engine not in ENGINES:
        raise InputError(f"engine is {config.engine!r}; use one of {', '.join(ENGINES)}")
    if config.server is not None and config.engine != ENGINES[0]:
        raise InputError(
            f"server and engine={config.engine!r}: a server is an engine of its own; leave one of them out"
        )
    for name in ("drafter", "verifier", "prompts"):
        if not getattr(config, name) and (name != "drafter" or config.server is None):
            raise InputError(f"{name} is not given; add --{name}")
    where = "--server" if config.server is not None else f"engine {config.engine}"
    wrong: dict[str, Any] = {}
    if config.server is not None or config.engine == VLLM:
        wrong |= PLACES
    if config.server is not None or config.engine != VLLM:
        wrong |= OF_ENGINE
    if config.server is not None:
        wrong |= {"drafter": "", "device": "auto", "dtype": "auto", "accept_mismatch": False}
    for name, absent in wrong.items():
        if getattr(config, name) != absent:
            raise InputError(
                f"{name} is {getattr(config, name)!r}, which {where} does not take; leave it out"
            )
    from deferral_train.evaluation.outputs import LIKELIHOOD

    if config.server is not None and LIKELIHOOD in config.metrics:
        raise InputError(
            f"metrics: {LIKELIHOOD} needs the verifier's weights, and --server loads none; leave it out"
        )


def _rules(config: DecodeSettings) -> dict[str, Rule]:
    """Rules by label."""
    from deferral_train.heads.rules import rule_from_spec

    if len(set(config.rules)) < len(config.rules):
        raise InputError("rules: the same rule is given twice; name each once")
    if config.server is not None:
        from deferral_train.serving.server_pair import server_rules

        return server_rules(config.rules)
    return {spec: rule_from_spec(spec, typed=config.rules) for spec in config.rules}


def _prompts(config: DecodeSettings) -> list[Prompt]:
    from deferral_train.pairs.prompts import read_prompts

    return read_prompts(
        config.prompts,
        config.prompt_format,
        reference_path=config.reference_path,
        prompt_field=config.prompt_field,
        reference_field=config.reference_field,
        template=config.template,
        subset=config.subset,
        split=config.split,
        start=config.start,
        limit=config.limit,
    )


Opened = tuple["Decoder", "dict[str, Rule]", DecodeConfig]


@contextmanager
def _open_pair(
    config: DecodeSettings, asked: DecodeConfig, rules: dict[str, Rule], smaller: Sequence[str]
) -> Iterator[Opened]:
    """The pair in this package's loop."""
    from deferral_train.decoding.pair import load_pair

    pair = load_pair(
        config.drafter,
        config.verifier,
        config.device,
        config.dtype,
        smaller=smaller,
        drafter_device=config.drafter_device,
        device_map=config.device_map,
    )
    yield pair, rules, asked


@contextmanager
def _open_engine(
    config: DecodeSettings, asked: DecodeConfig, rules: dict[str, Rule], smaller: Sequence[str]
) -> Iterator[Opened]:
    """The pair in vLLM, and beside the rules what vLLM does by itself."""
    from deferral_train.serving.engine_pair import EnginePair, baselines, check_decode
    from deferral_train.serving.running import EngineSettings

    check_decode(asked)
    rules = {**rules, **baselines(config.baselines)}
    asked = replace(asked, settings=replace(asked.settings, blocks="served"))
    opened = EngineSettings(
        config.verifier,
        config.drafter,
        num_draft_tokens=config.num_draft_tokens,
        device=config.device,
        dtype=config.dtype,
        seed=config.seed,
        kv_gib=config.kv_gib,
    )
    with EnginePair(opened, list(rules.values()), asked.settings) as pair:
        yield pair, rules, asked


@contextmanager
def _open_server(
    config: DecodeSettings, asked: DecodeConfig, rules: dict[str, Rule], smaller: Sequence[str]
) -> Iterator[Opened]:
    """A server that has the pair."""
    from deferral_train.serving.client import ServerClient
    from deferral_train.serving.engine_pair import check_decode
    from deferral_train.serving.server_pair import ServerPair

    check_decode(asked, "--server")
    asked = replace(asked, settings=replace(asked.settings, blocks="served"))
    yield ServerPair(ServerClient(config.server or ""), config.verifier), rules, asked


def _scoring_models(config: DecodeSettings, pair: Any) -> Any:
    """Models for the metric that needs them: those that decoded, or loaded now that the engine has ended."""
    from deferral_train.decoding.pair import Pair
    from deferral_train.evaluation.outputs import LIKELIHOOD
    from deferral_train.pairs.load import load_models

    if isinstance(pair, Pair):
        return pair.models
    if LIKELIHOOD not in config.metrics:
        return None
    return load_models(config.drafter, config.verifier, config.device, config.dtype)


def stop_from_spec(spec: str | None) -> StopDrafting | None:
    """A stop rule from text, for example ``confidence:threshold=0.4``; None stays None."""
    if spec is None:
        return None
    from deferral_train.decoding import stopping
    from deferral_train.heads.base import DeferralHead
    from deferral_train.heads.rules import parse_spec

    name, parameters = parse_spec(spec)
    classes: dict[str, Any] = {
        "confidence": stopping.ConfidenceStop,
        "cumulative": stopping.CumulativeStop,
        "entropy": stopping.EntropyStop,
        "head": stopping.HeadStop,
        "acceptance": stopping.AcceptanceStop,
        "speed": stopping.ExpectedSpeedStop,
    }
    if name not in classes:
        raise InputError(f"stop {spec!r} is unknown; known: {', '.join(STOPS)}")
    known = {field.name: field for field in fields(classes[name]) if field.init}
    unknown = [key for key in parameters if key not in known]
    absent = [
        key
        for key, field in known.items()
        if field.default is MISSING and field.default_factory is MISSING and key not in parameters
    ]
    if unknown or absent:
        problem = f"unknown parameter {unknown[0]!r}" if unknown else f"no {absent[0]}"
        raise InputError(f"stop {spec!r}: {problem}; {name} takes {', '.join(known)}")
    for key, value in parameters.items():
        if key != "head" and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise InputError(f"stop {spec!r}: {key} is {value}; give a number")
    if "head" in parameters:
        parameters["head"] = DeferralHead.from_pretrained(str(parameters["head"]))
    stop: StopDrafting = classes[name](**parameters)
    return stop


def table(summary: dict[str, Any], metrics: Sequence[str] = ()) -> list[str]:
    """The summary as a few aligned lines, asked-for metrics last."""
    from deferral_train.redaction import redacted_text
    from deferral_train.rules.registry import short_label

    heads = [("BLEU", 6), ("tok/s", 8), ("ms/tok", 7), ("accept", 7), ("defer", 6), ("reject", 6), ("len", 6)]
    heads += [(metric[:14], 14) for metric in metrics]
    lines = [f"{'rule':<32} " + " ".join(f"{name:>{width}}" for name, width in heads)]
    for label, rule in summary["rules"].items():
        cells = (
            _cell(rule["quality"].get("bleu"), 6, 2),
            _cell(rule["tokens_per_second"], 8, 1),
            _cell(rule["ms_per_token"], 7, 2),
            _cell(rule["mean_acceptance_length"], 7, 2),
            _cell(rule["deferral_rate"], 6, 3),
            _cell(rule["rejection_rate"], 6, 3),
            _cell(rule["mean_output_tokens"], 6, 1),
            *(_cell(rule["quality"].get(redacted_text(metric)), 14, 4) for metric in metrics),
        )
        lines.append(f"{short_label(label, 32):<32} " + " ".join(cells))
    lines += [
        f"{short_label(label, 32):<32} not run: {reason}"
        for label, reason in summary.get("not_run", {}).items()
    ]
    return [*lines, *engines_line(summary)]


def engines_line(summary: dict[str, Any]) -> list[str]:
    """The engines that decoded, with their model runners, as one line; nothing where this package's loop did."""
    ran = [rule["ran"] for rule in summary["rules"].values() if "ran" in rule]
    names = dict.fromkeys(
        f"{one['engine']} ({one['runner']} runner, {one['device']}, {one['dtype']})" for one in ran
    )
    return [f"decoded by {', '.join(names)}"] if names else []


def _cell(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.{digits}f}"
