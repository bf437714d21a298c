"""Recalibration of q and p for decisions only: temperature, Platt and isotonic maps fitted on gold tokens.

Sampling distributions are never altered. ``Recalibration`` lives inside a head and maps the two confidences ``max
q`` and ``max p`` to estimates of P(v_q) and P(v_p); ``fit_temperature`` rescales a whole distribution from its
logged top K and tail.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from deferral_train.errors import InputError

if TYPE_CHECKING:  # fitting uses NumPy; a served head runs where torch alone is installed
    import numpy as np

KINDS = ("none", "platt", "isotonic")
CONFIDENCES = ("drafter_max", "verifier_max")
KNOTS = 33


def golden_section(loss: Callable[[float], float], low: float, high: float, steps: int = 60) -> float:
    """Minimiser of a unimodal function on [low, high]; the bracket shrinks by 0.618 each step."""
    ratio = (5**0.5 - 1) / 2
    a, b = low, high
    c, d = b - ratio * (b - a), a + ratio * (b - a)
    fc, fd = loss(c), loss(d)
    for _ in range(steps):
        if fc < fd:
            b, d, fd = d, c, fc
            c = b - ratio * (b - a)
            fc = loss(c)
        else:
            a, c, fc = c, d, fd
            d = a + ratio * (b - a)
            fd = loss(d)
    return (a + b) / 2


def fit_platt(confidence: Tensor, correct: Tensor, steps: int = 25) -> tuple[float, float]:
    """Slope and bias minimising the log loss of ``sigmoid(slope * logit(confidence) + bias)`` (Platt, 1999).

    ``confidence`` and ``correct`` are ``[N]``; Newton's method with a slight ridge, in float64.
    """
    odds = torch.logit(confidence.double(), eps=1e-6)
    design = torch.stack([odds, torch.ones_like(odds)], dim=-1)
    weights = torch.tensor([1.0, 0.0], dtype=torch.float64, device=odds.device)
    ridge = 1e-6 * torch.eye(2, dtype=torch.float64, device=odds.device)
    for _ in range(steps):
        predicted = torch.sigmoid(design @ weights)
        gradient = design.T @ (predicted - correct.double())
        curvature = (design * (predicted * (1 - predicted)).unsqueeze(-1)).T @ design + ridge
        step = torch.linalg.solve(curvature, gradient)
        weights = weights - step.clamp(-2, 2)
    return float(weights[0]), float(weights[1])


def temper(logprobs: Tensor, tail: Tensor, vocab_size: int, temperature: float) -> Tensor:
    """Log-distribution ``[N, K]`` of the logged tokens after dividing the logits by ``temperature``.

    The V - K unlogged tokens are taken to share their mass ``tail [N]`` evenly, which is exact when K = V.
    """
    unlogged = vocab_size - logprobs.shape[-1]
    scaled = logprobs.double() / temperature
    if unlogged > 0:
        each = (tail.double().clamp_min(1e-12) / unlogged).log() / temperature
        scaled = torch.cat([scaled, (each + math.log(unlogged)).unsqueeze(-1)], dim=-1)
    return (scaled - scaled.logsumexp(-1, keepdim=True))[..., : logprobs.shape[-1]]


def fit_temperature(logprobs: Tensor, tail: Tensor, gold: Tensor, vocab_size: int) -> float:
    """T minimising the negative log-likelihood of gold tokens under the tempered distribution (Guo et al., 2017).

    ``logprobs [N, K]``, ``tail [N]``; ``gold [N]`` is the gold token's place among the K, -1 where it is not
    logged, in which case the row counts through its tail mass.
    """
    rows = torch.arange(len(gold))
    logged = gold >= 0

    def loss(log_t: float) -> float:
        distribution = temper(logprobs, tail, vocab_size, math.exp(log_t))
        seen = distribution[rows[logged], gold[logged]]
        rest = torch.log1p(-distribution[~logged].exp().sum(-1).clamp_max(1 - 1e-9))
        return -float(seen.sum() + rest.sum()) / max(len(gold), 1)

    return math.exp(golden_section(loss, -2.0, 2.0, steps=40))


def isotonic(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least-squares non-decreasing fit of y on x by pooling adjacent violators: sorted x, fitted values."""
    import numpy as np

    order = np.argsort(x, kind="stable")
    x, y = np.asarray(x, np.float64)[order], np.asarray(y, np.float64)[order]
    unique, inverse, weight = np.unique(x, return_inverse=True, return_counts=True)
    mean = np.bincount(inverse, weights=y) / weight
    blocks: list[list[float]] = []  # [sum, weight, number of points]
    for value, w in zip(mean, weight):
        blocks.append([value * w, float(w), 1])
        while len(blocks) > 1 and blocks[-2][0] * blocks[-1][1] >= blocks[-1][0] * blocks[-2][1]:
            last = blocks.pop()
            blocks[-1] = [a + b for a, b in zip(blocks[-1], last)]
    fitted = np.concatenate([np.full(int(n), s / w) for s, w, n in blocks])
    return unique, fitted


