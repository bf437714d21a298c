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


def file_fingerprint(path: str | Path) -> dict[str, Any]:
    """The same of one file that holds config and weights (GGUF), or weights alone (an adapter's)."""
    path = Path(path)
    weights = provenance.hash_of([[path.name, _sampled(path)]])
    return {"name": path.resolve().name, "revision": None, "config": None, "weights": weights}


def model_facts(model: Any) -> dict[str, Any]:
    """Type and size of a loaded model, for tables: ``{"model_type", "parameters"}``."""
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
    """SHA-256 over a file's size, header and ``SAMPLES`` evenly spread stretches of its data.

    The header of a safetensors file is as long as its first eight bytes say; of another file it is one stretch.
    """
    digest = hashlib.sha256()
    size = path.stat().st_size
    with open(path, "rb") as file:
        header = (
            min(int.from_bytes(file.read(8), "little"), size) if path.suffix == ".safetensors" else STRETCH
        )
        digest.update(str(size).encode())
        digest.update(file.read(header))
        first = 8 + header
        for sample in range(SAMPLES):
            file.seek(first + (size - first) * sample // SAMPLES)
            digest.update(file.read(STRETCH))
    return digest.hexdigest()
