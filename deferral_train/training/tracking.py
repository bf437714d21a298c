"""Validation of a head during training: one object that owns the metrics on held-out rows and names the scalars.

Headline ``regret``: where the traces know the exact truth, the head's exact regret averaged over the alpha
grid, 0 at best. On real text absolute regret is not identifiable from one gold token per prefix; there it
is the estimated L_spec of the head minus that of OPT (equation 10) at the same alphas, averaged over the
grid: its expectation is regret minus OPT's regret, so it orders heads as regret does, and it is negative
where the head beats OPT. A judge head knows no price: its headline is the log loss of its labels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from deferral_train.heads.base import DeferralHead
from deferral_train.heads.judge import JudgeHead
from deferral_train.heads.objectives import judge_losses
from deferral_train.training import metrics as m

BASELINES = ("opt", "plug_in")
OF_RULES = ("rejection_rate", "relative_risk", "exact_regret")  # metrics that exist for each baseline, too


def predict(head: DeferralHead, batch: Mapping[str, Tensor], alphas: Tensor) -> dict[str, Tensor]:
    """Predictions for a batch of a score table: ``defer [N, A]``, ``finite [N]`` (every number that the head gave for
    the row is), and where the head has them ``gap tv reject [N]``.
    """
    x = batch["x"]
    if head.takes_alpha:
        scores = [head(x, torch.full_like(x[:, 0], float(alpha)))["score"] for alpha in alphas]
        score = torch.stack(scores, dim=-1)
        return {"defer": score > 0, "finite": torch.isfinite(score).all(dim=-1)}
    out = {name: value.float() for name, value in head(x).items()}
    each = [torch.isfinite(value).reshape(len(x), -1).all(dim=1) for value in out.values()]
    finite = torch.stack(each).all(dim=0)
    if isinstance(head, JudgeHead):
        out["judge_loss"], out["judge_weight"] = judge_losses(head, batch)
    tv = out["tv"] if head.stage == "draft" else batch["tv"]
    return {**out, "defer": m.defer_at(out["gap"], tv, alphas), "finite": finite}


def _of_rules(name: str) -> bool:
    """True for a scalar that says nothing about the head: of a fixed rule alone, or how often the head failed."""
    metric = name.rpartition("/")[2].partition("@")[0]
    return metric == "not_finite" or metric in {f"{kind}_{rule}" for kind in OF_RULES for rule in BASELINES}


class Tracker(nn.Module):
    """Metrics of one split. Sums only: feed it batches on any number of processes.

    Args:
        head: its type and stage decide which metrics exist.
        alphas: grid.
        exact: whether rows carry the exact gap.
        label_range: where gap labels lie, for calibration bins.
    """

    def __init__(
        self, head: DeferralHead, alphas: Sequence[float], exact: bool, label_range: tuple[float, float]
    ) -> None:
        super().__init__()
        self.exact, self.stage = exact, head.stage
        found: dict[str, Metric] = {
            "hindsight_excess": m.HindsightExcess(alphas),
            "rejection_rate": m.RejectionRate(alphas),
            "relative_risk": m.RelativeRisk(alphas),
        }
        for name in BASELINES:
            found[f"excess_over_{name}"] = m.ExcessRisk(alphas)
            found[f"rejection_rate_{name}"] = m.RejectionRate(alphas)
            found[f"relative_risk_{name}"] = m.RelativeRisk(alphas)
        found["not_finite"] = m.Count()
        found["disagreement_with_opt"] = m.Disagreement(alphas)
        if exact:
            found |= {f"exact_regret{suffix}": m.Regret(alphas) for suffix in ("", "_opt", "_plug_in")}
        if not head.takes_alpha:
            found["gap"] = m.Calibration(*label_range)
            found["auroc"] = m.BinnedAUROC(*label_range)
        if head.stage == "draft" and not head.takes_alpha:
            found |= {"tv": m.Calibration(0.0, 1.0), "reject": m.Calibration(0.0, 1.0)}
        if isinstance(head, JudgeHead):
            found["judge_loss"] = m.WeightedMean()
        self.metrics = found
        self.modules_of_metrics = nn.ModuleDict(found)  # so that they follow the device
        self.alphas = [float(a) for a in alphas]

    @torch.no_grad()
    def update(self, out: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> None:
        """Add a batch: predictions of :func:`predict` and the score table's columns."""
        z, tv, defer, position = batch["z"], batch["tv"], out["defer"], batch["position"]
        self._add("not_finite", ~out["finite"])
        self._add("hindsight_excess", z, tv, defer, position)
        for suffix, decided in (("", defer), *((f"_{name}", batch[name]) for name in BASELINES)):
            self._add(f"rejection_rate{suffix}", tv, decided, position)
            self._add(f"relative_risk{suffix}", z, decided, position)
            if self.exact:
                self._add(f"exact_regret{suffix}", batch["exact"], tv, decided, position)
        for name in BASELINES:
            self._add(f"excess_over_{name}", z, tv, defer, batch[name], position)
        self._add("disagreement_with_opt", defer, batch["opt"], position)
        if "gap" in out:
            self._add("gap", out["gap"], z)
            told = z != 0
            self._add("auroc", out["gap"][told], z[told] > 0)
        if "judge_loss" in out:
            self._add("judge_loss", out["judge_loss"], out["judge_weight"])
        if "reject" in out:
            self._add("tv", out["tv"], tv)
            self._add("reject", out["reject"], batch["reject"])

    def _add(self, name: str, *arguments: Tensor) -> None:
        self.metrics[name].update(*arguments)

    @property
    def headline(self) -> str:
        """Name of the metric that ``regret`` repeats."""
        if "judge_loss" in self.metrics:
            return "judge_loss"
        return "exact_regret" if self.exact else "excess_over_opt"

    def compute(self) -> dict[str, float]:
        """All scalars by name, synchronised across processes; ``regret`` is the headline.

        ``alpha/NAME@A`` is per alpha, ``position/NAME@FROM`` per position bucket, ``stage/STAGE/regret`` the
        headline under the head's stage. ``not_finite`` counts the rows for which the head gave NaN or infinity; where
        there are any, every scalar of the head is NaN: a comparison with NaN would call it a decision to keep.
        """
        scalars: dict[str, float] = {}
        for name, metric in self.metrics.items():
            with metric.sync_context():
                scalars |= self._scalars(name, metric)
        if scalars["not_finite"]:
            scalars = {name: value if _of_rules(name) else math.nan for name, value in scalars.items()}
        scalars["regret"] = scalars[self.headline]
        scalars[f"stage/{self.stage}/regret"] = scalars["regret"]
        return scalars

    def _scalars(self, name: str, metric: Metric) -> dict[str, float]:
        if isinstance(metric, m.PerAlpha):
            found = {name: float(metric.per_alpha().mean())}
            found |= {f"alpha/{name}@{a:g}": float(v) for a, v in zip(self.alphas, metric.per_alpha())}
            if name in (self.headline, "hindsight_excess"):
                buckets = zip(metric.buckets, metric.per_bucket(), metric.count)
                found |= {f"position/{name}@{b}": float(v) for b, v, n in buckets if n}
            return found
        if isinstance(metric, m.Calibration):
            ece, brier = m.calibration(metric.sums, metric.count, metric.square)
            return {f"{name}_ece": float(ece), f"{name}_brier": float(brier)}
        if isinstance(metric, m.Count):
            return {name: float(metric.count)}
        if isinstance(metric, m.WeightedMean):
            return {name: float(metric.sums[0] / metric.sums[1].clamp_min(1))}
        assert isinstance(metric, m.BinnedAUROC)
        value = m.auroc(metric.counts)
        return {name: float(value)} if bool(torch.isfinite(value)) else {}

    def reset(self) -> None:
        for metric in self.metrics.values():
            metric.reset()
