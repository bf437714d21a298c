"""Fold a linear head: the product of weights and embedding becomes a table of one number per token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deferral_train.errors import InputError
from deferral_train.heads.base import DeferralHead
from deferral_train.heads.gap import GapHead
from deferral_train.heads.lookups import COSINE, EMBEDDINGS, MATRIX
from deferral_train.heads.token_gap import TokenGapHead


def folded(head: DeferralHead) -> DeferralHead:
    """The head with tables in place of the embeddings that it reads linearly; itself where there is none."""
    if isinstance(head, TokenGapHead) and reads_embeddings(head):
        return fold_token(head)
    return fold(head) if isinstance(head, GapHead) and reads_embeddings(head) and is_linear(head) else head


def reads_embeddings(head: DeferralHead) -> bool:
    """True where a feature of the head is a token embedding."""
    return any(feature.name in EMBEDDINGS for feature in head.inputs.features)


def is_linear(head: GapHead) -> bool:
    """True where the head's body is one linear layer."""
    return isinstance(head.body, nn.Sequential) and len(head.body) == 1


def linear_layer(head: GapHead) -> nn.Linear:
    """The one layer of a linear head's body."""
    layer = next(head.body.children())
    assert isinstance(layer, nn.Linear)
    return layer


@torch.no_grad()
def fold(head: GapHead) -> GapHead:
    """The same estimates from tables: every ``X_embedding`` becomes ``X_worth``.

    The matrix is dropped, unless the cosine of two of its rows is a feature.

    Raises:
        InputError: a body that is not linear, or an embedding that goes through a transform.
    """
    if not is_linear(head):
        raise InputError(
            "body='mlp': only a linear head can be folded; it is stored with the verifier's matrix"
        )
    names = [_folded_name(str(feature)) for feature in head.inputs.features]
    widths = dict(head.inputs.widths)
    if not any(feature.name == COSINE for feature in head.inputs.features):
        widths.pop(MATRIX, None)
    folded = _made_like(head, names, widths)
    old, new = head.inputs.spans, folded.inputs.spans
    layer, target = linear_layer(head), linear_layer(folded)
    assert head.inputs.lookups is not None
    target.bias.copy_(layer.bias)
    for feature, name in zip(head.inputs.features, names):
        here, there = old[str(feature)], new[name]
        if feature.name not in EMBEDDINGS:
            target.weight[:, there] = layer.weight[:, here]
            folded.mean[there], folded.scale[there] = head.mean[here], head.scale[here]
            continue
        worth = _worth(head, layer.weight[0, here], here)
        assert folded.inputs.lookups is not None
        folded.inputs.lookups.get_buffer(name).copy_(worth)
        target.weight[:, there] = 1.0
    if folded.inputs.lookups is not None and folded.inputs.lookups.width:
        folded.inputs.lookups.set_matrix(head.inputs.lookups.matrix)
    return folded


@torch.no_grad()
def fold_token(head: TokenGapHead) -> TokenGapHead:
    """The same estimates from a table of one number per token in place of the verifier's matrix."""
    names = [_folded_name(str(feature)) for feature in head.inputs.features]
    folded = _made_like(
        head, names, {name: width for name, width in head.inputs.widths.items() if name != MATRIX}
    )
    old, new = head.inputs.spans, folded.inputs.spans
    for feature, name in zip(head.inputs.features, names):
        if feature.name not in EMBEDDINGS:
            here, there = old[str(feature)], new[name]
            folded.mean[there], folded.scale[there] = head.mean[here], head.scale[here]
    folded.body.load_state_dict(head.body.state_dict())
    assert folded.worth is not None
    assert folded.inputs.lookups is not None
    folded.worth.weight.fill_(1.0)
    folded.inputs.lookups.get_buffer("token_worth").copy_(head.worths())
    return folded


def _made_like(head: Any, names: Sequence[str], widths: Mapping[str, int]) -> Any:
    """A head of the same type and settings that reads ``names``; its body is fresh."""
    arguments = {key: head.config[key] for key in ("stage", "loss", "body", "hidden", "recalibration")}
    made = type(head)(names, widths=widths, **arguments)
    made.recalibration.load_state_dict(head.recalibration.state_dict())
    made.metadata = dict(head.metadata)
    return made.eval()


def _worth(head: GapHead, weight: Tensor, columns: slice) -> Tensor:
    """Contribution [V] of each row of the matrix to the head's output: normalised embedding times weight."""
    assert head.inputs.lookups is not None
    rows = head.inputs.lookups.matrix.double()
    normalised = (rows - head.mean[columns].double()) * head.scale[columns].double()
    return (normalised @ weight.double()).float()


def _folded_name(feature: str) -> str:
    name, _, transform = feature.partition(":")
    if name not in EMBEDDINGS:
        return feature
    if transform:
        raise InputError(f"feature {feature!r}: an embedding that goes through a transform cannot be folded")
    return name.replace("_embedding", "_worth")
