"""Checkpoints as people have them: a folder of safetensors, a ``.gguf`` file, or a PEFT adapter and its base.

Nothing in a checkpoint is executed: weights are safetensors or GGUF, and an adapter's config may not name a module.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deferral_train import provenance
from deferral_train.errors import InputError, MissingExtraError
from deferral_train.heads.fingerprint import rule_key, weights_key
from deferral_train.heads.rules import rule_from_spec
from deferral_train.pairs.fingerprint import checkpoint_fingerprint, file_fingerprint

DECIDING = frozenset({".json", ".model", ".txt", ".jinja"})  # besides weights: configs, vocabulary, template
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """Where a model lies.

    Attributes:
        role: ``drafter`` or ``verifier``, for messages.
        folder: of config.json and weights; of an adapter, its base's; of a GGUF file, the one that it lies in.
        gguf: name of the GGUF file in ``folder``.
        adapter: folder of a PEFT adapter for the model in ``folder``.
    """

    role: str
    folder: Path
    gguf: str | None = None
    adapter: Path | None = None

    @property
    def path(self) -> Path:
        """The path that the user named: the adapter's folder, the GGUF file or the folder."""
        return self.adapter or (self.folder / self.gguf if self.gguf else self.folder)

    @property
    def source(self) -> dict[str, Any]:
        """Arguments that tell transformers' ``from_pretrained`` where to read."""
        where: dict[str, Any] = {"pretrained_model_name_or_path": self.folder}
        return where | ({"gguf_file": self.gguf} if self.gguf else {})

    def fingerprint(self) -> dict[str, Any]:
        """Name, revision and hashes; an adapter's own weights are part of them."""
        if self.gguf:
            return file_fingerprint(self.folder / self.gguf)
        found = checkpoint_fingerprint(self.folder)
        if self.adapter is None:
            return found
        return found | {"adapter": file_fingerprint(self.adapter / ADAPTER_WEIGHTS)["weights"]}

    @property
    def content(self) -> str:
        """Content key of the files that decide what model and tokenizer do, an adapter's and its base's.

        Unlike :meth:`fingerprint`, which names a model for good and in any copy, it sees every byte of files up to
        :data:`provenance.HASHED_BYTES`.
        """
        folders = [self.folder] if self.adapter is None else [self.folder, self.adapter]
        files = sorted(file for folder in folders for file in folder.iterdir() if self._decides(file))
        return provenance.hash_of([[file.name, provenance.content_key(file)] for file in files])

    def _decides(self, file: Path) -> bool:
        if not file.is_file() or "provenance" in file.name:
            return False
        if file.suffix in (".safetensors", ".gguf"):
            return self.gguf in (None, file.name)
        return file.suffix in DECIDING


def find_checkpoint(name: str | Path, role: str) -> Checkpoint:
    """The checkpoint that a folder, a ``.gguf`` file or a hub id names; what the hub has is fetched first.

    Raises:
        InputError: no such folder, no checkpoint in it, a library that is not installed, an adapter without a base, or
            the hub has no such model or is out of reach.
    """
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(
                f"{role}: there is no file {name}; give the path of a .gguf file on this machine"
            )
        need("gguf")
        need("accelerate")  # transformers reads no GGUF file without it
        return Checkpoint(role, path.parent, gguf=path.name)
    if path.is_dir():
        folder = path
    elif path.exists() or path.is_absolute() or str(name).startswith(".") or str(name).count("/") != 1:
        raise InputError(
            f"{role}: {name} is not a folder; give a checkpoint folder, a .gguf file or a hub id such as org/model"
        )
    else:
        folder = _from_hub(str(name), role)
    if (folder / ADAPTER_CONFIG).is_file():
        return _with_base(folder, role)
    if not (folder / "config.json").is_file():
        raise InputError(f"{role}: {name} holds no config.json; give a folder written by save_pretrained")
    if not list(folder.glob("*.safetensors")):
        raise InputError(f"{role}: {name} holds no .safetensors weights; save them with save_pretrained")
    return Checkpoint(role, folder)


