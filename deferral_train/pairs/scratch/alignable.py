"""Which positions a drafter's distillation counts, and how often: only what a draft would reach.

Inspired by GRIFFIN (arXiv 2502.11018), which trains an EAGLE-style drafter step by step on its own features and takes
the loss of draft step n >= 2 only where all earlier steps of that draft had the true token among the drafter's k
likeliest. An ordinary drafter predicts a position alike in every draft that reaches it, so that its loss, summed over
all drafts of W tokens that begin anywhere in a sequence, is one loss a position times the number of drafts that reach
it:

    w_t = sum_{n=1..W} prod_{i=t-n+1..t-1} 1[x_i is among the k likeliest at i]      (n = 1: the empty product)

B sequences of T positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deferral_train.pairs.padding import IGNORED


def alignable(logits: Tensor, labels: Tensor, top_k: int) -> Tensor:
    """Where the true token is among the ``top_k`` likeliest, bool [B, T]; False where there is no label.

    A token counts as among them if fewer than ``top_k`` are strictly likelier.

    Args:
        logits: the drafter's, [B, T, V]. labels: [B, T], ``IGNORED`` where there is none.
    """
    gold = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1))
    return ((logits > gold).sum(-1) < top_k) & (labels != IGNORED)


def draft_weights(reachable: Tensor, inside: Tensor, window: int) -> Tensor:
    """Number of drafts of ``window`` tokens that reach each position, w_t, float32 [B, T] in 0..window.

    Args:
        reachable: bool [B, T], :func:`alignable`.
        inside: bool [B, T], positions with a label, the first ones of each row; elsewhere the weight is 0.
    """
    survives = inside.float()
    weights = survives.clone()
    for _ in range(min(window, inside.shape[1]) - 1):
        # One step on: drafts that were at t - 1 and had its true token at hand are now at t.
        survives = torch.nn.functional.pad((survives * reachable)[:, :-1], (1, 0)) * inside
        weights += survives
    return weights
