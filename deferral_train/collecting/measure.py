"""From two models' logits to the columns of trace rows: the fast twin of `summarize`, with candidates and tails.

Everything is computed on the full vocabulary, in float32, before any truncation. Blocks of a few rows stay in
the cache; both models share each pass, and all sums of products (entropies, cross entropies, sums of squares)
come out of one small matrix product. Blocks give a few numbers per position; what follows from these is computed
once for all. ``rules.summary.summarize`` is the reference that tests hold this against.

R rows of a block, N rows, V vocabulary, K candidates. Axis "model": 0 drafter q, 1 verifier p.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from deferral_train.collecting.kernels import dots, exp, log_, top_places
from deferral_train.rules.summary import margin

CPU_BLOCK = 1 << 18  # logits of one model per block: work enough per call, in reach of a CPU's caches
CUDA_BLOCK = 1 << 27


class Measure:
    """Computes the columns of rows; keeps its work arrays between calls.

    Args:
        vocab_size: V, columns that both models and the tokenizer know; further logits are padding.
        top_k: K, candidates per model (at most V); 0 logs none.
        temperature: of the sampling laws that ``tv`` compares; 0 is greedy.
    """

    def __init__(self, vocab_size: int, top_k: int = 0, temperature: float = 1.0) -> None:
        self.vocab_size, self.temperature = vocab_size, temperature
        self.top_k = min(top_k, vocab_size)
        self._work: Tensor | None = None

    def __call__(self, drafter: Tensor, verifier: Tensor, rows: Tensor, token: Tensor) -> dict[str, Tensor]:
        """Columns by name of the chosen rows, on the logits' device.

        Args:
            drafter, verifier: logits [M, >=V] of any floating type.
            rows: [N] int64, which of the M rows.
            token: [N] int64, the token spoken of at each.

        Returns:
            Summary columns [N], with ``top_k`` also tails [N], ids and log-probabilities [N, K], and
            ``finite`` [N] bool: False where a logit was NaN or infinite and the row means nothing.
        """
        size = self._block_rows(drafter.device)
        with np.errstate(all="ignore"):  # rows that are not finite are flagged, not warned about
            blocks = [
                self._block(drafter, verifier, rows[at : at + size], token[at : at + size])
                for at in range(0, len(rows), size)
            ]
        found = {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}
        return self._columns(found, token)

    def _block_rows(self, device: torch.device) -> int:
        return max(1, (CPU_BLOCK if device.type == "cpu" else CUDA_BLOCK) // self.vocab_size)

    def _arrays(self, count: int, device: torch.device) -> Tensor:
        """Work arrays of a block, [6, R, V]: both logits, both laws, log of their sum, one to scribble on."""
        if self._work is None or self._work.device != device:
            shape = (6, self._block_rows(device), self.vocab_size)
            self._work = torch.empty(shape, device=device)
        return self._work[:, :count]

    def _block(self, drafter: Tensor, verifier: Tensor, rows: Tensor, token: Tensor) -> dict[str, Tensor]:
        """Whatever needs the whole vocabulary, position first: few numbers, from which the columns follow."""
        work = self._arrays(len(rows), drafter.device)
        logits, laws, scratch = work[:2], work[2:4], work[5]
        for model, source in enumerate((drafter, verifier)):
            _select(source[:, : self.vocab_size], rows, logits[model])
        margins = torch.stack([margin(own) for own in logits], dim=1)
        highest = logits.amax(dim=-1, keepdim=True)
        logits -= highest
        exp(logits, out=laws)
        mass = laws.sum(dim=-1, keepdim=True)
        laws *= mass.reciprocal()
        log_(torch.add(laws[0], laws[1], out=work[4]))
        found = {
            "highest": highest[:, :, 0].T,
            "margins": margins,
            "mass": mass[:, :, 0].T,
            "dots": dots(laws, work[:5]),
            "distance": _half_distance(laws, scratch),
        }
        if self.temperature not in (0, 1):
            found["sampled_distance"] = _half_distance((logits / self.temperature).softmax(dim=-1), scratch)
        best, tops = (
            places.view(2, len(rows), *places.shape[1:])
            for places in top_places(logits.flatten(0, 1), self.top_k)
        )
        places = torch.cat([best.T, token[:, None], tops[0], tops[1]], dim=1)
        found |= {"best": best.T, "tops": tops.transpose(0, 1)}
        found["at"] = logits.gather(2, places.expand(2, -1, -1)).transpose(0, 1)
        return found

    def _columns(self, found: dict[str, Tensor], token: Tensor) -> dict[str, Tensor]:
        """Columns of N positions; log q = z - log mass, z a logit less the highest."""
        log_mass, best = found["mass"].log(), found["best"]
        # [N, sum under q or p, of log q, log p | q, p | log (q + p)]
        means, products, middle = found["dots"].split((2, 2, 1), dim=2)
        means = means - log_mass.unsqueeze(1)
        negentropy = means.diagonal(dim1=1, dim2=2)  # [N, 2]: sum q log q, sum p log p
        lse = log_mass + found["highest"]
        at = found["at"] - log_mass.unsqueeze(2)  # [N, model, (v_q, v_p, token, drafter's K, verifier's K)]
        at_best = at[:, :, :2].exp()
        columns = {
            "token": token,
            "drafter_logprob": at[:, 0, 2],
            "verifier_logprob": at[:, 1, 2],
            "drafter_argmax": best[:, 0],
            "verifier_argmax": best[:, 1],
            "drafter_max": at_best[:, 0, 0],
            "verifier_max": at_best[:, 1, 1],
            "drafter_at_verifier_argmax": at_best[:, 0, 1],
            "verifier_at_drafter_argmax": at_best[:, 1, 0],
            "drafter_entropy": (-negentropy[:, 0]).clamp(min=0.0),
            "verifier_entropy": (-negentropy[:, 1]).clamp(min=0.0),
            "cross_entropy": -means[:, 1, 0],
            "kl": (negentropy[:, 1] - means[:, 1, 0]).clamp(min=0.0),
            "reverse_kl": (negentropy[:, 0] - means[:, 0, 1]).clamp(min=0.0),
            "js": ((negentropy - middle[:, :, 0]).sum(dim=1) / 2 + math.log(2)).clamp(0.0, math.log(2)),
            "drafter_sum_squares": products[:, 0, 0],
            "verifier_sum_squares": products[:, 1, 1],
            "product_sum": products[:, 1, 0],
            "drafter_logsumexp": lse[:, 0],
            "verifier_logsumexp": lse[:, 1],
            "drafter_margin": found["margins"][:, 0],
            "verifier_margin": found["margins"][:, 1],
            "tv_unscaled": found["distance"],
            "tv": found.get("sampled_distance", found["distance"]),
            "finite": torch.isfinite(lse).all(dim=1) & torch.isfinite(means).flatten(1).all(dim=1),
        }
        if self.temperature == 0:
            columns["tv"] = (best[:, 0] != best[:, 1]).float()
        if self.top_k:
            columns |= self._candidates(found["tops"].int(), at[:, :, 3:])
        return columns

    def _candidates(self, ids: Tensor, logprobs: Tensor) -> dict[str, Tensor]:
        """Each model's K likeliest tokens, likeliest first, what both models give them, and what is left."""
        k = self.top_k
        half = logprobs.half()
        columns = {}
        for model, role in enumerate(("drafter", "verifier")):
            own = slice(model * k, (model + 1) * k)
            columns[f"{role}_tail"] = (1 - logprobs[:, model, own].exp().sum(dim=-1)).clamp(0.0, 1.0)
            columns[f"{role}_top_ids"] = ids[:, model]
            columns[f"{role}_top_drafter_logprobs"] = half[:, 0, own]
            columns[f"{role}_top_verifier_logprobs"] = half[:, 1, own]
        return columns


def _select(source: Tensor, rows: Tensor, out: Tensor) -> None:
    """Chosen rows of logits, in float32."""
    if source.dtype == out.dtype:
        torch.index_select(source, 0, rows, out=out)
    else:
        out.copy_(source.index_select(0, rows))


def _half_distance(laws: Tensor, scratch: Tensor) -> Tensor:
    """D_TV of two laws [2, R, V], clipped against rounding."""
    return (torch.sub(laws[0], laws[1], out=scratch).abs_().sum(dim=-1) * 0.5).clamp(0.0, 1.0)
