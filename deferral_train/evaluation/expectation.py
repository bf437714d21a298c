"""The numbers that a server or planner may expect of a head, from the decoded runs that its setting was chosen on.

They go into the head's config.json under ``evaluation.expected``: acceptance by place at the stored setting, quality
and verifier calls over its dial, and the conditions under which all of it was measured.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from deferral_train.evaluation.acceptance import acceptance_by_place
from deferral_train.evaluation.evidence import Evidence
from deferral_train.evaluation.quality import gold, per_prompt
from deferral_train.evaluation.settings import Setting, in_order, setting_of

LOSSLESS = "lossless"


def expectation(evidence: Evidence, chosen: str, metric: str | None) -> dict[str, Any] | None:
    """Measured numbers of the chosen setting and of the others of its dial; None where the folder has no summary.

    Args:
        evidence: decode folder that holds ``lossless`` and settings of one head.
        chosen: label of the setting that the head stores.
        metric: of quality, in [0, 1]; None leaves quality and loss out.

    Returns:
        ``setting`` {parameter, value}, ``mean_acceptance_length``, ``acceptance_by_place`` {conditional, marginal},
        ``metric``, ``prompts``, ``curve`` (a point per setting, the safest first, ``lossless`` before all with no
        value: value, verifier_calls_per_token, mean_acceptance_length, quality, loss against lossless) and
        ``conditions``.
    """
    if evidence.summary is None:
        return None
    setting = setting_of(chosen, evidence.dials)
    assert setting is not None
    rules = evidence.summary["rules"]
    family = _family(evidence, setting)
    scores = {label: _scores(evidence, label, metric) for label in (LOSSLESS, *(one.label for one in family))}
    curve = [
        {
            "value": value,
            "verifier_calls_per_token": rules[label]["verifier_calls_per_token"],
            "mean_acceptance_length": rules[label]["mean_acceptance_length"],
            **_quality(scores[label], scores[LOSSLESS]),
        }
        for label, value in ((LOSSLESS, None), *((one.label, one.value) for one in family))
    ]
    return {
        "setting": {"parameter": setting.parameter, "value": setting.value},
        "mean_acceptance_length": rules[chosen]["mean_acceptance_length"],
        "acceptance_by_place": acceptance_by_place(rules[chosen]["positions"]),
        "metric": metric,
        "prompts": rules[chosen]["prompts"],
        "curve": curve,
        "conditions": {name: value for name, value in evidence.conditions.items() if value is not None},
    }


def _family(evidence: Evidence, chosen: Setting) -> list[Setting]:
    assert evidence.summary is not None
    found = (setting_of(label, evidence.dials) for label in evidence.summary["rules"])
    return in_order([one for one in found if one is not None and one.family == chosen.family])


def _scores(evidence: Evidence, label: str, metric: str | None) -> np.ndarray | None:
    if metric is None:
        return None
    rows = [row for row in evidence.rows if row["rule"] == label and row["repetition"] == 0]
    rows.sort(key=lambda row: str(row["id"]))
    return per_prompt(metric, [row["text"] for row in rows], [gold(metric, row) for row in rows])


def _quality(own: np.ndarray | None, lossless: np.ndarray | None) -> dict[str, float]:
    if own is None or lossless is None:
        return {}
    return {"quality": float(own.mean()), "loss": float((lossless - own).mean())}
