"""Short stable names for a checkpoint and a tokenizer, quick even on many gigabytes of weights.

A model's fingerprint covers its config, every tensor's name, type, shape and place (the safetensors
header) and sampled stretches of bytes of each file; a fine-tuned copy differs in all of the stretches.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from deferral_train import provenance

# Written anew by each version of transformers without any change to the model.
VOLATILE = frozenset(
    {"transformers_version", "_name_or_path", "name_or_path", "dtype", "torch_dtype", "use_cache"}
)
DECIDING = frozenset({".safetensors", ".json", ".model", ".txt", ".jinja"})
SAMPLES, STRETCH = 32, 4096  # stretches per file, bytes per stretch


def checkpoint_fingerprint(folder: str | Path) -> dict[str, Any]:
    """``{"name", "revision", "config", "weights"}`` of a local checkpoint folder.

    ``config`` and ``weights`` are hashes; ``revision`` is the hub's commit where the folder is a cached
    snapshot of the hub, else None.

    Args:
        folder: a checkpoint as ``save_pretrained`` writes it, weights in safetensors (one file or several).
    """
    folder = Path(folder)
    files = sorted(folder.glob("*.safetensors"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stable = {key: value for key, value in config.items() if key not in VOLATILE}
    name, commit = _hub_name(folder)
    return {
        "name": name,
        "revision": commit,
        "config": provenance.hash_of(stable),
        "weights": provenance.hash_of([[file.name, _sampled(file)] for file in files]),
    }


def checkpoint_key(folder: str | Path) -> str:
    """Content key of the files of a checkpoint that decide what its model and tokenizer do.

    Unlike :func:`checkpoint_fingerprint`, which names a model for good and in any copy, it sees every byte of files up
    to :data:`provenance.HASHED_BYTES`.
    """
    files = sorted(file for file in Path(folder).iterdir() if file.suffix in DECIDING and file.is_file())
    keys = [[file.name, provenance.content_key(file)] for file in files if "provenance" not in file.name]
    return provenance.hash_of(keys)


def model_facts(model: Any) -> dict[str, Any]:
    """What a loaded model is, for tables: ``{"model_type", "parameters"}``."""
    return {
        "model_type": model.config.model_type,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of everything that turns text to ids and back: vocabulary, special tokens, template, pipeline."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "special": sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items()),
        "pipeline": None if backend is None else _pipeline(json.loads(backend.to_str())),
        "chat_template": getattr(tokenizer, "chat_template", None),
    }
    return provenance.hash_of(content)


def _pipeline(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Truncation and padding are settings of a call, not of the tokenizer; the vocabulary is hashed apart."""
    kept = {key: value for key, value in tokenizer.items() if key not in {"truncation", "padding"}}
    kept["model"] = {key: value for key, value in (tokenizer.get("model") or {}).items() if key != "vocab"}
    return kept


def _hub_name(folder: Path) -> tuple[str, str | None]:
    """Name and commit of ``.../models--org--name/snapshots/<commit>``; of any other folder its name alone."""
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/"), folder.name
    return folder.resolve().name, None


def _sampled(path: Path) -> str:
    """SHA-256 over a safetensors file's header, size and ``SAMPLES`` evenly spread stretches of its data."""
    digest = hashlib.sha256()
    size = path.stat().st_size
    with open(path, "rb") as file:
        header = min(int.from_bytes(file.read(8), "little"), size)
        digest.update(str(size).encode())
        digest.update(file.read(header))
        first = 8 + header
        for sample in range(SAMPLES):
            file.seek(first + (size - first) * sample // SAMPLES)
            digest.update(file.read(STRETCH))
    return digest.hexdigest()
