"""A language whose true next-token distribution P is known: the yardstick for exact regret.

The source is a Markov chain of order 3 over 64 tokens. Its distributions back off to shorter contexts, each drawn from
a Dirichlet distribution around the next shorter one, so that a model can learn them from samples. Verifier and drafter
are not made up: they are smoothed n-gram estimates of limited samples of the source, the verifier of order 3,
the drafter of order 2 and fewer samples. ``drafter_scale=2`` doubles the drafter's logits, the overconfident
variant. Parameters are fixed; they were not tuned to what a head achieves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.rules.risks import expected_loss

CHAINS = 500  # chains that estimation samples come from
MAX_TABLE = 2**26  # entries of the largest distribution table


@dataclass(frozen=True)
class SyntheticConfig:
    """The synthetic language and the two models estimated from it.

    Attributes:
        vocab_size: V.
        order: tokens of context that P depends on.
        concentration: Dirichlet concentration of a distribution around its back-off distribution; lower is more peaked.
        seed: of the source and of all samples.
        verifier_tokens, drafter_tokens: samples that the models are estimated from.
        verifier_order, drafter_order: context lengths of the models.
        smoothing: weight of the back-off distribution in an estimate, in counts.
        drafter_scale: factor on the drafter's logits; 1 as they come, 2 overconfident.
    """

    vocab_size: int = 64
    order: int = 3
    concentration: float = 16.0
    seed: int = 0
    verifier_tokens: int = 200_000
    drafter_tokens: int = 20_000
    verifier_order: int = 3
    drafter_order: int = 2
    smoothing: float = 5.0
    drafter_scale: float = 1.0

    def __post_init__(self) -> None:
        longest = max(self.order, self.verifier_order, self.drafter_order)
        if self.vocab_size < 2 or min(self.order, self.verifier_order, self.drafter_order) < 1:
            raise InputError(f"synthetic: {self}: vocab_size must be at least 2 and every order at least 1")
        if self.vocab_size ** (longest + 1) > MAX_TABLE:
            raise InputError(f"synthetic: vocab_size ** (order + 1) is above {MAX_TABLE}; lower one of them")
        if not min(self.concentration, self.smoothing, self.drafter_scale) > 0:
            raise InputError("synthetic: concentration, smoothing and drafter_scale must be positive")
        if min(self.verifier_tokens, self.drafter_tokens) < CHAINS * (self.order + 1):
            raise InputError(
                f"synthetic: estimate the models from at least {CHAINS * (self.order + 1)} tokens"
            )


@dataclass(frozen=True)
class NgramDistribution:
    """Next-token distributions by context: ``table`` float32 [V^order, V], rows sum to 1.

    ``distribution(tokens)`` and ``logits(tokens)`` take ids [.., T] and give [.., T, V]: the distribution of the
    token after each one. Contexts that reach before the first token are filled with token 0, where every text starts.
    """

    table: Tensor
    order: int
    scale: float = 1.0

    @property
    def vocab_size(self) -> int:
        return self.table.shape[-1]

    def distribution(self, tokens: Tensor) -> Tensor:
        """Probabilities [.., T, V]; with a scale, softmax(scale * log table)."""
        rows = self.table[self._contexts(tokens)]
        return rows if self.scale == 1.0 else (self.scale * rows.log()).softmax(-1)

    def logits(self, tokens: Tensor) -> Tensor:
        """scale * log probabilities [.., T, V]."""
        return self.scale * self.table[self._contexts(tokens)].log()

    __call__ = logits

    def _contexts(self, tokens: Tensor) -> Tensor:
        history = torch.nn.functional.pad(tokens, (self.order - 1, 0))
        windows = history.unfold(-1, self.order, 1)
        weights = self.vocab_size ** torch.arange(self.order - 1, -1, -1)
        return (windows * weights).sum(-1)


@dataclass(frozen=True)
class SyntheticLanguage:
    """The true distribution and the two models' distributions."""

    config: SyntheticConfig
    truth: NgramDistribution
    drafter: NgramDistribution
    verifier: NgramDistribution


@dataclass(frozen=True)
class SyntheticChunk:
    """B sequences at all of their T positions, V tokens; everything a trace with the exact truth group needs.

    Attributes:
        first: index of the first sequence.
        gold: int64 [B, T], the token that the source emitted.
        drafter_logits, verifier_logits, truth: [B, T, V]; truth holds probabilities.
    """

    first: int
    gold: Tensor
    drafter_logits: Tensor
    verifier_logits: Tensor
    truth: Tensor

    def truth_columns(self) -> dict[str, Tensor]:
        """The traces' exact truth group, each [B, T]; for q: P(v_q), E_P -log q, sum P q, and so for p."""
        columns = {}
        for role, logits in (("drafter", self.drafter_logits), ("verifier", self.verifier_logits)):
            distribution = logits.softmax(-1)
            columns[f"truth_{role}_argmax"] = 1 - expected_loss("zero_one", distribution, self.truth)
            columns[f"truth_{role}_log"] = expected_loss("log", distribution, self.truth)
            columns[f"truth_{role}_prob"] = 1 - expected_loss("prob", distribution, self.truth)
        return columns


