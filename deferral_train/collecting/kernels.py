"""The passes over the vocabulary that decide how fast collecting is, each by the quicker library of a device.

On a CPU NumPy's vector code beats torch's for exp, log, small matrix products, sorting and comparing (1.5 to 10 times,
x86 with AVX-512), on the very same memory; on a GPU torch does everything. Arguments are float32 and contiguous
in the last axis, of V entries.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

TINY = 1e-37  # keeps log(0) out of 0 log 0
GROUPS_PER_PLACE = 4  # in the search for the top k; beyond 512 numbers sorting is slow on some CPUs
PLACE = (1 << 29) - 1  # the bits of a float64 that a float32 leaves free
NO_KEY = int(np.array(np.inf).view(np.int64))  # sorts after every finite value


def in_numpy(tensor: Tensor) -> bool:
    """Whether NumPy can work on this tensor's memory."""
    return tensor.device.type == "cpu"


def exp(values: Tensor, out: Tensor) -> Tensor:
    """exp of every value."""
    if not in_numpy(values):
        return torch.exp(values, out=out)
    np.exp(values.numpy(), out=out.numpy())
    return out


def dots(rows: Tensor, others: Tensor) -> Tensor:
    """Inner products of A with B vectors for each of R positions: [A, R, V], [B, R, V] -> [R, A, B].

    A and B differ: NumPy's own routine for a matrix with itself is several times slower at these shapes.
    """
    left, right = rows.transpose(0, 1), others.permute(1, 2, 0)
    if in_numpy(rows):
        return torch.from_numpy(np.matmul(left.numpy(), right.numpy()))
    return torch.bmm(left, right)


def log_(values: Tensor) -> Tensor:
    """log of values >= 0, in place; 0 counts as a number so small that x log x is 0 to every digit."""
    values += TINY
    if not in_numpy(values):
        return values.log_()
    np.log(values.numpy(), out=values.numpy())
    return values


def top_places(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Where the highest values of each row lie, of values [M, V] <= 0 of which one per row is 0.

    A row with NaNs gets places that mean nothing.

    Returns:
        The lowest place of the highest value, int64 [M], and the places of the k highest, highest first,
        int64 [M, k]; in NumPy equal values go by place.
    """
    if not in_numpy(values):
        return (values == 0).int().argmax(dim=1), values.topk(k, dim=1).indices
    if k == 0:
        best = np.argmax(values.numpy(), axis=1)
        return torch.from_numpy(best), torch.empty(len(best), 0, dtype=torch.int64)
    tops = torch.from_numpy(_top_places(values, k))
    return tops[:, 0], tops


def _top_places(values: Tensor, k: int) -> np.ndarray:
    """The k highest, [M, k]: the few that reach a bound, then sorted."""
    flat, (count, width) = values.numpy().reshape(-1), values.shape
    found = np.flatnonzero(values.numpy() >= _bound(values, k)[:, None])
    row, place = np.divmod(found, width)
    # One number to sort by: the bits of a float64 >= 0 order like its value, and hold the place where they are free.
    keys = (0.0 - flat[found]).astype(np.float64).view(np.int64) | place
    per_row = np.bincount(row, minlength=count)
    table = np.full((count, max(k, int(per_row.max(initial=0)))), NO_KEY)
    table[np.arange(table.shape[1]) < per_row[:, None]] = keys
    table.sort(axis=1)
    return table[:, :k] & PLACE


def _bound(values: Tensor, k: int) -> np.ndarray:
    """A value per row that at least k entries reach, and few more: the k-th highest of the maxima of groups."""
    count, width = values.shape
    size = width // (GROUPS_PER_PLACE * k)
    if size < 2:
        maxima = values
    else:  # the last few columns are in no group, which leaves the bound a bound
        groups = width // size
        maxima = values[:, : groups * size].view(count, size, groups).amax(dim=1)
    return np.sort(maxima.numpy(), axis=1)[:, -k]
