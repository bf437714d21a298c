"""`deferral-train choose`: pick the operating point that meets a constraint, with a certificate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deferral_train.errors import InputError

if TYPE_CHECKING:
    from deferral_train.evaluation.choose import Choice
    from deferral_train.evaluation.evidence import Evidence


@dataclass(frozen=True)
class ChooseConfig:
    """Choose a setting from calibration prompts and store it in the exported head.

    From `decode` outputs: a limit on the mean loss per prompt against lossless, certified by
    Learn-then-Test, or a limit on verifier calls. From traces alone only a limit on the local token risk, or with
    ``stop`` where to stop drafting, which changes no lossless text: the threshold of most expected tokens per second.

    Attributes:
        outputs: folder of a `decode` run on calibration prompts: lossless, and a rule at several settings.
        traces: trace folders of calibration prompts, for max_token_risk.
        metric: exact_match, chrf, squad_f1, gsm8k, rouge1, rouge2, rougeL, "sql:DATABASE" (execution
            accuracy), python_tests (pass@1 of programs), or "command:PROGRAM" (pass@1).
        max_loss: most mean loss per prompt, absolute, against lossless; 0.01 is one point in a hundred.
        max_verifier_calls: most verifier calls per token as a share of lossless's; 0.8 is a fifth fewer.
        max_token_risk: most rise of the local token risk over lossless; from traces.
        confidence: of the claim.
        rule: choose among this rule's settings (learned, opt, or a label of outputs without its dial); from traces
            its name or spec, default the head.
        head: exported head folder that gets alpha and certificate.
        truth: of the local token risk: reference or verifier.
        temperature: of the local token risk: 0, 1, or the one that the traces were made for (default).
        out: folder for choice.json.
        seed: of the bootstrap for verifier calls.
        stop: cumulative; its threshold is fitted on traces, best with the verifier's prefixes.
        drafter_seconds: measured seconds of one drafter step, for stop.
        verifier_seconds: measured seconds of one verifying pass, for stop.
        num_draft_tokens: most tokens of a draft, for stop.
    """

    outputs: str | None = None
    traces: list[str] | None = None
    metric: str | None = None
    max_loss: float | None = None
    max_verifier_calls: float | None = None
    max_token_risk: float | None = None
    confidence: float = 0.95
    rule: str | None = None
    head: str | None = None
    truth: str = "reference"
    temperature: float | None = None
    out: str | None = None
    seed: int = 0
    stop: str | None = None
    drafter_seconds: float | None = None
    verifier_seconds: float | None = None
    num_draft_tokens: int = 10


# The command line takes every field of the config as a flag and a YAML key.
SETTINGS = ChooseConfig


def run(config: ChooseConfig, *, allow_code_execution: bool = False) -> int:
    """Choose from the evidence, store the choice in the head, and print it; or fit where drafting stops.

    Args:
        config: see the fields above.
        allow_code_execution: let the metric python_tests run programs that the models wrote, in isolated processes.
    """
    from deferral_train.evaluation.code import code_execution

    with code_execution(allow_code_execution):
        return _choose(config)


def _choose(config: ChooseConfig) -> int:
    from deferral_train import provenance
    from deferral_train.evaluation.quality import check_metric

    if config.stop is not None:
        return _fit_stop(config)
    if config.metric is not None:
        check_metric(config.metric)
    if (config.outputs is None) == (config.traces is None):
        raise InputError("give either outputs (a decode folder) or traces, the evidence to choose from")
    evidence: Evidence | None = None
    if config.outputs is not None:
        choice, evidence = _from_outputs(config, config.outputs)
        conditions = evidence.conditions
    else:
        choice, conditions = _from_traces(config, config.traces or [])
    certificate = choice.certificate() | {
        name: value for name, value in conditions.items() if value is not None
    }
    if config.head is not None:
        with provenance.one_writer(config.head, "choose or export"):
            _store(config.head, choice, certificate, evidence, config.metric)
    if config.out is not None:
        content = certificate | {"label": choice.setting.label}
        with provenance.one_writer(config.out, "choose"):
            provenance.write_json(Path(config.out) / "choice.json", content)
    print(describe(choice))
    return 0


def _from_outputs(config: ChooseConfig, outputs: str) -> tuple[Choice, Evidence]:
    """By the loss of finished texts, or by verifier calls."""
    from deferral_train.evaluation.choose import choose_from_outputs
    from deferral_train.evaluation.evidence import read_evidence

    if config.max_token_risk is not None:
        raise InputError("max_token_risk is chosen from traces; from outputs give metric and max_loss")
    evidence = read_evidence(outputs)
    choice = choose_from_outputs(
        evidence.rows,
        dials=evidence.dials,
        metric=config.metric,
        max_loss=config.max_loss,
        max_verifier_calls=config.max_verifier_calls,
        confidence=config.confidence,
        rule=config.rule,
        seed=config.seed,
    )
    if evidence.record is None:
        print(
            f"note: {outputs} holds no run.json: nothing says which models and weights these outputs are of"
        )
    return choice, evidence


def _from_traces(config: ChooseConfig, traces: Sequence[str]) -> tuple[Choice, dict[str, Any]]:
    """By the local token risk; returns the choice and the conditions that it was made under."""
    from deferral_train.evaluation.choose import choose_from_traces
    from deferral_train.traces import open_traces

    spec = config.rule or (f"learned:head={config.head}" if config.head else None)
    if config.max_token_risk is None or spec is None:
        raise InputError(
            "from traces give max_token_risk and a rule or a head; loss per prompt needs outputs"
        )
    if config.head is not None:
        _check_same_head(spec, config.head)
    opened = [open_traces(folder) for folder in traces]
    choice = choose_from_traces(
        opened,
        spec,
        config.max_token_risk,
        confidence=config.confidence,
        truth=config.truth,
        temperature=config.temperature,
    )
    manifest = opened[0].manifest
    return choice, {
        "engine": "traces",
        "temperature": manifest.temperature if config.temperature is None else config.temperature,
        "dtype": manifest.pair.get("dtype"),
        "pair": {role: manifest.pair[role] for role in ("drafter", "verifier") if role in manifest.pair},
    }


# Fields that choose an operating point and say nothing about where drafting stops.
NOT_OF_STOP = ("outputs", "metric", "max_loss", "max_verifier_calls", "max_token_risk", "rule", "head")


def _fit_stop(config: ChooseConfig) -> int:
    """Fit, print the spec to paste, and its expected speed beside the best constant draft length's."""
    from deferral_train import provenance
    from deferral_train.decoding.drafting.stop_fit import fit_cumulative
    from deferral_train.evaluation.positions import check_same
    from deferral_train.traces import open_traces

    given = [name for name in NOT_OF_STOP if getattr(config, name) is not None]
    if given:
        raise InputError(f"stop is fitted by speed on traces and reads no {given[0]}; leave {given[0]} out")
    drafter_seconds, verifier_seconds = config.drafter_seconds, config.verifier_seconds
    if config.stop != "cumulative":
        raise InputError(f"stop={config.stop!r} is not fitted on traces; use cumulative")
    if not config.traces:
        raise InputError(
            "stop is fitted on traces; give traces of this pair, collected with prefixes verifier"
        )
    if drafter_seconds is None or verifier_seconds is None or min(drafter_seconds, verifier_seconds) <= 0:
        raise InputError(
            f"drafter_seconds={drafter_seconds}, verifier_seconds={verifier_seconds}: give both, above 0: one pass of "
            "each model; train-pair writes them to pair.json"
        )
    num_draft_tokens, temperature = config.num_draft_tokens, config.temperature
    opened = [open_traces(folder) for folder in config.traces]
    check_same(opened)
    fit = fit_cumulative(opened, drafter_seconds / verifier_seconds, num_draft_tokens, temperature)
    spec = f"cumulative:threshold={fit.threshold:.6g}"
    manifest = opened[0].manifest
    record = {
        "stop": spec,
        "num_draft_tokens": num_draft_tokens,
        "expected_tokens_per_second": fit.speed / verifier_seconds,
        "mean_drafted": fit.drafted,
        "best_constant": {
            "length": fit.best_length,
            "tokens_per_second": fit.best_constant / verifier_seconds,
        },
        "drafter_seconds": drafter_seconds,
        "verifier_seconds": verifier_seconds,
        "temperature": manifest.temperature if temperature is None else temperature,
        "prefixes": manifest.prefixes,
        "prompts": sum(len(part.prompt_ids) for part in opened),
        "positions": sum(map(len, opened)),
    }
    if config.out is not None:
        with provenance.one_writer(config.out, "choose"):
            provenance.write_json(Path(config.out) / "stop.json", record)
    print(
        f"{spec}: expected {fit.speed / verifier_seconds:.4g} tokens per second, {fit.drafted:.2f} of at most "
        f"{num_draft_tokens} tokens drafted a block\n"
        f"best constant length {fit.best_length}: {fit.best_constant / verifier_seconds:.4g} tokens per second "
        f"({fit.speed / fit.best_constant - 1:+.1%} with the stop); both on these {record['prompts']} prompts, "
        f"prefixes {manifest.prefixes}, passes of the models alone"
    )
    if fit.speed > fit.best_constant:
        print(f"decode with --num-draft-tokens {num_draft_tokens} --stop {spec}")
    else:
        print(f"stopping gains nothing here: decode with --num-draft-tokens {fit.best_length} and no --stop")
    return 0


