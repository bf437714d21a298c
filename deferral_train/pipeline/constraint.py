"""A constraint on the operating point: settings decoded on the calibration part, and the one that is certified."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deferral_train.decoding.settings import DecodeConfig
from deferral_train.errors import InputError
from deferral_train.evaluation.choose import NoSettingError, check_reachable, choose_from_outputs
from deferral_train.evaluation.evidence import read_evidence
from deferral_train.evaluation.outputs import score_outputs
from deferral_train.heads.rules import rule_from_spec
from deferral_train.pairs.prompts import Prompt
from deferral_train.pipeline import operating_point
from deferral_train.pipeline.config import DecodeSection, OperatingPointConfig
from deferral_train.pipeline.decoder import StageDecoder
from deferral_train.pipeline.frontier import ALWAYS
from deferral_train.rules.base import Rule
from deferral_train.traces import Traces

FOLDER = "calibration"
BATCH = 64  # prompts side by side, at least: nothing is timed here


def check_constraint(config: OperatingPointConfig, prompts: list[Prompt], rules: int) -> None:
    """Refuse a constraint before anything is decoded for it: prompts without references, or too few of them."""
    assert config.max_loss is not None
    bare = next((prompt.id for prompt in prompts if prompt.reference is None), None)
    if bare is not None:
        raise InputError(
            f"point.max_loss: calibration prompt {bare} has no reference to score its text with; give "
            "text.calibration references, or leave max_loss out"
        )
    share = 1 - (1 - config.confidence) / rules
    check_reachable("point.max_loss", config.max_loss, len(prompts), share)


@dataclass(frozen=True)
class CertificateSearch:
    """Settings of the search for a certified setting.

    Attributes:
        point, section: of the run's config. metric: of quality, per prompt.
        folder: where outputs are written. seed: of the decoding.
    """

    point: OperatingPointConfig
    section: DecodeSection
    metric: str
    folder: Path
    seed: int


def certified_point(
    search: CertificateSearch,
    decoder: StageDecoder,
    prompts: list[Prompt],
    traces: Traces,
    rules: Mapping[str, tuple[str, Rule | str]],
) -> dict[str, Any]:
    """Decode every rule over its dial beside lossless; the setting of fewest verifier calls that is certified.

    Args:
        prompts: of the calibration part. traces: of another part, where dial values are spread.
        rules: name to (spec without a dial value, the rule to sweep).

    Returns:
        ``name`` of the rule, ``parameter``, ``value``, the ``label`` that it was decoded under and the
        ``certificate``; where no setting is certified ``name`` is None and ``reason`` names the nearest.

    Raises:
        InputError: as :func:`check_constraint`.
    """
    config, section = search.point, search.section
    check_constraint(config, prompts, len(rules))
    sweeps = {name: rule for name, (_, rule) in rules.items()}
    dials = operating_point.spread(
        traces, sweeps, config.shares, section.temperature, section.num_draft_tokens
    )
    settings = replace(section.settings(search.seed), batch_size=max(BATCH, section.batch_size))
    tried = {"lossless": rule_from_spec("lossless"), **operating_point.labelled(rules, dials)}
    decoder.decode(prompts, tried, DecodeConfig(settings), search.folder)
    evidence = read_evidence(search.folder)
    if search.metric not in ALWAYS:
        score_outputs(search.folder, (search.metric,), decoder.scoring((search.metric,)), prompts)
    try:
        choice = choose_from_outputs(
            evidence.rows,
            metric=search.metric,
            max_loss=config.max_loss,
            confidence=config.confidence,
            dials=evidence.dials,
            seed=search.seed,
        )
    except NoSettingError as error:  # what was computed so far is worth its report
        return {"name": None, "reason": str(error), "limit": config.max_loss}
    found = choice.setting
    return {
        "name": found.family,
        "parameter": found.parameter,
        "value": found.value,
        "label": found.label,
        "certificate": choice.certificate()
        | {name: value for name, value in evidence.conditions.items() if value is not None},
    }