def interpolate(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """Piecewise linear map through ``(knots, values) [M]``, constant outside; written in operations ONNX
    has.
    """
    place = (x.unsqueeze(-1) >= knots).sum(-1).clamp(1, len(knots) - 1)
    x0, x1 = knots[place - 1], knots[place]
    y0, y1 = values[place - 1], values[place]
    share = ((x - x0) / (x1 - x0).clamp_min(1e-12)).clamp(0, 1)
    return y0 + share * (y1 - y0)


class Recalibration(nn.Module):
    """Maps ``max q`` and ``max p`` to calibrated estimates of P(v_q), P(v_p); the identity until fitted."""

    slope: Tensor
    bias: Tensor
    knots: Tensor
    values: Tensor

    def __init__(self, kind: str = "none") -> None:
        super().__init__()
        if kind not in KINDS:
            raise InputError(f"recalibration {kind!r} is unknown; choose one of: {', '.join(KINDS)}")
        self.kind = kind
        if kind == "platt":
            self.register_buffer("slope", torch.ones(2))
            self.register_buffer("bias", torch.zeros(2))
        elif kind == "isotonic":
            line = torch.linspace(0, 1, KNOTS).repeat(2, 1)
            self.register_buffer("knots", line.clone())
            self.register_buffer("values", line.clone())

    def fit(self, drafter: tuple[Tensor, Tensor], verifier: tuple[Tensor, Tensor] | None) -> None:
        """Fit from (confidence [N], 1[gold = argmax] [N]) of each model; None leaves the verifier's map
        alone.
        """
        for which, pair in enumerate((drafter, verifier)):
            if pair is None or self.kind == "none":
                continue
            if self.kind == "platt":
                self.slope[which], self.bias[which] = fit_platt(*pair)
            else:
                self._fit_isotonic(which, *pair)

    def _fit_isotonic(self, which: int, confidence: Tensor, correct: Tensor) -> None:
        import numpy as np

        x, fitted = isotonic(confidence.cpu().numpy(), correct.cpu().numpy())
        knots = np.quantile(confidence.cpu().numpy(), np.linspace(0, 1, KNOTS))
        knots = np.maximum.accumulate(knots + np.arange(KNOTS) * 1e-9)
        self.knots[which] = torch.as_tensor(knots, dtype=torch.float32)
        self.values[which] = torch.as_tensor(np.interp(knots, x, fitted), dtype=torch.float32)

    def forward(self, confidence: Tensor, which: int) -> Tensor:
        """Calibrated confidence, same shape; ``which`` is 0 for the drafter and 1 for the verifier."""
        if self.kind == "platt":
            odds = torch.logit(confidence, eps=1e-6)
            return torch.sigmoid(self.slope[which] * odds + self.bias[which])
        if self.kind == "isotonic":
            return interpolate(confidence, self.knots[which], self.values[which])
        return confidence
