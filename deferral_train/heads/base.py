"""Base class of heads: features in, normalisation inside, estimated loss gap out.

N rows, C raw columns, F features. A head estimates gap = E_P[l(y,q) - l(y,p)]; its rule defers where
gap > alpha * tv (docs/equations.md, Lemma 4).
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deferral_train.errors import InputError
from deferral_train.heads import artifact
from deferral_train.heads.bodies import make_body
from deferral_train.heads.config import check_schema, constructor_arguments, stored_config, stored_metadata
from deferral_train.heads.features import READABLE_VERSIONS, FeatureSet
from deferral_train.heads.recalibration import CONFIDENCES, Recalibration
from deferral_train.rules.summary import Summary

LOSSES = ("zero_one", "log", "prob", "sequence", "sequence_sampled")
SEQUENCE_LOSSES = ("sequence", "sequence_sampled")
# Losses whose gap is 0 where the argmaxes agree, because nothing is drafted but the argmax.
GATED = ("zero_one", "sequence")

# Head classes by ``head_type``: those of this package, which an artifact may name. A config never names code to import.
HEADS: dict[str, type[DeferralHead]] = {}


@contextlib.contextmanager
def decisions(x: Tensor) -> Iterator[None]:
    """Context in which a head answers for columns ``x``: no gradients, and float32 where the caller's models run
    under autocast.
    """
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        yield


class DeferralHead(nn.Module):
    """Base of all heads. A subclass states ``head_type``, the number of body ``outputs`` and ``forward``.

    A class of this package that states a ``head_type`` enters :data:`HEADS`; a user's own class does not, and is loaded
    only where the user names it (:mod:`deferral_train.heads.own`). Class attributes tell the rest of the package what
    a head is:

    Attributes:
        head_type: name in config.json.
        objectives: training objectives that fit (:mod:`deferral_train.heads.objectives`); the first is the default.
        dial: the number that its rule takes as operating point, ``"alpha"`` or ``"threshold"``.
        takes_alpha: True where ``forward`` takes alpha ``[N]`` besides the columns and gives a score, no gap.
        needs_candidates: True where its own objective reads logged candidate tokens.
        tokenwise: True where it serves a token rule unless told otherwise.
        inputs_beside: numbers that reach the body besides the features.

    Args:
        features: summary names with optional transforms (:mod:`deferral_train.heads.features`).
        stage: ``"verify"`` (both models have scored the position) or ``"draft"`` (only the drafter has).
        loss: the loss whose gap is estimated: ``"zero_one"``, ``"log"`` or ``"prob"`` of the next token, or what the
            finished text loses: ``"sequence"`` at temperature 0, ``"sequence_sampled"`` above.
        body: ``"linear"`` or ``"mlp"`` with widths ``hidden``.
        widths: width of each hidden-state feature.
        recalibration: ``"none"``, ``"platt"`` or ``"isotonic"``, applied to max q and max p on entry.
        memory_entries: size of the memory behind features ``memory_k``; fitting sets it.
    """

    head_type: ClassVar[str]
    objectives: ClassVar[tuple[str, ...]] = ("squared", "huber", "cost_sensitive")
    dial: ClassVar[str] = "alpha"
    takes_alpha: ClassVar[bool] = False
    needs_candidates: ClassVar[bool] = False
    tokenwise: ClassVar[bool] = False
    inputs_beside: ClassVar[int] = 0
    mean: Tensor
    scale: Tensor

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if "head_type" not in cls.__dict__ or not cls.__module__.startswith(f"{__package__}."):
            return
        other = HEADS.get(cls.head_type, cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(
                f"{cls.__name__}: head_type {cls.head_type!r} is that of {other.__name__}; give another"
            )
        HEADS[cls.head_type] = cls

    def __init__(
        self,
        features: Sequence[str],
        *,
        stage: str = "verify",
        loss: str = "zero_one",
        body: str = "mlp",
        hidden: Sequence[int] = (64, 64),
        widths: Mapping[str, int] | None = None,
        recalibration: str = "none",
        memory_entries: int = 0,
    ) -> None:
        super().__init__()
        if loss not in LOSSES:
            raise InputError(f"loss {loss!r} is unknown; choose one of: {', '.join(LOSSES)}")
        if isinstance(features, str) or not features:
            raise InputError(
                "features must be a non-empty list of names, e.g. ['drafter_max', 'verifier_max']"
            )
        self.stage, self.loss = stage, loss
        self.gated = stage == "verify" and loss in GATED
        self.inputs = FeatureSet(features, stage, widths, self.extra_columns(), memory_entries)
        self.recalibration = Recalibration(recalibration)
        self.body = self.make_body(body, hidden)
        self.register_buffer("mean", torch.zeros(self.inputs.out_features))
        self.register_buffer("scale", torch.ones(self.inputs.out_features))
        self.metadata: dict[str, Any] = {}
        self._arguments = {"body": body, "hidden": list(hidden), "recalibration": recalibration}

    # What a subclass states

    @property
    def outputs(self) -> int:
        """Numbers per row that the body gives."""
        raise NotImplementedError

    def extra_columns(self) -> tuple[str, ...]:
        """Raw columns needed besides the features: the zero-one gap is 0 where the argmaxes agree."""
        return ("argmaxes_differ",) if self.gated else ()

    def make_body(self, kind: str, hidden: Sequence[int]) -> nn.Module:
        """The map from normalised features to ``outputs``."""
        return make_body(kind, self.inputs.out_features + self.inputs_beside, self.outputs, hidden)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Raw columns ``[N, C]`` to named outputs ``[N]``: ``gap``; at the draft stage also ``tv``, ``reject``."""
        raise NotImplementedError

    # What rules, traces and training read

    @property
    def features(self) -> tuple[str, ...]:
        """Summary fields that must be present to call this head."""
        return self.inputs.needs

    @property
    def config(self) -> dict[str, Any]:
        """Everything needed to build the same head again, as plain JSON types."""
        return {
            "deferral_head_type": self.head_type,
            "stage": self.stage,
            "loss": self.loss,
            "features": [str(f) for f in self.inputs.features],
            "schema": self.inputs.schema,
            "schema_hash": self.inputs.schema_hash,
            "widths": dict(self.inputs.widths),
            **self._arguments,
            **({} if self.inputs.memory is None else {"memory_entries": self.inputs.memory.entries}),
        }

    @property
    def num_parameters(self) -> int:
        """Trainable numbers."""
        return sum(p.numel() for p in self.parameters())

    def columns(self, summary: Summary, leave_out: Tensor | None = None) -> Tensor:
        """Raw columns ``[.., C]`` that :meth:`forward` takes, from a summary; ``leave_out`` as in
        :meth:`FeatureSet.columns`.

        Everything that a head is asked goes through here, and so the head follows the summary to its device: a head
        is loaded on the CPU, and decides where the verifier is.
        """
        self._follow(summary)
        return self.inputs.columns(summary, leave_out)

    def _follow(self, summary: Summary) -> None:
        """Move to the device of the summary, once; the next summary there finds the head in place."""
        device = next((summary[name].device for name in self.features), self.mean.device)
        if device != self.mean.device:
            with torch.inference_mode(False):  # weights made in inference mode could not be trained any more
                self.to(device)

    def gap(self, summary: Summary) -> Tensor:
        """Estimated gap ``[..]`` in units of the loss; not-a-number inputs give +inf, which defers."""
        return self._predict(summary, "gap").nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)

    def tv(self, summary: Summary) -> Tensor:
        """Estimated total variation ``[..]``; draft stage only, the verify stage knows it."""
        return self._of_draft(summary, "tv")

    def reject(self, summary: Summary) -> Tensor:
        """Estimated probability ``[..]`` that a deferred drafted token is rejected; draft stage only."""
        return self._of_draft(summary, "reject")

    def _of_draft(self, summary: Summary, name: str) -> Tensor:
        if self.stage != "draft":
            raise InputError(f"a verify-stage head does not predict {name}: the summary's tv is exact")
        return self._predict(summary, name)

    def _predict(self, summary: Summary, name: str) -> Tensor:
        x = self.columns(summary)
        with decisions(x):
            outputs = self(x.reshape(-1, x.shape[-1]))
        return outputs[name].reshape(x.shape[:-1])

    # Inside

    def prepare(self, x: Tensor) -> Tensor:
        """Raw columns to recalibrated, transformed, normalised features ``[N, F]``."""
        return (self.inputs(self.recalibrated(x)) - self.mean) * self.scale

    def recalibrated(self, x: Tensor) -> Tensor:
        """``x`` with the confidence columns recalibrated; the same tensor where nothing is to do."""
        if self.recalibration.kind == "none":
            return x
        x = x.clone()
        for which, name in enumerate(CONFIDENCES):
            if name in self.inputs.start:
                column = self.inputs.start[name]
                x[..., column] = self.recalibration(x[..., column], which)
        return x

    def gate(self, x: Tensor, gap: Tensor) -> Tensor:
        """Gap set to its known value 0 where both models' argmaxes agree (`GATED` losses, verify stage)."""
        return gap * self.inputs.column(x, "argmaxes_differ") if self.gated else gap

    @torch.no_grad()
    def fit_normalisation(self, blocks: Iterable[Tensor]) -> None:
        """Set mean and 1/deviation of every feature from raw columns given in blocks ``[n, C]``; constants
        get 1.
        """
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for block in blocks:
            z = self.inputs(self.recalibrated(block)).double()
            count, total, squares = count + len(z), total + z.sum(0), squares + (z * z).sum(0)
        if count == 0:
            raise InputError("no rows to normalise features on: the fit split is empty")
        mean = total / count
        deviation = (squares / count - mean * mean).clamp_min(0).sqrt()
        self.mean.copy_(mean)
        self.scale.copy_(
            torch.where(deviation > 1e-6, 1 / deviation.clamp_min(1e-6), torch.ones_like(deviation))
        )

    # Artifact

    def stored_config(self) -> dict[str, Any]:
        """Content of config.json: :attr:`config` with version, ``"lossy": true`` and metadata.

        Raises:
            InputError: metadata of an unknown name, or out of the range that a reader takes.
        """
        return stored_config(self.config, self.metadata)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> DeferralHead:
        """Head in evaluation mode from a folder or, where no such folder exists, from a hub id ``owner/name``.

        Called on a subclass, the folder must hold a head of that class; this is how a user's own class is loaded.

        Raises:
            InputError: a file that is absent, malformed or of another schema, or tensors that do not fit the config.
        """
        config, weights = artifact.read_artifact(folder)
        own = None if cls is DeferralHead else cls
        if own is None:  # a class of one's own may not build on the meta device
            with torch.device("meta"):
                artifact.check_size(weights, head_from_config(config).state_dict())
        head = head_from_config(config, own)
        head.load_state_dict(artifact.read_weights(weights, head.state_dict()))
        return head.eval()

    def save_pretrained(self, folder: str | Path, *, card: str | None = None) -> Path:
        """Write config.json, model.safetensors and README.md in place of a head that lies in the folder.

        A certificate that was given to other weights is dropped with a warning.

        Args:
            folder: where to; made where it does not exist.
            card: text of README.md; None writes one from the config.

        Raises:
            InputError: the folder holds something that is no head, weights are not finite, or metadata is out of range.
        """
        folder = Path(folder)
        artifact.refuse_foreign(folder)
        problem = artifact.certificate_problem(self)
        if problem is not None:
            self.metadata = {name: value for name, value in self.metadata.items() if name != "certificate"}
            warnings.warn(f"head: {problem}; its certificate is dropped", stacklevel=2)
        artifact.write_artifact(folder, self.stored_config(), self.state_dict(), card)
        return folder


def head_from_config(config: Mapping[str, Any], own: type[DeferralHead] | None = None) -> DeferralHead:
    """Build the head that a stored config describes, with fresh weights.

    Args:
        config: content of config.json.
        own: class of the caller's, accepted where its ``head_type`` is the config's; None takes the class in
            :data:`HEADS`.

    Raises:
        InputError: an unknown type or version, a wrong field, or features whose schema is not the one recorded.
    """
    name, features, arguments = constructor_arguments(config)
    if own is not None and own.head_type != name:
        raise InputError(f"this folder holds a {name!r} head, not a {own.head_type!r} one")
    if own is None and name not in HEADS:
        raise InputError(
            f"deferral_head_type {name[:80]!r} is unknown; known: {', '.join(HEADS)}; for a class of your own name it: "
            "export --head_class MODULE.CLASS, or learned:head=FOLDER,class=MODULE.CLASS"
        )
    head = (own or HEADS[name])(features, **arguments)
    check_schema(config, [head.inputs.schema_of(version) for version in reversed(READABLE_VERSIONS)])
    head.metadata = stored_metadata(config)
    return head
