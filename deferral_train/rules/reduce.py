"""A block of logits to a few numbers per position, for decisions that need no whole law.

As few tensor operations as will do: on a CPU their dispatch outweighs the arithmetic of a small block. Shapes:
logits [.., V], results [..].
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

# A masked token has probability 0, and so has any this far below the largest: the clamp keeps 0 * inf out.
FAR_BELOW = -1e4


@dataclass(frozen=True)
class Reduced:
    """Of each position: the largest logit, the log normaliser and, where asked for, the entropy in nats."""

    top: Tensor
    logsumexp: Tensor
    entropy: Tensor | None


def reduce_rows(logits: Tensor, law: Tensor, entropy: bool) -> Reduced:
    """Numbers of positions [.., V] from logits and their softmax.

    Those of a position with NaN, +inf or only -inf are not finite.
    """
    top = logits.amax(dim=-1)
    # The largest probability is one over the sum of the shifted exponentials.
    normaliser = -law.amax(dim=-1).log()
    if not entropy:
        return Reduced(top, top + normaliser, None)
    # H = -sum p log p with log p = (z - max z) - normaliser: no logarithm of every probability.
    spread = ((logits - top.unsqueeze(-1)).clamp_(min=FAR_BELOW) * law).sum(dim=-1)
    return Reduced(top, top + normaliser, (normaliser - spread).clamp(min=0.0))
