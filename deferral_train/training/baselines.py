"""Plug-in rules as baselines of a training run: OPT at each alpha, and the best rule chosen on another
split.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deferral_train.rules import RULES
from deferral_train.rules.base import PositionRule
from deferral_train.rules.position import Opt
from deferral_train.traces import Traces

DIALS = 41
ROWS = 400_000  # rows at most that the choice reads; each risk is then known to about 0.001


def plug_ins(stage: str) -> list[str]:
    """Names of the plug-in rules that a head of this stage is compared with."""
    return [
        name for name, rule in RULES.items() if rule.plug_in and (stage == "verify" or rule.stage == stage)
    ]


def opt_rules(alphas: Sequence[float]) -> list[PositionRule]:
    """OPT (equation 10) at every alpha."""
    return [Opt(alpha=alpha) for alpha in alphas]


def candidates(names: Sequence[str]) -> list[PositionRule]:
    """Every plug-in rule at every dial value of its sweep, and the two that never and always defer."""
    found: list[PositionRule] = []
    for name in names:
        rule = RULES[name]()
        assert isinstance(rule, PositionRule)
        assert rule.dial is not None
        found += [rule.with_dial(value) for value in rule.dial.swept(DIALS)]
    return found


def best_plug_in(
    traces: Traces,
    z: Tensor,
    alphas: Sequence[float],
    temperature: float | None = None,
    names: Sequence[str] | None = None,
    rows: Tensor | None = None,
) -> list[PositionRule]:
    """For every alpha the plug-in rule and dial of least estimated L_spec on these traces.

    ``z [N]`` labels the gap, of all rows or of those in ``rows``. L_spec(r) = const + E[r (alpha tv - z)], so two
    sums per candidate serve every alpha.
    """
    rules = candidates(plug_ins("verify") if names is None else names)
    fields = sorted(frozenset({"tv"}).union(*(rule.needs for rule in rules)))
    summary = traces.summary(fields, temperature)
    if rows is not None:
        summary = summary.select(rows)
    stride = max(1, -(-len(z) // ROWS))
    summary, z = summary.select(torch.arange(0, len(z), stride)), z[::stride].double()
    tv = summary["tv"].double()
    decided = [rule.defer(summary) for rule in rules]
    sums = torch.stack([torch.stack([(d * tv).sum(), (d * z).sum()]) for d in decided])
    grid = torch.tensor(list(alphas), dtype=torch.float64)
    risk = grid.unsqueeze(1) * sums[:, 0] - sums[:, 1]  # [A, candidates]
    return [rules[int(best)] for best in risk.argmin(dim=1)]


def describe(rules: Sequence[PositionRule]) -> list[str]:
    """``name(dial=value)`` of each rule."""
    return [f"{r.name}({r.dial.parameter}={r.dial_value:g})" if r.dial else r.name for r in rules]
