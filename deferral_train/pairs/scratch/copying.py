"""Start a Llama-style decoder with the circuit that copies: what followed these two tokens before follows again.

A small model spends most of a short training on finding that circuit (induction heads: Olsson et al. 2022, arXiv
2209.11895), and finds it late or not at all with some seeds. Weights can start with the structure that training would
have to find (mimetic initialisation: Trockman and Kolter 2023, arXiv 2305.09828; for recall in state space models
Trockman et al. 2024, arXiv 2410.11135); all of it stays free to change.

Layer 0 looks one token back with its first head and two back with its second: biases of queries and keys, which rotary
positions turn, make a score of distance alone. What stands there, e(i-1) and e(i-2), it writes into directions of their
own. Layer 1 compares (e(i), e(i-1)) with (e(j-1), e(j-2)), in rotary frequencies that hardly turn within a context, and
adds e(j), the token that followed; two tokens are compared because one of them may have had several successors. Its two
heads compare other projections of the contents and copy the two halves of e(j).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

HEADS, LAYERS = 2, 2
FAST = 6  # rotary frequencies that find a distance
PEAK = 5.0  # nats of score that the right distance has above the next one
TURN = 0.6  # radians that a frequency may turn over a context and still compare contents
MATCH = 8.0  # nats of score for each of the two tokens that agree
# Lengths in the residual stream of what the two layers write, where a token's own embedding has 1.
PAST, COPIED = 0.7, 3.0


@torch.no_grad()
def start_copying(model: Any, context: int) -> None:
    """Set the attention of the first two layers; a fresh model then goes on with what it has read before.

    Args:
        model: a new ``LlamaForCausalLM`` with biases in its attention, two heads a layer with keys and values of their
            own, embeddings of length 1, and residual branches that add nothing.
        context: most tokens between a copy and its original.
    """
    speeds = model.model.rotary_emb.inv_freq.detach().cpu()
    slow = torch.nonzero(speeds * context < TURN).flatten()
    width, rank = model.config.hidden_size, len(slow)
    read = _orthogonal(2 * rank, width)
    written = _orthogonal(width, 4 * rank).split(2 * rank, dim=1)
    first, second = (layer.self_attn for layer in model.model.layers[:LAYERS])
    _look_back(first, speeds, read, written)
    _look_up(second, slow, read, written)


def _look_back(attention: Any, speeds: Tensor, read: Tensor, written: tuple[Tensor, ...]) -> None:
    """Head 0 writes ``read`` of the last token along the columns of ``written[0]``, head 1 of the one before it."""
    size = attention.head_dim
    fast = speeds[:FAST]
    gain = (PEAK * size**0.5 / (1 - torch.cos(fast)).sum()) ** 0.5
    for part in (attention.q_proj, attention.k_proj, attention.v_proj):
        part.weight.zero_()
    for head in range(HEADS):
        start, back = head * size, head + 1
        # The key is turned ahead by the angle that it stands behind, so that both point one way at that distance.
        attention.q_proj.bias[start : start + FAST] = gain
        attention.k_proj.bias[start : start + FAST] = gain * torch.cos(back * fast)
        attention.k_proj.bias[start + size // 2 : start + size // 2 + FAST] = gain * torch.sin(back * fast)
        used = slice(start, start + len(read))
        attention.v_proj.weight[used] = read
        # A normed embedding has length sqrt(width); `read` keeps the root of len(read) / width of it.
        attention.o_proj.weight[:, used] = written[head] * PAST * len(read) ** -0.5


def _look_up(attention: Any, slow: Tensor, read: Tensor, written: tuple[Tensor, ...]) -> None:
    """Both heads look where the last two tokens stood before and copy half of what followed each."""
    size, width, rank = attention.head_dim, attention.q_proj.in_features, len(slow)
    length = (width / (1 + 2 * PAST**2)) ** 0.5  # of a token's own embedding, behind the norm
    gain = (2 * MATCH * size**0.5) ** 0.5 / length
    values = _orthogonal(width, width)
    attention.q_proj.weight.zero_()
    attention.k_proj.weight.zero_()
    for head in range(HEADS):
        rows, part = (slice(head * n, (head + 1) * n) for n in (size, rank))
        now = read[part] * (width / len(read)) ** 0.5
        before, earlier = (side[:, part].T / PAST for side in written)
        # Half of the slow places compare the newer of the two tokens, half the older one.
        newer, older = torch.cat([slow, slow + size // 2]).view(-1, 2).T + head * size
        attention.q_proj.weight[newer], attention.k_proj.weight[newer] = gain * now, gain * before
        attention.q_proj.weight[older], attention.k_proj.weight[older] = gain * before, gain * earlier
        attention.v_proj.weight[rows] = values[rows]
        attention.o_proj.weight[:, rows] = values[rows].T * COPIED / length


def _orthogonal(rows: int, columns: int) -> Tensor:
    """Random [rows, columns]; the rows, or the columns of a tall one, are orthogonal and of length 1."""
    return torch.nn.init.orthogonal_(torch.empty(rows, columns))
