"""The training loop of one model: plain torch, and the same bits with or without an interruption."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deferral_train import provenance
from deferral_train.errors import InputError
from deferral_train.pairs.padding import IGNORED, next_token_logits
from deferral_train.pairs.scratch.alignable import alignable, draft_weights
from deferral_train.pairs.scratch.batches import Batches
from deferral_train.pairs.scratch.muon import Muon
from deferral_train.pairs.scratch.train_config import Schedule

Report = Callable[[int, int, float], None]  # steps done, tokens of the last step, its loss


@dataclass(frozen=True)
class LoopSettings:
    """Settings of the training loop besides model, batches and schedule.

    ``outcome`` ties a checkpoint to its config.
    """

    checkpoint: Path
    outcome: str
    seed: int = 0
    autocast: bool = False
    checkpoint_seconds: float = 20.0


def optimise(
    model: Any,
    batches: Batches,
    schedule: Schedule,
    settings: LoopSettings,
    teacher: Any = None,
    report: Report | None = None,
) -> float:
    """Train ``model`` in place and return the mean loss (nats a token) of the last tenth of the steps.

    Batches, dropout and rates depend on the step alone, and a checkpoint holds weights, optimiser state
    and step; a run that was killed and started again therefore ends with bitwise the weights of one that
    was not.

    Args:
        teacher: verifier whose distribution the drafter is drawn to with weight ``schedule.distil``.
        report: called after every step.

    Raises:
        InputError: the checkpoint is of another configuration, or the loss is no longer finite.
    """
    optimizers = _optimizers(model, schedule)
    step, losses = _resume(settings, model, optimizers)
    saved = time.monotonic()
    model.train()
    with torch.random.fork_rng(devices=[]):
        while step < schedule.steps:
            torch.manual_seed((settings.seed * 7_368_787 + step) % 2**63)
            _set_rate(optimizers, schedule, step)
            shallow = schedule.shallow_layers if step < schedule.shallow_steps else 0
            with first_layers(model, shallow) if shallow else nullcontext():
                loss, tokens = _step(model, batches.batch(step), optimizers, schedule, settings, teacher)
            step += 1
            losses = [*losses, loss][-max(1, schedule.steps // 10) :]
            if not math.isfinite(loss):
                raise InputError(
                    f"training: loss is {loss} at step {step}; lower learning_rate or embedding_rate"
                )
            if report is not None:
                report(step, tokens, loss)
            if time.monotonic() - saved > settings.checkpoint_seconds and step < schedule.steps:
                _save(settings, model, optimizers, step, losses)
                saved = time.monotonic()
    model.eval()
    return sum(losses) / len(losses)


def _step(
    model: Any,
    batch: Mapping[str, Any],
    optimizers: Sequence[torch.optim.Optimizer],
    schedule: Schedule,
    settings: LoopSettings,
    teacher: Any,
) -> tuple[float, int]:
    precision = torch.autocast("cpu", torch.bfloat16) if settings.autocast else nullcontext()
    labels = batch["labels"].flatten()
    with precision:
        logits = next_token_logits(model, batch).flatten(0, 1).float()
        text_loss = loss = F.cross_entropy(logits, labels, ignore_index=IGNORED)
        if teacher is not None and schedule.distil > 0:
            with torch.no_grad():
                distribution = next_token_logits(teacher, batch).flatten(0, 1).float().log_softmax(-1)
            divergence = F.kl_div(
                logits.log_softmax(-1), distribution, reduction="none", log_target=True
            ).sum(-1)
            weights = _distillation_weights(logits.detach(), batch["labels"], schedule)
            divergence = (weights * divergence).sum() / weights.sum()
            loss = (1 - schedule.distil) * loss + schedule.distil * divergence
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return text_loss.item(), int((labels != IGNORED).sum())


def _distillation_weights(logits: Tensor, labels: Tensor, schedule: Schedule) -> Tensor:
    """[B * T]: 1 at every label, or under the alignable mask the number of drafts that reach it."""
    inside = labels != IGNORED
    if not schedule.alignable_top_k:
        return inside.flatten().float()
    reachable = alignable(logits.view(*labels.shape, -1), labels, schedule.alignable_top_k)
    return draft_weights(reachable, inside, schedule.draft_window).flatten()


@contextmanager
def first_layers(model: Any, count: int) -> Iterator[None]:
    """Inside, a pass runs the first ``count`` layers of every stack alone; the weights of the others stay."""
    stacks = [
        (part, name, layers)
        for part in model.modules()
        for name in ("layers", "block")  # of decoders as Llama's, and of T5's two stacks
        if isinstance(layers := getattr(part, name, None), torch.nn.ModuleList)
    ]
    try:
        for part, name, layers in stacks:
            setattr(part, name, layers[:count])
        yield
    finally:
        for part, name, layers in stacks:
            setattr(part, name, layers)


def _optimizers(model: Any, schedule: Schedule) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for matrices where it is asked for.

    Embeddings learn ``embedding_rate`` times faster, since each row is seen in few batches.
    """
    embeddings = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    groups: dict[str, list[Tensor]] = {"embeddings": [], "matrices": [], "vectors": []}
    for parameter in model.parameters():
        kind = (
            "embeddings" if id(parameter) in embeddings else "matrices" if parameter.dim() > 1 else "vectors"
        )
        groups[kind].append(parameter)
    rate, decay = schedule.learning_rate, schedule.weight_decay
    matrices = {"params": groups["matrices"], "weight_decay": decay}
    settings: list[dict[str, Any]] = [
        {
            "params": groups["embeddings"],
            "peak": rate * schedule.embedding_rate,
            "weight_decay": 0.0,
            "eps": schedule.embedding_eps,
        },
        {"params": groups["vectors"], "peak": rate, "weight_decay": 0.0},
    ]
    if not schedule.muon_rate:
        settings.insert(1, {**matrices, "peak": rate})
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(settings, lr=rate, betas=(0.9, 0.98), fused=True)
    ]
    if schedule.muon_rate:
        optimizers.append(Muon([{**matrices, "peak": schedule.muon_rate}], lr=schedule.muon_rate))
    return optimizers


def _set_rate(optimizers: Sequence[torch.optim.Optimizer], schedule: Schedule, step: int) -> None:
    if step < schedule.warmup:
        share = (step + 1) / schedule.warmup
    else:
        done = (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup)
        share = schedule.final_rate + (1 - schedule.final_rate) * 0.5 * (1 + math.cos(math.pi * done))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * share


def _save(
    settings: LoopSettings,
    model: Any,
    optimizers: Sequence[torch.optim.Optimizer],
    step: int,
    losses: list[float],
) -> None:
    state = {
        "outcome": settings.outcome,
        "step": step,
        "losses": losses,
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    provenance.write_bytes(settings.checkpoint, buffer.getvalue())


def _resume(
    settings: LoopSettings, model: Any, optimizers: Sequence[torch.optim.Optimizer]
) -> tuple[int, list[float]]:
    if not settings.checkpoint.is_file():
        return 0, []
    try:
        state = torch.load(settings.checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"{settings.checkpoint}: not a readable checkpoint ({error}); delete it") from error
    if state["outcome"] != settings.outcome:
        raise InputError(
            f"{settings.checkpoint}: of another configuration; choose another folder or delete this one"
        )
    if "optimizers" not in state:
        raise InputError(f"{settings.checkpoint}: not a readable checkpoint (of another release); delete it")
    model.load_state_dict(state["model"])
    for optimizer, stored in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(stored)
    return int(state["step"]), list(state["losses"])
