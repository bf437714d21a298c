"""Sequence labels at temperature > 0: expectations over draws, with common random numbers.

Two forms. A *position* label averages over a draft x ~ q and a token y ~ p,

    gap = E_{y ~ p} Q(prefix + y, ...) - E_{x ~ q} Q(prefix + x, ...),

for a rule that does not look at the drafted token. A *token* label is of one drafted token x ~ q,

    gap(x) = E_{y ~ p} Q(prefix + y, ...) - Q(prefix + x, ...).

What follows is sampled from the verifier. Draws of both sides use the same uniform number at the same (prompt,
position, sample), through the inverse of the distribution function, so that much of the noise cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deferral_train.collecting.continuations import Branch, CachedTexts, Verifier, finish
from deferral_train.collecting.sequence import Place, prompt_seed


class Uniforms:
    """Uniform numbers in [0, 1) by (text, position, sample), the same whatever batch the text is in.

    Args:
        prompts: ids of the batch.
        seed: base seed.
        length: most positions.
    """

    def __init__(self, prompts: Sequence[str], seed: int, length: int) -> None:
        self.prompts, self.seed, self.length = prompts, seed, length
        self._rows: dict[tuple[int, str], np.ndarray] = {}

    def at(self, row: int, position: int, sample: int, stream: str = "text") -> float:
        """One number. ``stream`` separates what must be independent of the texts' draws."""
        what = f"{stream} {sample}"
        if (row, what) not in self._rows:
            generator = np.random.default_rng(prompt_seed(self.seed, self.prompts[row], what))
            self._rows[row, what] = generator.random(self.length + 1)
        return float(self._rows[row, what][position])


def draw(distribution: Tensor, uniform: Tensor) -> Tensor:
    """Token of each distribution [R, V] at a uniform number [R]: the first whose cumulative probability exceeds it."""
    below = distribution.double().cumsum(-1)
    token = torch.searchsorted(below, (uniform.double() * below[:, -1])[:, None], right=True)[:, 0]
    return token.clamp(max=distribution.shape[-1] - 1)


def sampler(temperature: float, uniforms: Uniforms) -> Callable[[Tensor, Sequence[Branch], int], Tensor]:
    """How branches are continued: from softmax(logits / temperature), by the branch's own uniform numbers."""

    def choose(logits: Tensor, branches: Sequence[Branch], steps: int) -> Tensor:
        numbers = [uniforms.at(one.row, one.place + steps, one.sample) for one in branches]
        distribution = (logits.float() / temperature).softmax(-1)
        return draw(distribution, torch.tensor(numbers, dtype=torch.float64, device=logits.device))

    return choose


@dataclass(frozen=True)
class Draws:
    """The tokens that are put at one labelled place, a pair per sample.

    Attributes:
        row, place: where.
        drafted: x of each sample; the same token throughout for a token label.
        verified: y of each sample.
    """

    row: int
    place: int
    drafted: Sequence[int]
    verified: Sequence[int]


@dataclass(frozen=True)
class LabelSampling:
    """How labels are sampled.

    Attributes:
        temperature: of both distributions and of the texts.
        samples: continuations of each side, at least 1.
        form: ``position`` or ``token``.
    """

    temperature: float
    samples: int
    form: str


def draw_tokens(
    distributions: Mapping[str, Sequence[Tensor]],
    chosen: Sequence[Sequence[int]],
    how: LabelSampling,
    uniforms: Uniforms,
) -> list[Draws]:
    """Tokens of both models at the chosen places.

    Args:
        distributions: by role, of each text its sampling distributions [L, V].
        chosen: places of each text.
        how: form and number of samples.
        uniforms: random numbers.
    """
    found = []
    for row, places in enumerate(chosen):
        for place in places:
            numbers = [uniforms.at(row, place, sample) for sample in range(how.samples)]
            own = numbers
            if how.form == "token":
                own = [uniforms.at(row, place, 0, "draft")] * how.samples
            q, p = (
                distributions[role][row][place].expand(how.samples, -1) for role in ("drafter", "verifier")
            )
            drafted, verified = (
                draw(distribution, torch.tensor(u)).tolist() for distribution, u in ((q, own), (p, numbers))
            )
            found.append(Draws(row, place, drafted, verified))
    return found


def sampled_places(
    verifier: Verifier, path: CachedTexts, draws: Sequence[Draws], how: LabelSampling, uniforms: Uniforms
) -> list[list[Place]]:
    """Both finished texts of every sample of every place."""
    wanted: dict[Branch, None] = {}
    for one in draws:
        for sample, pair in enumerate(zip(one.drafted, one.verified)):
            if pair[0] != pair[1]:  # the same token at the same random numbers is the same text
                wanted |= {Branch(one.row, one.place, token, sample): None for token in pair}
    texts = finish(verifier, path, list(wanted), sampler(how.temperature, uniforms))
    return [
        [
            Place(
                one.row,
                one.place,
                texts.get(Branch(one.row, one.place, x, sample), ()),
                texts.get(Branch(one.row, one.place, y, sample), ()),
            )
            for sample, (x, y) in enumerate(zip(one.drafted, one.verified))
        ]
        for one in draws
    ]
