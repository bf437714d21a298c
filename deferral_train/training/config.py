"""Settings of a fit, its default features, and the untrained head they describe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.heads.base import HEADS, DeferralHead
from deferral_train.heads.lookups import FIELDS_READ, MATRIX, VOCABULARY
from deferral_train.traces import Traces
from deferral_train.traces.judged import judges_sequences
from deferral_train.traces.schema import JUDGED_HIDDEN
from deferral_train.traces.sequence import is_sequence
from deferral_train.training.datamodule import ALPHAS
from deferral_train.training.sklearn_heads import KINDS as SKLEARN
from deferral_train.training.sklearn_heads import SklearnHead
from deferral_train.training.table import hidden_widths

VERIFY_FEATURES = (
    "drafter_max:logit",
    "verifier_max:logit",
    "drafter_max",
    "verifier_max",
    "drafter_at_verifier_argmax:log",
    "verifier_at_drafter_argmax:log",
    "verifier_at_drafter_argmax",
    "drafter_entropy",
    "verifier_entropy",
    "tv",
    "kl:log1p",
    "reverse_kl:log1p",
    "position:log1p",
)
MARGINS = ("drafter_margin", "verifier_margin")
# Beside these the verifier's hidden state, where it is logged.
SEQUENCE_FEATURES = (
    *VERIFY_FEATURES,
    *MARGINS,
    "argmax_cosine",
    "drafter_argmax_embedding",
    "verifier_argmax_embedding",
)
DRAFT_FEATURES = (
    "drafter_max:logit",
    "drafter_max",
    "drafter_entropy",
    "drafter_sum_squares",
    "drafter_logsumexp",
    "position:log1p",
)


@dataclass(frozen=True)
class FitConfig:
    """Everything that decides a fitted head.

    Attributes:
        train: trace folder, opened traces, or a list of these whose rows are taken together.
        val: the same for validation; None sets ``val_fraction`` of the prompts of ``train`` aside.
        head: type in :data:`deferral_train.heads.HEADS`, or a scikit-learn baseline: ridge, logistic,
        boosting. stage, loss, features, body, hidden, recalibration: of the head; no features means the
        stage's default. truth: what labels the gap. temperature: of the sampling distributions; None is the traces'
        own. alphas: grid on which regret is tracked. objective, lr, weight_decay, optimizer, schedule: of
        the training; objective auto is the head's own. batch_size, epochs, patience, seed: early stopping
        after ``patience`` epochs without a better val/regret. precision: of Lightning: 32-true, bf16-mixed,
        16-mixed. devices, accelerator, strategy: of Lightning. pair_training: record of what the pair was
        trained on; shared prompts are refused. verifier: checkpoint whose output matrix features read (embeddings of
        tokens), or the matrix [V, D].
    """

    train: Any
    val: Any = None
    head: str = "gap"
    stage: str = "verify"
    loss: str = "zero_one"
    features: Sequence[str] = ()
    body: str = "mlp"
    hidden: Sequence[int] = (64, 64)
    recalibration: str = "none"
    truth: str = "reference"
    temperature: float | None = None
    alphas: Sequence[float] = ALPHAS
    val_fraction: float = 0.1
    objective: str = "auto"
    lr: float = 3e-3
    weight_decay: float = 1e-4
    optimizer: str = "adamw"
    schedule: str = "cosine"
    batch_size: int = 1024
    epochs: int = 30
    patience: int = 10
    seed: int = 0
    precision: str = "32-true"
    accelerator: str = "cpu"
    devices: int = 1
    strategy: str = "auto"
    figure_every: int = 5
    pair_training: str | None = None
    verifier: Any = None


def make_head(config: FitConfig, traces: Traces, matrix_width: int = 0) -> DeferralHead:
    """The untrained head of a config; widths of hidden states come from the traces, that of the verifier's output
    matrix from the caller.
    """
    known = (*HEADS, *SKLEARN)
    if config.head not in known:
        raise InputError(f"head {config.head!r} is unknown; known: {', '.join(known)}")
    if config.head == "plug_in":
        return HEADS["plug_in"](recalibration=config.recalibration)  # type: ignore[call-arg]
    default = _default_features(config, traces)
    features = tuple(config.features) or default
    widths = {
        name: d
        for name, d in hidden_widths(traces).items()
        if any(f.partition(":")[0] == name for f in features)
    }
    if any(f.partition(":")[0] in FIELDS_READ for f in features):
        widths |= {VOCABULARY: int(traces.manifest.pair["vocab_size"]), MATRIX: matrix_width}
    shared: dict[str, Any] = {"stage": config.stage, "loss": _loss(config, traces), "widths": widths}
    if config.head in SKLEARN:
        return SklearnHead(config.head, features, seed=config.seed, **shared)
    return HEADS[config.head](
        features,
        body=config.body,
        hidden=tuple(config.hidden),
        recalibration=config.recalibration,
        **shared,
    )


def _default_features(config: FitConfig, traces: Traces) -> tuple[str, ...]:
    if config.stage == "draft":
        return DRAFT_FEATURES
    if config.head == "judge" and not judges_sequences(config.truth):
        return (JUDGED_HIDDEN,)
    if not (is_sequence(config.truth) or judges_sequences(config.truth)):
        return VERIFY_FEATURES
    hidden = ("verifier_hidden",) if "verifier" in traces.manifest.hidden else ()
    if config.head == "token_gap":
        of_token = () if config.verifier is None else ("token_embedding",)
        return (*VERIFY_FEATURES, *MARGINS, *of_token, *hidden)
    if config.verifier is None:
        return (*(name for name in SEQUENCE_FEATURES if name not in FIELDS_READ), *hidden)
    return (*SEQUENCE_FEATURES, *hidden)


def _loss(config: FitConfig, traces: Traces) -> str:
    """The loss asked for; sequence labels have one of their own."""
    if not is_sequence(config.truth):
        return config.loss
    return "sequence" if traces.manifest.temperature == 0 else "sequence_sampled"


def plain_settings(config: FitConfig) -> dict[str, Any]:
    """The config as JSON-like values; opened traces become their number of rows."""
    shallow = {name: getattr(config, name) for name in config.__dataclass_fields__}
    if isinstance(config.verifier, Tensor):
        shallow["verifier"] = f"matrix {list(config.verifier.shape)} in memory"
    for name in ("train", "val"):
        given = shallow[name]
        named = [_named(each) for each in (given if isinstance(given, list | tuple) else [given])]
        shallow[name] = named if isinstance(given, list | tuple) else named[0]
    return {k: list(v) if isinstance(v, tuple) else v for k, v in shallow.items()}


def _named(source: Any) -> Any:
    if isinstance(source, Traces):
        return f"{len(source)} rows in memory"
    return str(source) if isinstance(source, Path) else source