def _check_same_head(spec: str, head: str) -> None:
    """Refuse a rule whose head has other weights than the one that would get its certificate."""
    from deferral_train.heads import DeferralHead
    from deferral_train.heads.fingerprint import weights_key
    from deferral_train.heads.rules import parse_spec

    named = parse_spec(spec)[1].get("head")
    stored = None if named is None else weights_key(DeferralHead.from_pretrained(str(named)))
    if stored is not None and stored != weights_key(DeferralHead.from_pretrained(head)):
        raise InputError(
            f"rule={spec} has another head than head={head}; name one and the same, or leave head out"
        )


def _store(
    head: str,
    choice: Choice,
    certificate: Mapping[str, Any],
    evidence: Evidence | None,
    metric: str | None,
) -> None:
    from deferral_train.evaluation.expectation import expectation
    from deferral_train.heads import DeferralHead, set_operating_point

    if choice.setting.rule not in ("learned", "learned_token", "judge"):
        raise InputError(
            f"the chosen setting is {choice.setting.label}, no setting of the head {head}; "
            "nothing was stored: leave head out, or choose with rule=learned or judge"
        )
    if evidence is not None:
        evidence.check_head(DeferralHead.from_pretrained(head), choice.setting.label, head)
    expected = None if evidence is None else expectation(evidence, choice.setting.label, metric)
    set_operating_point(head, choice.setting.value, certificate, expected)


def describe(choice: Choice) -> str:
    """The choice in two lines."""
    claims = {
        "certificate": f"certified: mean {choice.metric} loss per prompt at most {choice.limit:g}",
        "local token risk": f"certified for local tokens only: rise of token risk at most {choice.limit:g}",
        "bootstrap": f"verifier calls per token at most {choice.limit:g} of lossless's (bootstrap)",
    }
    smallest = "" if choice.smallest is None else f"; they can certify no less than {choice.smallest:.3g}"
    calls = "" if choice.calls is None else f"{choice.calls:.3f} of lossless's verifier calls"
    loss = "" if choice.kind == "bootstrap" else f"mean loss {choice.mean:+.4g}"
    return (
        f"{choice.setting.label}: observed {', '.join(filter(None, (loss, calls)))}\n"
        f"{claims[choice.kind]}, confidence {choice.confidence:g}, {choice.prompts} prompts{smallest}"
    )
