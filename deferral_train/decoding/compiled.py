"""A model's short passes in static shapes: captured in CUDA graphs, or compiled by torch.

On an accelerator the pass of a small model over one token is bound by launching kernels. Here a pass has one shape for
the whole call (S slots, C columns, both rounded up so that later calls find it again), reads and writes fixed buffers,
and never asks the device for a value. On CUDA it is recorded once as a CUDA graph and replayed; a backend of
``torch.compile`` may fuse it first.

:mod:`deferral_train.decoding.static_shelf` keeps what is built.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    DynamicCache,
    EncoderDecoderCache,
)
from transformers.modeling_outputs import BaseModelOutput

from deferral_train.decoding.facts import facts_of
from deferral_train.decoding.hidden import HiddenTap
from deferral_train.decoding.static_cache import CrossCache, SlotCache, encoder_decoder
from deferral_train.decoding.static_masks import additive, cross_mask, positions_of, self_masks
from deferral_train.decoding.static_shape import Shape
from deferral_train.decoding.static_support import NotStaticError, first_attention, identity_of, windows_of


@dataclass
class Buffers:
    """Input of the passes of one width.

    Attributes:
        ids: [S, W] tokens.
        columns: [S, W] the columns that they are written to.
    """

    ids: Tensor
    columns: Tensor


class StaticModel:
    """The passes of one model in one shape.

    Args:
        model: not kept; every call gives it again.
        shape: what to build.

    Attributes:
        pads: [S] padding columns on the left of each slot's prompt.
        seen_states: [S, 1, 1, E] additive mask over encoder states, or None.
        hidden: [S, W, D] hidden states of the latest pass, where asked for.

    Raises:
        NotStaticError: the model cannot be run, compiled or captured so.
    """

    def __init__(self, model: Any, shape: Shape) -> None:
        device = model.device
        self.shape, self.tap = shape, HiddenTap()
        self.identity = identity_of(model)
        # Plain values: what a compiled pass reads is guarded, and a registry of models would be too.
        facts = facts_of(model)
        self.takes_keep, self.context, self.windows = facts.takes_keep, facts.context, windows_of(model)
        first = _one_pass(model)
        own = first.self_attention_cache if isinstance(first, EncoderDecoderCache) else first
        self.cache = SlotCache(shape.slots, shape.columns, own, device)
        self.past: Any = self.cache
        self.cross: CrossCache | None = None
        self.seen_states: Tensor | None = None
        if isinstance(first, EncoderDecoderCache):
            self.cross = CrossCache(shape.slots, shape.states, first.cross_attention_cache)
            self.past = encoder_decoder(self.cache, self.cross)
            self.seen_states = cross_mask(shape.slots, shape.states, model.dtype, device)
        self.pads = torch.zeros(shape.slots, dtype=torch.long, device=device)
        self.buffers = {
            width: Buffers(_zeros(shape.slots, width, device), _zeros(shape.slots, width, device))
            for width in {width for width, _ in shape.passes}
        }
        self.hidden: Tensor | None = None
        self._graphs: list[Any] = []
        pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        with self.hooked(model):
            self._run = {pass_: self._built(model, pass_, pool) for pass_ in shape.passes}

    @property
    def description(self) -> str:
        """What was built, in words."""
        how = "" if self.shape.backend == "static" else f", torch.compile ({self.shape.backend})"
        return f"static{how}{', CUDA graphs' if self._graphs else ''}"

    @contextlib.contextmanager
    def hooked(self, model: Any) -> Iterator[None]:
        """Read the decoder's output while open, where hidden states are asked for."""
        if not self.shape.hidden:
            yield
            return
        handle = model.get_decoder().register_forward_hook(self.tap)
        try:
            yield
        finally:
            handle.remove()

    def run(self, model: Any, width: int, keep: int) -> Tensor:
        """One pass over what lies in ``buffers[width]``: logits [S, keep, V] that the next pass may overwrite."""
        logits, self.hidden = self._run[width, keep](model)
        return logits

    def show_states(self, index: Tensor, count: int, mask: Tensor | None) -> None:
        """The slots ``index`` see the first ``count`` encoder states, of which ``mask`` [b, count] hides some."""
        if self.seen_states is None:
            return
        seen = torch.zeros(len(index), self.shape.states, dtype=torch.bool, device=index.device)
        seen[:, :count] = True if mask is None else mask.bool()
        self.seen_states[index] = additive(seen, self.seen_states.dtype)[:, None, None]

    def _built(
        self, model: Any, pass_: tuple[int, int], pool: Any
    ) -> Callable[[Any], tuple[Tensor, Tensor | None]]:
        width, keep = pass_
        inputs = self.buffers[width]
        run = _compiled(self.shape.backend)

        def once(model: Any) -> tuple[Tensor, Tensor | None]:
            self.cache.places.columns = inputs.columns
            return run(model, self, inputs.ids, keep)

        try:
            once(model)
            return _captured(once, model, self._graphs, pool) if pool is not None else once
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # Whatever a backend, a driver or a model's own code raises means the same here.
            lines = str(error).strip().splitlines() or [""]
            raise NotStaticError(
                f"fails in static shapes: {type(error).__name__}: {lines[0][:200]}"
            ) from error


