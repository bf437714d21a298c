"""Train a pair: from scratch, or a drafter cut from an existing verifier; resumable; records what was seen."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from deferral_train import provenance
from deferral_train.errors import InputError
from deferral_train.pairs import overlap
from deferral_train.pairs.checkpoint import find_checkpoint, without_bars
from deferral_train.pairs.encode import encode_prompts
from deferral_train.pairs.fingerprint import checkpoint_fingerprint
from deferral_train.pairs.gate import GateResult, check_pair
from deferral_train.pairs.load import load_models, load_tokenizer
from deferral_train.pairs.prompts import Prompt
from deferral_train.pairs.scratch.batches import AnswerBatches, Batches, PairBatches, WindowBatches
from deferral_train.pairs.scratch.cut import ROLE, cut, open_verifier
from deferral_train.pairs.scratch.models import load_trained, new_model
from deferral_train.pairs.scratch.optimise import LoopSettings, Report, optimise
from deferral_train.pairs.scratch.tokenizer import QUESTION, train_tokenizer
from deferral_train.pairs.scratch.train_config import PairConfig, Schedule
from deferral_train.pairs.scratch.training_text import TrainingText, load_training_text

AGAIN = "--fresh trains anew"
RECORD = "pair.json"
# What a progress display is asked for: a report for one model's training, given its name and number of steps.
Progress = Callable[[str, int], Report]


@dataclass(frozen=True)
class PairResult:
    """A finished pair on disk. ``losses`` are training nats a token at the end, by role; ``reused`` says that
    nothing had to be trained."""

    drafter: Path
    verifier: Path
    training_ids: Path
    losses: dict[str, float]
    gate: GateResult
    reused: bool


def train_pair(
    config: PairConfig,
    out: str | Path,
    progress: Progress | None = None,
    fresh: bool = False,
    say: Callable[[str], None] | None = None,
) -> PairResult:
    """Train the pair that ``config`` describes into ``out/drafter`` and ``out/verifier``.

    Each folder is a transformers checkpoint with the tokenizer. Beside them: ``training_ids.json`` and
    ``pair.json`` (configuration, losses, held-out quality and cost). What is finished in ``out`` is kept;
    a model that was cut short continues from its checkpoint and ends with the same bits.

    Args:
        fresh: remove the pair that lies in ``out`` and start over.
        say: told in a line now and then how far the gate is; large models take minutes.

    Raises:
        InputError: unreadable text, a folder of another configuration or of other texts, a loss that is no longer
            finite.
    """
    with provenance.one_writer(out, "train-pair"):
        return _taken_up(config, Path(out), progress, fresh, say)


def _taken_up(
    config: PairConfig,
    out: Path,
    progress: Progress | None,
    fresh: bool,
    say: Callable[[str], None] | None,
) -> PairResult:
    if fresh:
        for name in ("drafter", "verifier", "work"):
            shutil.rmtree(out / name, ignore_errors=True)
        (out / RECORD).unlink(missing_ok=True)
    finished = _finished(config, out)
    if finished is not None:
        return finished
    provenance.write_json(out / "work" / "config.json", made_from(config) | asdict(config))
    before = torch.get_num_threads()
    if config.threads:
        torch.set_num_threads(config.threads)
    try:
        return _train(config, out, progress, say)
    finally:
        torch.set_num_threads(before)


def made_from(config: PairConfig) -> dict[str, Any]:
    """The facts that decide the weights: hash of the settings, contents of the texts.

    The interpreter's own sources are its version.
    """
    named = {
        "files": config.text.files,
        "targets": config.text.targets,
        "heldout": config.text.heldout,
        "heldout_targets": config.text.heldout_targets,
    }
    texts: dict[str, Any] = {
        f"{name}.{place}": {"path": file, "content": provenance.content_key(file)}
        for name, files in named.items()
        for place, file in enumerate(files)
        if file != "stdlib"
    }
    if config.from_verifier is not None:
        key = provenance.content_key(config.from_verifier)
        texts["from_verifier"] = {"path": config.from_verifier, "content": key}
    if "stdlib" in config.text.files:
        texts["python"] = platform.python_version()
    return {"outcome": config.outcome_hash(), "texts": texts}


def _finished(config: PairConfig, out: Path) -> PairResult | None:
    """The stored result; refuses a folder that another configuration or other texts began."""
    now = made_from(config)
    for path in (out / RECORD, out / "work" / "config.json"):
        record = provenance.read_object(path, AGAIN)
        if record is None:
            continue
        if record.get("outcome") != now["outcome"]:
            raise InputError(
                f"{out}: holds a pair of another configuration; choose another folder, or --fresh to start over"
            )
        before = None if "texts" not in record else {name: record[name] for name in now}
        provenance.refuse_reuse(out, before, now, "choose another folder, or --fresh to train anew")
    record = provenance.read_object(out / RECORD, AGAIN)
    if record is None:
        return None
    try:
        _refuse_others(out, record["fingerprints"])
        return _result(out, record["losses"], GateResult(**record["gate"]), reused=True)
    except (KeyError, TypeError) as error:
        raise InputError(f"{out / RECORD} is damaged ({error}); --fresh trains anew") from None


def _refuse_others(out: Path, recorded: Mapping[str, Any]) -> None:
    """Refuse models that are not those that were trained here and measured: gone, or trained on in their folder."""
    for role in ("drafter", "verifier"):
        try:
            now = checkpoint_fingerprint(out / role)
        except (OSError, ValueError) as error:
            raise InputError(f"{out / role} cannot be read ({str(error)[:100]}); {AGAIN}") from None
        if any(now[name] != recorded[role][name] for name in ("config", "weights")):
            raise InputError(f"{out / role} holds another model than the one that was trained there; {AGAIN}")


def _result(out: Path, losses: dict[str, float], gate: GateResult, reused: bool) -> PairResult:
    return PairResult(out / "drafter", out / "verifier", out / overlap.FILE, losses, gate, reused)


def _train(
    config: PairConfig, out: Path, progress: Progress | None, say: Callable[[str], None] | None
) -> PairResult:
    text = load_training_text(config.text)
    overlap.write_training_ids(out / overlap.FILE, text.train)
    tokenizer = _tokenizer(config, out / "work" / "tokenizer", text)
    batched = _encoded(config, tokenizer, text.train)
    batches = {
        role: batched(schedule.batch, config.seed + offset)
        for offset, (role, schedule) in enumerate(_schedules(config).items())
    }
    if config.from_verifier is None:
        losses = {
            "verifier": _one_model("verifier", config, out, tokenizer, batches["verifier"], None, progress)
        }
        teacher = load_trained(config, out / "verifier") if config.drafter_schedule.distil else None
    else:
        losses, teacher = {}, open_verifier(config.from_verifier)
        if not (out / "verifier").is_dir():
            _publish(out / "verifier", teacher, tokenizer)
        teacher = teacher.float()
    losses["drafter"] = _one_model("drafter", config, out, tokenizer, batches["drafter"], teacher, progress)
    pair = load_models(out / "drafter", out / "verifier", device="cpu", dtype="float32")
    gate = check_pair(pair, text.heldout, context=config.context, say=say)
    record = {
        "schema_version": 1,
        **made_from(config),
        "config": asdict(config),
        "losses": losses,
        "gate": asdict(gate),
        "fingerprints": pair.fingerprints,
        "provenance": provenance.collect({"seed": config.seed}),
    }
    provenance.write_json(out / RECORD, record)
    shutil.rmtree(out / "work", ignore_errors=True)
    return _result(out, losses, gate, reused=False)


def _schedules(config: PairConfig) -> dict[str, Schedule]:
    return {"verifier": config.verifier_schedule, "drafter": config.drafter_schedule}


def _kept_loss(path: Path) -> float:
    """Closing loss of a model that is finished while its pair is not."""
    try:
        return float((provenance.read_object(path, AGAIN) or {})["loss"])
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{path} is damaged (no loss); {AGAIN}") from None


def _one_model(
    role: str,
    config: PairConfig,
    out: Path,
    tokenizer: Any,
    batches: Batches,
    teacher: Any,
    progress: Progress | None,
) -> float:
    """Train and publish one model unless it is there; returns its closing training loss."""
    kept = out / "work" / f"{role}.json"
    if (out / role).is_dir() and kept.is_file():
        return _kept_loss(kept)
    schedule = _schedules(config)[role]
    if config.from_verifier is None:
        model = new_model(config, role, tokenizer)
    else:
        model = cut(teacher, config.kept_layers).requires_grad_(True)
    settings = LoopSettings(
        checkpoint=out / "work" / f"{role}.pt",
        outcome=config.outcome_hash(),
        seed=config.seed,
        autocast=config.autocast,
        checkpoint_seconds=config.checkpoint_seconds,
    )
    report = progress(role, schedule.steps) if progress else None
    loss = optimise(model, batches, schedule, settings, teacher, report)
    provenance.write_json(kept, {"loss": loss})
    _publish(out / role, model, tokenizer)
    settings.checkpoint.unlink(missing_ok=True)
    return loss


def _publish(folder: Path, *parts: Any) -> None:
    """``save_pretrained`` of all parts into ``folder``, which appears only when it is complete."""
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        with without_bars():
            for part in parts:
                part.save_pretrained(unfinished)
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise InputError(f"{folder}: cannot be written ({error}); free some space and run again") from error
    for file in unfinished.iterdir():
        provenance.sync_folder(file)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    provenance.sync_folder(folder.parent)


def _tokenizer(config: PairConfig, folder: Path, text: TrainingText) -> Any:
    if config.from_verifier is not None:
        return load_tokenizer(find_checkpoint(config.from_verifier, ROLE), ROLE)
    if not folder.is_dir():
        texts = (side for item in text.train for side in (item.prompt, item.reference) if side)
        template = QUESTION if config.text.answers else None
        _publish(folder, train_tokenizer(texts, config.vocab_size, config.kind == "t5", template))
    return load_tokenizer(folder)


def _encoded(config: PairConfig, tokenizer: Any, texts: Sequence[Prompt]) -> Callable[[int, int], Batches]:
    """Encode the texts once; the result makes batches of a given size and seed."""
    if config.kind == "t5":
        sources = _encode(tokenizer, [text.prompt for text in texts], config.context)
        targets = _encode(tokenizer, [text.reference or "" for text in texts], config.context)
        return partial(PairBatches, sources, targets, tokenizer.pad_token_id)
    if config.text.answers:
        # As they are encoded wherever the pair is used; what does not fit into the context is left out.
        kept = [
            row
            for row in encode_prompts(tokenizer, texts, require_reference=True).kept
            if len(row.input_ids) + len(row.reference_ids) <= config.context
        ]
        if not kept:
            raise InputError(
                f"text.answers: no question with its answer fits into context={config.context}; raise it"
            )
        sources, targets = [row.input_ids for row in kept], [row.reference_ids for row in kept]
        return partial(AnswerBatches, sources, targets, tokenizer.pad_token_id)
    stream: list[int] = []
    for ids in _encode(tokenizer, [text.prompt for text in texts], None):
        stream += [*ids, tokenizer.eos_token_id]
    return partial(WindowBatches, torch.tensor(stream, dtype=torch.int32), config.context)


def _encode(tokenizer: Any, texts: list[str], longest: int | None) -> list[list[int]]:
    rows = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
    return [row if longest is None or len(row) <= longest else [*row[: longest - 1], row[-1]] for row in rows]
