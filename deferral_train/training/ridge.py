"""Ridge regression of the gap in closed form, its penalty chosen on validation. N rows, F features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.heads.base import DeferralHead
from deferral_train.heads.folding import is_linear, linear_layer
from deferral_train.heads.gap import GapHead

RIDGE = "ridge"  # objective
# Of squared weights of features of deviation 1, per row.
PENALTIES = tuple(10.0 ** (exponent / 2) for exponent in range(-8, 5))
BLOCK = 65_536


@torch.no_grad()
def fit_ridge(
    head: DeferralHead,
    train: Mapping[str, Tensor],
    val: Mapping[str, Tensor],
    penalties: Sequence[float] = PENALTIES,
) -> float:
    """Set a linear gap head's weights to those of least squared error plus penalty; returns the penalty.

    Args:
        head: normalised on ``train``. Its gap's gate plays no part: rows where it is shut do not count.
        train: columns ``x`` [N, C] and ``z`` [N].
        val: the same; the penalty of least squared error here is taken.

    Raises:
        InputError: a head that is not linear, or not of the verify stage.
    """
    if not isinstance(head, GapHead) or not is_linear(head) or head.stage != "verify":
        raise InputError(
            "objective='ridge': it solves a gap head with body='linear' at the verify stage, no other"
        )
    products, moments, mean = _sums(head, train)
    shift = mean[:-1]  # of the features, which are only about 0 on average
    centred = products - torch.outer(shift, shift)
    target = moments - shift * mean[-1]
    values, vectors = torch.linalg.eigh(centred)
    rotated = vectors.T @ target
    candidates = torch.stack(
        [vectors @ (rotated / (values.clamp_min(0) + penalty)) for penalty in penalties], dim=1
    )
    offsets = mean[-1] - shift @ candidates
    errors = _errors(head, val, candidates, offsets)
    best = int(errors.argmin())
    layer = linear_layer(head)
    layer.weight.copy_(candidates[:, best].to(layer.weight))
    layer.bias.copy_(offsets[best].to(layer.bias))
    return float(penalties[best])


def _open_rows(head: DeferralHead, table: Mapping[str, Tensor], start: int) -> tuple[Tensor, Tensor]:
    """Normalised features and labels of a block of rows where the gate is open, in float64."""
    x, z = table["x"][start : start + BLOCK], table["z"][start : start + BLOCK]
    if head.gated:
        told = head.inputs.column(x, "argmaxes_differ") > 0
        x, z = x[told], z[told]
    return head.prepare(x).double(), z.double()


def _sums(head: DeferralHead, table: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean products of features [F, F], of features and labels [F], and means of both [F + 1]."""
    count, products, moments, sums = 0, torch.zeros(()), torch.zeros(()), torch.zeros(())
    for start in range(0, len(table["z"]), BLOCK):
        x, z = _open_rows(head, table, start)
        count += len(z)
        products, moments = products + x.T @ x, moments + x.T @ z
        sums = sums + torch.cat([x.sum(0), z.sum().reshape(1)])
    if not count:
        raise InputError("objective='ridge': the models agree on every labelled row; collect more prompts")
    return products / count, moments / count, sums / count


def _errors(head: DeferralHead, table: Mapping[str, Tensor], weights: Tensor, offsets: Tensor) -> Tensor:
    """Summed squared error of every candidate, [P]."""
    total = torch.zeros(weights.shape[1], dtype=torch.float64)
    for start in range(0, len(table["z"]), BLOCK):
        x, z = _open_rows(head, table, start)
        total += (x @ weights + offsets - z[:, None]).square().sum(0)
    return total