def static_pass(model: Any, static: StaticModel, ids: Tensor, keep: int) -> tuple[Tensor, Tensor | None]:
    """One pass over ``ids`` [S, W]: logits of the last ``keep`` columns and, where asked for, hidden states.

    Nothing here depends on a value that lies on the device.
    """
    columns = static.cache.places.columns
    attention = first_attention(model) if static.cross is not None else None
    masks = self_masks(columns, static.pads, static.shape.columns, model.dtype, static.windows, attention)
    arguments: dict[str, Any] = {"logits_to_keep": keep} if static.takes_keep else {}
    if static.cross is not None:
        # Cross-attention reads its own cache: of the states only the number of rows is looked at.
        states = torch.zeros((), dtype=model.dtype, device=ids.device).expand(
            len(ids), 1, model.config.hidden_size
        )
        arguments |= {
            "decoder_input_ids": ids,
            "decoder_attention_mask": masks,
            "encoder_outputs": BaseModelOutput(last_hidden_state=states),
            "attention_mask": static.seen_states,
        }
    else:
        positions = positions_of(columns, static.pads, static.context)
        arguments |= {"input_ids": ids, "attention_mask": masks, "position_ids": positions}
    logits = model(**arguments, past_key_values=static.past, use_cache=True, return_dict=True).logits
    return logits[:, -keep:], static.tap.states if static.shape.hidden else None


def _compiled(backend: str) -> Callable[..., Any]:
    if backend == "static":
        return static_pass
    options: dict[str, Any] = {"backend": backend, "fullgraph": True, "dynamic": False}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        options["isolate_recompiles"] = (
            True  # every shape is a compilation of its own, not one too many of another
        )
    return torch.compile(static_pass, **options)


def _captured(
    once: Callable[[Any], tuple[Tensor, Tensor | None]], model: Any, graphs: list[Any], pool: Any
) -> Callable[[Any], tuple[Tensor, Tensor | None]]:
    """Record a pass as a CUDA graph: warmed up on a stream of its own, as capturing asks for."""
    device = model.device
    with torch.cuda.device(device):
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                once(model)
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = once(model)
    graphs.append(graph)

    def replay(model: Any) -> tuple[Tensor, Tensor | None]:
        graph.replay()
        return result

    return replay


def _zeros(slots: int, width: int, device: torch.device) -> Tensor:
    return torch.zeros(slots, width, dtype=torch.long, device=device)


def _one_pass(model: Any) -> Any:
    """An ordinary cache after one token of one row, for shapes and types."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    if not model.config.is_encoder_decoder:
        past: Any = DynamicCache(config=model.config.get_text_config(decoder=True))
        model(input_ids=ids, past_key_values=past, use_cache=True, return_dict=True)
        return past
    past = EncoderDecoderCache(DynamicCache(), DynamicCache())
    states = torch.zeros(1, 1, model.config.hidden_size, dtype=model.dtype, device=model.device)
    outputs = BaseModelOutput(last_hidden_state=states)
    model(
        decoder_input_ids=ids, encoder_outputs=outputs, past_key_values=past, use_cache=True, return_dict=True
    )
    return past
