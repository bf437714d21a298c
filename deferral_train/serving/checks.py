"""Checks of the engine's settings at start, before any weight is loaded; each refusal is one line.

Reads the engine's config by attribute; imports vLLM only to ask for its version.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deferral_train.decoding.compatibility import roles_differ
from deferral_train.errors import InputError
from deferral_train.heads.artifact import certificate_problem
from deferral_train.heads.pairing import check_vocabulary
from deferral_train.rules import BlockRule, Rule
from deferral_train.rules.summary import FIELDS, PREVIOUS_TOKENS
from deferral_train.serving.blocks import needs_distribution
from deferral_train.serving.config import KEY, ServingConfig

TESTED = ((0, 32), (0, 33))  # from, up to and without: versions of vLLM that the test suite runs on
OVERLAID = (0, 33)  # whose Python ran the engine's tests, over the compiled parts of the version before
DRAFTERS = (
    "draft_model",
    "eagle",
    "eagle3",
    "mtp",
)  # speculative methods whose drafts have logits, on either runner
METHODS = (*DRAFTERS, "ngram")
# Methods that are refused by their own reason; any other was not run with this plug-in.
REFUSED = {
    "suffix": "its proposals are looked up, and have no logits",
    "custom_class": "what a class of one's own drafts from is not known here",
    "medusa": "its heads draft from one state, and the runner hands over no logits",
    "mlp_speculator": "the runner hands over no logits of its drafts",
    "xpress": "the runner hands over no logits of its drafts",
    "extract_hidden_states": "it drafts nothing",
    "dflash": "its drafts are made in parallel, and it was not run with this plug-in",
    "dspark": "its drafts are made in parallel, and it was not run with this plug-in",
}


def configured(vllm_config: Any) -> ServingConfig | None:
    """The plug-in's settings in an engine config; None where it is off."""
    extra = getattr(vllm_config, "additional_config", None)
    if not isinstance(extra, dict) or KEY not in extra:
        return None
    return ServingConfig.parse(extra[KEY])


def check_version(version: str) -> None:
    """Refuse an engine that was not tested.

    Raises:
        InputError: naming the version and the tested range.
    """
    low, high = (".".join(map(str, end)) for end in TESTED)
    try:
        numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    except ValueError:
        numbers = (0, 0)
    if not TESTED[0] <= numbers < TESTED[1] and numbers != OVERLAID:
        raise InputError(
            f"vLLM {version}: this release of deferral-train works with >={low},<{high}; "
            "install one of those, or leave additional_config['deferral'] out"
        )


def version_warning(version: str) -> str | None:
    """Line for the log at the start of a version whose release was not tested whole; None for others."""
    if not version.startswith("{}.{}.".format(*OVERLAID)):
        return None
    low = ".".join(map(str, TESTED[0]))
    return (
        f"deferral: vLLM {version} as it is distributed was not tested with this release of deferral-train: its Python "
        f"was, over the compiled parts of {low}"
    )


def forced_runner(said: str) -> str | None:
    """One line for the engine's own refusal of the runner that the environment asks for; None for other refusals."""
    found = re.search(r"Model Runner V([12]) (?:does not (?:yet )?support: [^\n\[]*|requires Triton)", said)
    if found is None:
        return None
    return (
        f"deferral: VLLM_USE_V2_MODEL_RUNNER={int(found[1]) - 1} asks for a runner that cannot serve this: "
        f"{found[0].strip()}; unset the variable, or leave out what is not supported"
    )


def check_engine(vllm_config: Any, config: ServingConfig) -> Rule:
    """Refuse an engine that cannot execute the configured rule; returns the rule.

    Raises:
        InputError: one line naming the setting and the remedy.
    """
    import vllm

    check_version(vllm.__version__)
    speculative = vllm_config.speculative_config
    if speculative is None:
        raise InputError(
            "deferral: the engine has no speculative_config; give it a drafter, e.g. "
            '{"model": DRAFTER, "method": "draft_model", "num_speculative_tokens": 5}'
        )
    if vllm_config.use_v2_model_runner:
        _check_v2(vllm_config)
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise InputError("deferral: pipeline parallelism is not supported; use tensor parallelism")
    _check_method(speculative)
    rule = config.make_rule()
    check_rule(rule, config, vllm_config)
    if config.max_request_loss is not None and rule.is_lossless:
        raise InputError("deferral.max_request_loss: the rule is lossless; leave it out")
    if config.log is not None:
        _check_log(config, speculative)
    return rule


def check_rule(rule: Rule, config: ServingConfig, vllm_config: Any) -> None:
    """Refuse a rule that this engine, whose settings are right, cannot execute.

    Raises:
        InputError: naming the rule and the remedy.
    """
    check_served(rule, vllm_config.speculative_config)
    if vllm_config.use_v2_model_runner:
        check_graphs(rule, config, vllm_config)
    else:
        check_scheduling(rule, vllm_config)