def build_language(config: SyntheticConfig | None = None) -> SyntheticLanguage:
    """Draw the source, sample from it and estimate both models; the same config gives the same tables."""
    config = config or SyntheticConfig()
    truth = NgramDistribution(torch.from_numpy(_source(config)), config.order)
    models = {}
    for role, order, tokens, scale, seed in (
        ("verifier", config.verifier_order, config.verifier_tokens, 1.0, 1),
        ("drafter", config.drafter_order, config.drafter_tokens, config.drafter_scale, 2),
    ):
        texts = _sample(truth, CHAINS, tokens // CHAINS, np.random.default_rng([config.seed, seed]))
        table = _estimate(texts, order, config.vocab_size, config.smoothing)
        models[role] = NgramDistribution(torch.from_numpy(table), order, scale)
    return SyntheticLanguage(config, truth, **models)


def sample_sequences(language: SyntheticLanguage, count: int, length: int, seed: int) -> Tensor:
    """Texts of the source, int64 [count, length]; never the texts that the models were made from."""
    generator = np.random.default_rng([language.config.seed, 3, seed])
    return torch.from_numpy(_sample(language.truth, count, length, generator))


def chunks(
    language: SyntheticLanguage, sequences: Tensor, size: int = 64, dtype: torch.dtype = torch.float32
) -> Iterator[SyntheticChunk]:
    """Both models' logits and the truth at every position of ``sequences`` [S, T], ``size`` at a time.

    Position t is the distribution of token t given those before it.
    """
    for first in range(0, len(sequences), size):
        gold = sequences[first : first + size]
        before = torch.nn.functional.pad(gold, (1, 0))[:, :-1]  # every text starts after token 0
        yield SyntheticChunk(
            first,
            gold,
            language.drafter.logits(before).to(dtype),
            language.verifier.logits(before).to(dtype),
            language.truth.distribution(before).to(dtype),
        )


def _source(config: SyntheticConfig) -> np.ndarray:
    """P as float32 [V^order, V]: a context's distribution is Dirichlet around that of the next shorter one."""
    generator = np.random.default_rng([config.seed, 0])
    size = config.vocab_size
    distribution = 1.0 / (2.0 + np.arange(size))  # Zipf-like, as words are
    distributions = (distribution / distribution.sum())[None]
    for _ in range(config.order):
        # Row index of a context is its tokens in base V, oldest first: the shorter context repeats V times.
        around = np.tile(distributions, (size, 1))
        drawn = generator.standard_gamma(config.concentration * around) + 1e-6 * around
        distributions = drawn / drawn.sum(-1, keepdims=True)
    return distributions.astype(np.float32)


def _sample(
    distribution: NgramDistribution, count: int, length: int, generator: np.random.Generator
) -> np.ndarray:
    """``count`` texts in step, int64 [count, length], by inversion of the cumulative distributions."""
    size = distribution.vocab_size
    cumulative = distribution.table.double().cumsum(-1).numpy()
    cumulative[:, -1] = np.inf  # rounding must not leave the last token out of reach
    texts = np.zeros((count, length), dtype=np.int64)
    context = np.zeros(count, dtype=np.int64)
    for t in range(length):
        draws = generator.random(count)
        texts[:, t] = (cumulative[context] <= draws[:, None]).sum(-1)
        context = (context * size + texts[:, t]) % size**distribution.order
    return texts


def _estimate(texts: np.ndarray, order: int, size: int, smoothing: float) -> np.ndarray:
    """Interpolated n-gram distributions, float32 [V^order, V].

    An estimate is (counts + smoothing * estimate of the shorter context) / (total + smoothing).
    """
    padded = np.pad(texts, ((0, 0), (order, 0)))
    length = texts.shape[1]
    distributions = np.full((1, size), 1.0 / size)
    for context in range(order + 1):
        index = np.zeros(texts.shape, dtype=np.int64)
        for back in range(context, -1, -1):
            index = index * size + padded[:, order - back : order - back + length]
        counts = np.bincount(index.ravel(), minlength=size ** (context + 1)).reshape(-1, size)
        around = np.tile(distributions, (len(counts) // len(distributions), 1))
        distributions = (counts + smoothing * around) / (counts.sum(-1, keepdims=True) + smoothing)
    return distributions.astype(np.float32)
