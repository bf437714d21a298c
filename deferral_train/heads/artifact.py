"""The exported head: config.json + model.safetensors + README.md in one folder, or the same on the Hub.

Loading needs torch and safetensors alone. No pickle is read, and an artifact can name neither code nor paths.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from deferral_train.errors import InputError, MissingExtraError
from deferral_train.heads.base import DeferralHead
from deferral_train.heads.card import make_card
from deferral_train.heads.config import FORMAT_VERSION, METADATA, head_from_config, read_config
from deferral_train.provenance import write_bytes, write_json, write_text

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
SLACK = 1 << 20  # bytes that a safetensors header may take


def full_config(head: DeferralHead) -> dict[str, Any]:
    """The head's config with what marks and explains the artifact: version, ``"lossy": true``, metadata."""
    unknown = sorted(set(head.metadata) - set(METADATA))
    if unknown:
        raise InputError(f"head metadata {', '.join(unknown)} is unknown; known: {', '.join(METADATA)}")
    return {"format_version": FORMAT_VERSION, "lossy": True, **head.config, **head.metadata}


def save_head(head: DeferralHead, folder: str | Path, card: str | None = None) -> Path:
    """Write the three files; config.json is written last, so that a folder without it is not a head."""
    folder = Path(folder)
    config = full_config(head)
    refuse_not_finite(folder, head.state_dict())
    (folder / CONFIG).unlink(missing_ok=True)
    tensors = {name: t.detach().cpu().contiguous() for name, t in head.state_dict().items()}
    write_bytes(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    write_text(folder / CARD, card if card is not None else make_card(config))
    write_json(folder / CONFIG, config)
    return folder


def load_head(folder: str | Path, cls: type[DeferralHead] | None = None) -> DeferralHead:
    """Head in evaluation mode from a folder or, where no such folder exists, from a hub id ``owner/name``.

    Raises InputError with one line where a file is absent, malformed, of another schema, or holds tensors
    that do not fit the config.
    """
    path = Path(folder) if Path(folder).is_dir() else _download(str(folder))
    config = read_config(path / CONFIG)
    if cls is None:  # a class of one's own may not build on the meta device
        with torch.device("meta"):
            _check_size(path / WEIGHTS, head_from_config(config).state_dict())
    head = head_from_config(config, cls)
    _load_weights(head, path / WEIGHTS)
    return head.eval()


def _check_size(path: Path, expected: Mapping[str, torch.Tensor]) -> None:
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


def _load_weights(head: DeferralHead, path: Path) -> None:
    expected = head.state_dict()
    _check_size(path, expected)
    try:
        tensors = load(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; the head folder is incomplete") from None
    except (OSError, SafetensorError, ValueError, KeyError, OverflowError) as error:
        raise InputError(
            f"{path} is no readable safetensors file: {' '.join(str(error).split())[:200]}"
        ) from None
    check_tensors(path, tensors, expected)
    head.load_state_dict(tensors)


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


def set_operating_point(
    folder: str | Path, alpha: float, certificate: Mapping[str, Any] | None = None
) -> None:
    """Write a chosen alpha (a judge head's threshold) and its certificate into an exported head and renew its card."""
    head = load_head(folder)
    dial = "threshold" if head.head_type == "judge" else "alpha"
    head.metadata = {**head.metadata, dial: float(alpha)}
    head.metadata.pop("certificate", None)
    if certificate is not None:
        head.metadata["certificate"] = dict(certificate)
    save_head(head, folder)


def push_to_hub(head: DeferralHead, folder: str | Path, repo_id: str, token: str | None = None) -> str:
    """Save to ``folder`` and upload its files to ``repo_id``; returns the address. Needs huggingface_hub.

    Raises InputError where the hub refuses: no such name, no token, a token that may not write, no network.
    """
    hub = _hub()
    save_head(head, folder)
    api = hub.HfApi(token=token)
    patterns = [CONFIG, WEIGHTS, CARD, "*.onnx"]
    try:
        api.create_repo(repo_id, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=str(folder), allow_patterns=patterns))
    except Exception as error:  # refusals, no network, a bad name: each its own class
        raise InputError(
            f"{repo_id}: the hub did not take the head ({' '.join(str(error).split())[:160]}); "
            f"the files are in {folder}; check the name and that the token may write"
        ) from None


def _download(repo_id: str) -> Path:
    if repo_id.count("/") != 1 or repo_id.startswith((".", "/")):
        raise InputError(f"{repo_id!r} is neither a folder nor a hub id 'owner/name'")
    try:
        return Path(_hub().snapshot_download(repo_id, allow_patterns=[CONFIG, WEIGHTS, CARD]))
    except MissingExtraError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"no folder {repo_id!r}, and the hub gave no head of that name: {reason}") from None


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise MissingExtraError("huggingface_hub", "train") from None
    return huggingface_hub