def _check_method(speculative: Any) -> None:
    if speculative.method not in METHODS:
        reason = REFUSED.get(speculative.method, "it was not run with this plug-in")
        raise InputError(
            f"deferral: speculative method {speculative.method!r} cannot be used with a rule: {reason}; use one of "
            f"{', '.join(METHODS)}"
        )
    if speculative.rejection_sample_method != "standard":
        raise InputError(
            f"deferral: rejection_sample_method is {speculative.rejection_sample_method!r}, "
            "and the plug-in replaces that step; leave it at 'standard'"
        )
    for name in ("use_heterogeneous_vocab", "use_local_argmax_reduction", "parallel_drafting"):
        if getattr(speculative, name, False):
            raise InputError(
                f"deferral: speculative_config.{name} gives no drafter distribution; leave it off"
            )


def _check_v2(vllm_config: Any) -> None:
    """Refuse what the V2 runner alone can do and no rule can be executed with, each by its own name."""
    off = {
        "parallel_config.enable_batch_sharded_sampling": "a rank would see only its own requests",
        "speculative_config.enable_adaptive_verification": "drafts are dropped before they are verified",
        "watermark_config": "the watermark decides tokens",
        "model_config.enable_trace_replay": "a recorded trace decides tokens",
    }
    for path, reason in off.items():
        value: Any = vllm_config
        for name in path.split("."):
            value = getattr(value, name, None)
        if value:
            raise InputError(f"deferral: {path} cannot be used with a rule: {reason}; leave it off")


def check_served(rule: Rule, speculative: Any) -> None:
    """Refuse a rule that cannot be executed in an engine with these ``speculative_config`` settings.

    Raises:
        InputError: naming the rule and the remedy.
    """
    if not rule.drafts:
        raise InputError(f"deferral: rule {rule.name} never drafts; leave out speculative_config instead")
    if "verifier_hidden_at_token" in rule.needs:
        raise InputError(
            f"deferral: rule {rule.name} reads verifier_hidden_at_token, which the engine does not hand over; "
            "use a head without it"
        )
    if rule.stage == "draft" and getattr(rule, "head", None) is not None:
        raise InputError(
            f"deferral: rule {rule.name} has a draft-stage head, which decides before the verifier has run; "
            "export a verify-stage head"
        )
    drafted = getattr(speculative, "num_speculative_tokens", None)
    if isinstance(rule, BlockRule) and not rule.is_lossless and drafted is not None and drafted <= rule.reach:
        raise InputError(
            f"deferral: rule {rule.name} waits for {rule.reach} drafted tokens behind one, and num_speculative_tokens "
            f"is {drafted}: nothing would ever be forgiven; give it a smaller window, or draft more"
        )
    unknown = sorted(rule.needs - set(FIELDS))
    if unknown:
        raise InputError(
            f"deferral: rule {rule.name} needs {', '.join(unknown)}, which the engine cannot give"
        )
    if rule.is_lossless or not needs_distribution(rule):
        return
    if speculative.method not in DRAFTERS:
        raise InputError(
            f"deferral: rule {rule.name} reads the drafter's distribution, and {speculative.method} proposals have "
            "none; use token_v3 or opt_verifier, or a draft model"
        )
    if speculative.draft_sample_method != "probabilistic":
        raise InputError(
            f"deferral: rule {rule.name} reads the drafter's distribution, and draft_sample_method is "
            f"{speculative.draft_sample_method!r}, whose proposals have none under sampling; "
            'set "draft_sample_method": "probabilistic" in speculative_config'
        )


def check_scheduling(rule: Rule, vllm_config: Any) -> None:
    """Refuse a rule that reads what the worker does not know in time.

    Raises:
        InputError: naming the rule and the flag.
    """
    scheduler = getattr(vllm_config, "scheduler_config", None)
    if rule.needs & set(PREVIOUS_TOKENS) and getattr(scheduler, "async_scheduling", False):
        raise InputError(
            f"deferral: rule {rule.name} reads previous tokens, which the worker does not know in time under "
            "asynchronous scheduling; start with --no-async-scheduling"
        )


def check_graphs(rule: Rule, config: ServingConfig, vllm_config: Any) -> None:
    """Refuse to read a drafter's hidden states where its steps are replayed from a CUDA graph, on the V2 runner.

    Raises:
        InputError: naming who reads them and the flag.
    """
    reader = f"rule {rule.name}" if "drafter_hidden" in rule.needs else None
    if config.log is not None and config.log.hidden:
        reader = "log.hidden"
    mode = vllm_config.compilation_config.cudagraph_mode
    replayed = vllm_config.speculative_config.method in DRAFTERS[1:] and mode.has_full_cudagraphs()
    if reader is not None and replayed:
        raise InputError(
            f"deferral: {reader} reads the drafter's hidden states, which this runner records in a CUDA graph for "
            f"method {vllm_config.speculative_config.method!r}; start with --enforce-eager, or do without them"
        )


def _check_log(config: ServingConfig, speculative: Any) -> None:
    from deferral_train.traces.folder import open_folder
    from deferral_train.traces.manifest import HEADER

    assert config.log is not None
    if speculative.method not in DRAFTERS or speculative.draft_sample_method != "probabilistic":
        raise InputError(
            f"deferral.log: traces need the drafter's distribution; use one of {', '.join(DRAFTERS)} with "
            '"draft_sample_method": "probabilistic"'
        )
    if open_folder(config.log.folder).size(HEADER) is not None and not config.log.resume:
        raise InputError(
            f"deferral.log.folder is {config.log.folder}, which holds traces already; name a new one, or say "
            '"resume": true'
        )


