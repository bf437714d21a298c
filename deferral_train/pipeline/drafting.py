"""The stage that proposes how to draft: K, the number of draft tokens and who drafts, with the speed expected of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deferral_train import provenance
from deferral_train.decoding import Pair
from deferral_train.decoding.outputs import OUTPUTS, read_lines
from deferral_train.decoding.settings import VLLM
from deferral_train.evaluation.bootstrap import Redraws
from deferral_train.evaluation.drafting import propose_for
from deferral_train.heads.rules import rule_from_spec
from deferral_train.pipeline.context import RunContext
from deferral_train.pipeline.online import ON_POLICY
from deferral_train.pipeline.pair import open_pair
from deferral_train.pipeline.text import read_part
from deferral_train.traces import open_traces

FILE = "drafting.json"
PROMPTS = 60  # replayed: half of them choose, half judge


def propose_drafting(run: RunContext, results: Mapping[str, Any]) -> dict[str, Any] | None:
    """Replay the chosen rule's own texts under every plan, priced with this machine's timings.

    Returns:
        see :func:`deferral_train.evaluation.drafting.propose_for`, with ``rule`` and ``text``, a sentence;
        None with fewer than two prompts, and where vLLM decodes: the plans are those of the loop.
    """
    if run.config.engine == VLLM:
        provenance.write_json(run.folder / FILE, None)
        return None
    chosen, section = run.chosen(results), run.config.decode
    rule = rule_from_spec(chosen["spec"], typed=run.config.rules)
    pair = Pair(open_pair(run.config.pair, results["pair"]))
    prompts = read_part(run.folder, "test", min(section.limit, PROMPTS))
    found = None
    if len(prompts) > 1:
        found = propose_for(
            pair,
            prompts,
            rule,
            open_traces(run.folder / ON_POLICY),
            num_draft_tokens=section.num_draft_tokens,
            temperature=section.temperature,
            counted={
                row["id"]: row["counts"]["drafter_calls"]
                for row in read_lines(run.folder / "decode" / OUTPUTS)
                if row["rule"] == chosen["label"] and row["repetition"] == 0
            },
            redraws=Redraws(run.config.bootstrap, run.config.seed),
        )
        found["rule"] = chosen["name"]
        found["text"] = sentence(found)
    provenance.write_json(run.folder / FILE, found)
    return found


def sentence(found: Mapping[str, Any]) -> str:
    """The proposal in words."""
    used = found["used"]
    against = f"{used['speed']['value']:.2f}x with the {used['num_draft_tokens']} draft tokens decoded here"
    judges = f"{found['prompts']['judged_on']} prompts that did not choose it"
    return (
        f"Drafting for {found['rule']}: {found['flags']} is predicted fastest, {_speed(found['speed'])} the verifier's "
        f"speed against {against}; {_worth(found)} (batch 1, this machine, {judges})"
    )


def _worth(found: Mapping[str, Any]) -> str:
    if found["beats_verifier"]:
        return "that beats the verifier alone"
    if found["speed"]["value"] <= 1:
        return "no way to draft is predicted to beat the verifier alone"
    return "whether that beats the verifier alone needs more prompts"


def _speed(interval: Mapping[str, Any]) -> str:
    limits = "" if interval["low"] is None else f" [{interval['low']:.2f}, {interval['high']:.2f}]"
    return f"{interval['value']:.2f}x{limits}"
