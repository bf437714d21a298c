"""Files of an exported head: config.json + model.safetensors + README.md in one folder, or the same on the Hub.

Knows dictionaries and tensors, no head class. Reading needs torch and safetensors alone. No pickle is read, and an
artifact can name neither code nor paths.

A folder holds one head. Its files are replaced together: all are written under hidden names, then one small file says
that they are complete, then they take their names. Whenever that is interrupted, the folder holds the head from before
or the new one, whole, and readers find it. Files that are not of a head are left alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from deferral_train.errors import InputError, MissingExtraError
from deferral_train.heads.card import make_card
from deferral_train.heads.config import read_config
from deferral_train.heads.fingerprint import weights_key
from deferral_train.provenance import json_bytes, naming, sha256, sync_folder, write_bytes, write_json

CONFIG, WEIGHTS, CARD, ONNX = "config.json", "model.safetensors", "README.md", "model.onnx"
COMPLETE = ".complete.json"  # says that all new files lie beside the old ones under hidden names
SLACK = 1 << 20  # bytes that a safetensors header may take


def write_artifact(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], card: str | None = None
) -> None:
    """Write config.json, model.safetensors and README.md in place of a head that lies in the folder.

    Args:
        folder: where to; made where it does not exist.
        config: content of config.json.
        tensors: weights by name.
        card: text of README.md; None writes one from the config.

    Raises:
        InputError: weights that are not finite.
    """
    refuse_not_finite(folder, tensors)
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    text = card if card is not None else make_card(config)
    replace_files(
        folder,
        {
            WEIGHTS: save(plain, metadata={"format": "pt"}),
            CARD: text.encode("utf-8"),
            CONFIG: json_bytes(config),
        },
        stale=(ONNX,),
    )


def read_artifact(folder: str | Path) -> tuple[dict[str, Any], Path]:
    """config.json, and the path of the weights, of a folder or of a hub id ``owner/name`` where no folder exists.

    Raises:
        InputError: no such folder or repository, or a config that cannot be read.
    """
    path = Path(folder) if Path(folder).is_dir() else _download(str(folder))
    return read_config(current_file(path, CONFIG)), current_file(path, WEIGHTS)


def replace_files(folder: Path, files: Mapping[str, bytes], stale: tuple[str, ...] = ()) -> None:
    """Put ``files`` in place of those of the same names, all or none of them.

    Args:
        stale: removed where the weights change: they were made of the ones before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    finish_replacing(folder)
    changed = (
        _digest_of(folder / WEIGHTS) != hashlib.sha256(files[WEIGHTS]).hexdigest()
        if WEIGHTS in files
        else False
    )
    try:
        for name, data in files.items():
            write_bytes(folder / _hidden(name), data)
        removed = [name for name in stale if changed and (folder / name).is_file()]
        write_json(folder / COMPLETE, {"files": sorted(files), "removed": removed})
    except OSError:
        for name in (*files, COMPLETE):
            with contextlib.suppress(OSError):
                (folder / (name if name == COMPLETE else _hidden(name))).unlink(missing_ok=True)
        raise
    finish_replacing(folder)


def finish_replacing(folder: Path) -> None:
    """Give complete new files their names; does nothing where none wait."""
    record = _complete(folder)
    if record is None:
        return
    for name in record["removed"]:
        (folder / name).unlink(missing_ok=True)
    for name in record["files"]:
        if (folder / _hidden(name)).is_file():
            with naming(folder / name):
                os.replace(folder / _hidden(name), folder / name)
    (folder / COMPLETE).unlink(missing_ok=True)
    sync_folder(folder)


def current_file(folder: Path, name: str) -> Path:
    """Where a head's file is to be read: under its hidden name while an interrupted replacement is complete."""
    hidden = folder / _hidden(name)
    return hidden if _complete(folder) is not None and hidden.is_file() else folder / name


def _complete(folder: Path) -> dict[str, Any] | None:
    """Record of an interrupted replacement, of our own file names alone."""
    try:
        record = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
        names = {name: [str(item) for item in record[name]] for name in ("files", "removed")}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    ours = {CONFIG, WEIGHTS, CARD, ONNX}
    return {key: [name for name in items if name in ours] for key, items in names.items()}


def _hidden(name: str) -> str:
    return f".{name}.new"


def _digest_of(path: Path) -> str | None:
    return sha256(path) if path.is_file() else None