def contents_of(models: Mapping[str, Any], rule: str | None = None) -> dict[str, Any]:
    """Content keys of models and of a rule's head: shards of a model trained on, or of a head exported anew, do not mix
    with those from before.

    Args:
        models: by role, a folder or hub id, or the model itself where it is in memory; what is None is left out.
        rule: as ``--rule`` takes it.
    """
    found: dict[str, Any] = {}
    for role, model in models.items():
        if isinstance(model, str | Path) and str(model):
            found[role] = find_checkpoint(model, role).content
        elif model is not None and model != "":
            found[role] = weights_key(model)
    if rule is not None:
        found["rule"] = rule_key(rule_from_spec(rule, typed=[rule]))
    return found


def need(module: str) -> None:
    """Refuse where an optional library is not installed."""
    if importlib.util.find_spec(module) is None:
        raise MissingExtraError(module, module)


def _with_base(adapter: Path, role: str) -> Checkpoint:
    """The checkpoint of an adapter folder: the base that its config names, and the adapter."""
    need("peft")
    try:
        config = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{role}: {adapter / ADAPTER_CONFIG} cannot be read: {error}") from None
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not isinstance(base, str) or not base:
        raise InputError(
            f"{role}: {adapter / ADAPTER_CONFIG} names no base model; write its folder into base_model_name_or_path"
        )
    if config.get("megatron_config") is not None:  # PEFT would import the module that megatron_core names
        raise InputError(
            f"{role}: {adapter}: megatron_config would import code, and files never do; remove it"
        )
    if not (adapter / ADAPTER_WEIGHTS).is_file():
        raise InputError(f"{role}: {adapter} holds no {ADAPTER_WEIGHTS}; save the adapter as safetensors")
    near = adapter / base  # a relative base is looked for from here, then beside the adapter
    place = near if not Path(base).expanduser().exists() and near.is_dir() else base
    try:
        found = find_checkpoint(place, role)
    except InputError as error:
        raise InputError(
            f"{role}: the base of adapter {adapter} cannot be used: {error}; correct base_model_name_or_path in its "
            f"{ADAPTER_CONFIG}"
        ) from None
    if found.adapter or found.gguf:
        raise InputError(
            f"{role}: adapter {adapter} is for {found.path}, which is no folder of weights; merge that one first"
        )
    return Checkpoint(role, found.folder, adapter=adapter)


def _from_hub(name: str, role: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingExtraError("transformers", "train") from error
    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # refusals, no such model, no network, no disk: each its own class
        raise InputError(
            f"{role}: {name} is neither a folder nor a model that the hub gives ({type(error).__name__}); "
            "check the name, or download it first"
        ) from error


@contextmanager
def one_line_errors(role: str, path: Path, part: str) -> Iterator[None]:
    """Turn whatever transformers raises on a checkpoint into one line that names it."""
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("transformers", "train") from error
    try:
        yield
    except InputError:
        raise
    except ImportError as error:  # a quantised checkpoint whose library is absent: transformers names it
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{role}: {path}: {part} needs a library that is not installed: {reason}") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise InputError(f"{role}: {path}: {part} cannot be loaded: {reason}") from error


@contextmanager
def without_bars() -> Iterator[None]:
    """Within, transformers shows no progress bar for each file that it reads or writes."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def apply_adapter(model: Any, checkpoint: Checkpoint) -> Any:
    """The model with the checkpoint's adapter in its weights; a quantised model keeps it beside them.

    Raises:
        InputError: the adapter does not fit this model: it was made for another base.
    """
    if checkpoint.adapter is None:
        return model
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    remedy = f"it is an adapter for another base than {checkpoint.folder}, which its {ADAPTER_CONFIG} names"
    try:
        adapted = PeftModel.from_pretrained(model, str(checkpoint.adapter))
        with safe_open(checkpoint.adapter / ADAPTER_WEIGHTS, "pt") as file:
            stored = set(file.keys())
    except Exception as error:  # other modules, other shapes, damaged files: each its own class
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{checkpoint.role}: {checkpoint.adapter}: {remedy} ({reason})") from error
    # PEFT leaves out weights that the model has no place for, and makes up those that the file has not.
    differing = sorted(stored ^ set(get_peft_model_state_dict(adapted)))
    if differing:
        raise InputError(
            f"{checkpoint.role}: {checkpoint.adapter}: {remedy}: {len(differing)} weights fit nothing, first "
            f"{differing[0]}"
        )
    if getattr(model, "is_quantized", False):
        return adapted.get_base_model()
    return adapted.merge_and_unload()
