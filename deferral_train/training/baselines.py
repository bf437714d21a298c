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

PLUG_INS = ("chow", "chow_log", "diff", "diff_log", "opt", "opt_log", "opt_verifier")
DRAFT_PLUG_INS = ("chow", "chow_log")
# Sweeps of the log rules' dials run to 20 nats for any vocabulary; decisions change below a few.
LOG_RANGES = {"chow_log": (0.0, 6.0), "diff_log": (-4.0, 4.0), "opt_log": (-4.0, 4.0)}
DIALS = 41
ROWS = 400_000  # rows at most that the choice reads; each risk is then known to about 0.001


def opt_rules(alphas: Sequence[float]) -> list[PositionRule]:
    """OPT (equation 10) at every alpha."""
    return [Opt(alpha=alpha) for alpha in alphas]


def candidates(names: Sequence[str] = PLUG_INS) -> list[PositionRule]:
    """Every plug-in rule at every dial value of its sweep, and the two that never and always defer."""
    found: list[PositionRule] = []
    for name in names:
        rule = RULES[name]()
        assert isinstance(rule, PositionRule)
        assert rule.dial is not None
        low, high = LOG_RANGES.get(name, (rule.dial.low, rule.dial.high))
        found += [rule.with_dial(low + (high - low) * i / (DIALS - 1)) for i in range(DIALS)]
    return found


def best_plug_in(
    traces: Traces,
    z: Tensor,
    alphas: Sequence[float],
    temperature: float | None = None,
    names: Sequence[str] = PLUG_INS,
    rows: Tensor | None = None,
) -> list[PositionRule]:
    """For every alpha the plug-in rule and dial of least estimated L_spec on these traces.

    ``z [N]`` labels the gap, of all rows or of those in ``rows``. L_spec(r) = const + E[r (alpha tv - z)], so two
    sums per candidate serve every alpha.
    """
    rules = candidates(names)
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