def describe_pair(vllm_config: Any) -> dict[str, Any]:
    """Fingerprints of the served pair, as heads and traces record them."""
    from transformers import AutoTokenizer

    from deferral_train.pairs.fingerprint import checkpoint_fingerprint, tokenizer_fingerprint

    model, drafter = vllm_config.model_config, vllm_config.speculative_config.draft_model_config
    tokenizer = AutoTokenizer.from_pretrained(model.tokenizer)
    pair: dict[str, Any] = {}
    for role, config in (("drafter", drafter), ("verifier", model)):
        if config is not None and Path(config.model).is_dir():
            pair[role] = checkpoint_fingerprint(config.model)
    size = min(len(tokenizer), model.get_vocab_size())
    return {
        **pair,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "vocab_size": size,
        "is_encoder_decoder": False,
        "dtype": _dtypes(vllm_config),
    }


def check_heads(rule: Rule, vllm_config: Any) -> list[str]:
    """Reasons why the rule's head does not fit the served pair; empty where it does, or where nothing was recorded.

    A head of other weights than its certificate's, or a certificate of another pair, counts: every request is then
    served lossless. What a head records of engine and number formats does not, see :func:`check_conditions`.

    Raises:
        InputError: a head for another vocabulary.
    """
    found: list[str] = []
    for head, certificate, recorded in _recorded(rule):
        problem = certificate_problem(head)
        if problem is not None:
            found.append(problem)
        if not recorded and not certificate.get("pair"):
            continue
        pair = describe_pair(vllm_config)
        check_vocabulary(head, pair)
        found += roles_differ(recorded, pair)
        certified = certificate.get("pair")
        if isinstance(certified, Mapping):
            found += [f"certified {text}" for text in roles_differ(certified, pair)]
    return list(dict.fromkeys(found))


def check_conditions(rule: Rule, vllm_config: Any, engine: str) -> list[str]:
    """Differences from the conditions of a certificate, or a head, as ``certified on X, running Y``.

    Requests are served with the rule, since nothing says that it is wrong; the claim of the certificate is not made.

    Args:
        engine: name and version of the one that runs.
    """
    found: list[str] = []
    for _, certificate, recorded in _recorded(rule):
        here = {
            "engine": engine,
            "dtype": _dtypes(vllm_config),
            "quantization": vllm_config.model_config.quantization,
        }
        if certificate:
            for name, value in here.items():
                if name == "quantization" and certificate.get(name) is None and value is None:
                    continue
                if not _same(certificate.get(name), value):
                    found.append(
                        f"certified on {name} {_text(certificate.get(name))}, running {_text(value)}"
                    )
            parameter, value = certificate.get("parameter"), certificate.get("value")
            if rule.dial is not None and parameter == rule.dial.parameter and value != rule.dial_value:
                found.append(f"certified on {parameter} {_text(value)}, running {rule.dial_value:g}")
        else:
            found += [
                f"fitted on {name} {_text(recorded[name])}, running {_text(here[name])}"
                for name in ("dtype", "quantization")
                if name in recorded and not _same(recorded[name], here[name])
            ]
    return found


def _recorded(rule: Rule) -> Iterator[tuple[Any, Mapping[str, Any], Mapping[str, Any]]]:
    """Each head of a rule, with its certificate and the pair that it was fitted for; empty where it has none."""
    from deferral_train.decoding.compatibility import heads_of

    for head in heads_of(rule):
        metadata = getattr(head, "metadata", None) or {}
        certificate, pair = metadata.get("certificate"), metadata.get("pair")
        yield (
            head,
            certificate if isinstance(certificate, Mapping) else {},
            pair if isinstance(pair, Mapping) else {},
        )


def _dtypes(vllm_config: Any) -> dict[str, str]:
    """Number format by role, as heads and certificates record it."""
    speculative = vllm_config.speculative_config
    models = {
        "drafter": getattr(speculative, "draft_model_config", None),
        "verifier": vllm_config.model_config,
    }
    return {
        role: str(config.dtype).removeprefix("torch.")
        for role, config in models.items()
        if config is not None
    }


def _same(recorded: Any, here: Any) -> bool:
    """True where both state the same; of formats by role the roles that both have decide."""
    if isinstance(recorded, Mapping) and isinstance(here, Mapping):
        shared = recorded.keys() & here.keys()
        return bool(shared) and all(recorded[role] == here[role] for role in shared)
    if isinstance(recorded, str) and isinstance(here, Mapping):
        return all(value == recorded for value in here.values())
    return bool(recorded == here)


def _text(value: Any) -> str:
    if value is None:
        return "nothing recorded"
    if isinstance(value, Mapping):
        different = sorted(set(map(str, value.values())))
        return different[0] if len(different) == 1 else ", ".join(f"{k} {v}" for k, v in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)