def refuse_foreign(folder: Path) -> None:
    """Refuse a folder whose config.json or weights are not a head's: a model would be overwritten.

    Raises:
        InputError: names the folder.
    """
    if folder.is_file():
        raise InputError(f"out: {folder} is a file; name a folder")
    path = current_file(folder, CONFIG)
    if path.is_file():
        try:
            ours = "deferral_head_type" in json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, TypeError, RecursionError):
            ours = (folder / CARD).is_file()  # a damaged head may be written again
        if not ours:
            raise InputError(
                f"out: {folder} holds the {CONFIG} of something else than a head; name another folder"
            )
    elif (folder / WEIGHTS).is_file() and not (folder / CARD).is_file():
        raise InputError(f"out: {folder} holds {WEIGHTS} that are not of a head; name another folder")


def foreign_files(folder: str | Path) -> list[str]:
    """Names in a head folder that are not of a head and that nothing of ours wrote."""
    ours = {CONFIG, WEIGHTS, CARD, ONNX}
    return sorted(
        entry.name
        for entry in Path(folder).iterdir()
        if entry.name not in ours
        and not entry.name.endswith(".provenance.json")
        and not entry.name.startswith(".")
    )


def certificate_problem(head: Any) -> str | None:
    """Reason why the certificate in a head's metadata is of other weights or another setting of its dial; None where it
    is not, or there is none.

    Certificates of earlier releases do not say which weights they are about: they are believed.
    """
    metadata = getattr(head, "metadata", None) or {}
    certificate = metadata.get("certificate")
    if not isinstance(certificate, Mapping):
        return None
    dial = getattr(head, "dial", None)
    certified, now = certificate.get("value"), metadata.get(dial)
    if certificate.get("parameter") == dial and certified is not None and certified != now:
        return f"{dial} is {now}, the certified one {certified}"
    key = weights_key(head) if "weights" in certificate else None
    if key == certificate.get("weights"):
        return None
    return f"weights are {str(key)[:12]}, the certified ones {str(certificate['weights'])[:12]}"


def check_size(path: Path, expected: Mapping[str, torch.Tensor]) -> None:
    """Refuse a config that claims another size than the weights have, before that size is allocated."""
    wanted = sum(t.numel() * t.element_size() for t in expected.values())
    try:
        size = path.stat().st_size
    except OSError:
        raise InputError(f"{path} does not exist; the head folder is incomplete") from None
    if not wanted <= size <= wanted + SLACK:
        raise InputError(
            f"{path} has {size} bytes, but the tensors that config.json describes need {wanted}; "
            "it holds another head"
        )


def read_weights(path: Path, expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file, checked against those expected.

    Raises:
        InputError: an absent or damaged file, or tensors of another name, shape, type, or not finite.
    """
    check_size(path, expected)
    try:
        tensors = load(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; the head folder is incomplete") from None
    except (OSError, SafetensorError, ValueError, KeyError, OverflowError) as error:
        raise InputError(
            f"{path} is no readable safetensors file: {' '.join(str(error).split())[:200]}"
        ) from None
    check_tensors(path, tensors, expected)
    return tensors


def check_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> None:
    """Refuse tensors that are not those expected, by name, shape and type, or that are not finite."""
    if set(tensors) != set(expected):
        difference = ", ".join(sorted(set(tensors) ^ set(expected)))[:300]
        raise InputError(f"{path} does not fit config.json: tensors {difference} are absent or unexpected")
    for name, tensor in tensors.items():
        wanted = expected[name]
        if tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
            raise InputError(
                f"{path}: tensor {name!r} is {tensor.dtype} {list(tensor.shape)}, "
                f"config.json asks for {wanted.dtype} {list(wanted.shape)}"
            )
    refuse_not_finite(path, tensors)


def refuse_not_finite(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse weights that are NaN or infinite, by name: a head of them decides nothing that can be relied on."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise InputError(
                f"{path}: tensor {name!r} holds values that are not finite: training diverged; "
                "fit again with a lower lr"
            )


def _download(repo_id: str) -> Path:
    if repo_id.count("/") != 1 or repo_id.startswith((".", "/")):
        raise InputError(f"{repo_id!r} is neither a folder nor a hub id 'owner/name'")
    try:
        return Path(import_hub().snapshot_download(repo_id, allow_patterns=[CONFIG, WEIGHTS, CARD]))
    except MissingExtraError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"no folder {repo_id!r}, and the hub gave no head of that name: {reason}") from None


def import_hub() -> Any:
    """The module ``huggingface_hub``, or MissingExtraError that names the extra."""
    try:
        import huggingface_hub
    except ImportError:
        raise MissingExtraError("huggingface_hub", "train") from None
    return huggingface_hub
