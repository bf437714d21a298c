"""Load a drafter and a verifier that can work together, or say in one line why they cannot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deferral_train.errors import InputError, MissingExtraError
from deferral_train.pairs.fingerprint import checkpoint_fingerprint, tokenizer_fingerprint

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ModelPair:
    """Two models over one vocabulary, in eval mode on one device.

    ``vocab_size`` is the number of ids that both models can emit and the tokenizer knows; logits beyond it
    are padding columns of either model and must be masked. ``eos_ids`` end a text for the verifier.
    """

    drafter: Any
    verifier: Any
    tokenizer: Any
    is_encoder_decoder: bool
    vocab_size: int
    eos_ids: tuple[int, ...]
    fingerprints: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.verifier.device


def load_models(
    drafter: str | Path,
    verifier: str | Path,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> ModelPair:
    """Load two transformers checkpoints and check that they make a pair.

    Args:
        drafter: folder or hub id of the small model.
        verifier: folder or hub id of the large model; its tokenizer is used.
        device: ``auto`` (a GPU where there is one), ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        dtype: ``auto`` (as stored; on CPU half becomes float32), ``float32``, ``float16``, ``bfloat16``.
        trust_remote_code: run Python code that comes with a checkpoint. Off, and best left off.

    Raises:
        InputError: folder missing, not a checkpoint, unlike tokenizers or architectures, no such device.
    """
    place = resolve_device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise InputError(f"dtype={dtype!r}: use auto, {', '.join(DTYPES)}")
    folders = {
        role: resolve_checkpoint(name, role) for role, name in (("drafter", drafter), ("verifier", verifier))
    }
    configs = {role: _load_config(folder, role, trust_remote_code) for role, folder in folders.items()}
    _check_architectures(configs["drafter"], configs["verifier"])
    tokenizers = {role: load_tokenizer(folder, role, trust_remote_code) for role, folder in folders.items()}
    check_same_tokenizer(tokenizers["drafter"], tokenizers["verifier"])
    models = {
        role: _load_model(folder, role, configs[role], place, dtype, trust_remote_code)
        for role, folder in folders.items()
    }
    fingerprints: dict[str, Any] = {role: checkpoint_fingerprint(folder) for role, folder in folders.items()}
    fingerprints["tokenizer"] = tokenizer_fingerprint(tokenizers["verifier"])
    return make_pair(models["drafter"], models["verifier"], tokenizers["verifier"], fingerprints)


def load_smaller(
    names: Sequence[str | Path], pair: ModelPair, dtype: str = "auto", trust_remote_code: bool = False
) -> list[Any]:
    """Further drafters for a pair, checked like its own; on the pair's device, in eval mode, and among its
    fingerprints.

    Raises:
        InputError: as for :func:`load_models`.
    """
    models = []
    for name in names:
        folder = resolve_checkpoint(name, "drafter")
        config = _load_config(folder, "drafter", trust_remote_code)
        _check_architectures(config, pair.verifier.config)
        check_same_tokenizer(load_tokenizer(folder, "drafter", trust_remote_code), pair.tokenizer)
        models.append(_load_model(folder, "drafter", config, pair.device, dtype, trust_remote_code).eval())
        pair.fingerprints.setdefault("smaller", []).append(checkpoint_fingerprint(folder))
    return models


def make_pair(
    drafter: Any, verifier: Any, tokenizer: Any, fingerprints: dict[str, Any] | None = None
) -> ModelPair:
    """A :class:`ModelPair` of models already in memory; puts them in eval mode.

    Raises:
        InputError: unlike architectures, or a model whose vocabulary is smaller than the tokenizer's.
    """
    _check_architectures(drafter.config, verifier.config)
    sizes = {role: output_size(model) for role, model in (("drafter", drafter), ("verifier", verifier))}
    for role, size in sizes.items():
        if size < len(tokenizer):
            raise InputError(
                f"{role}: {size} output columns but the tokenizer has {len(tokenizer)} ids; "
                "use the tokenizer that the model was trained with"
            )
    return ModelPair(
        drafter.eval(),
        verifier.eval(),
        tokenizer,
        bool(verifier.config.is_encoder_decoder),
        min(len(tokenizer), *sizes.values()),
        _eos_ids(verifier, tokenizer),
        fingerprints or {},
    )


def output_size(model: Any) -> int:
    """Number of logit columns of a model, padding included."""
    return int(model.get_output_embeddings().weight.shape[0])


def output_matrix(verifier: str | Path, recorded: Mapping[str, Any] | None = None) -> Tensor:
    """Rows of a checkpoint's output matrix, float32 [V, D]: the embeddings that a token's logit is a product with.

    Args:
        verifier: folder or hub id.
        recorded: fingerprint of the checkpoint that it must be; empty accepts any.

    Raises:
        InputError: no such checkpoint, or another one.
    """
    folder = resolve_checkpoint(verifier, "verifier")
    wanted = (recorded or {}).get("weights")
    found = checkpoint_fingerprint(folder)["weights"]
    if wanted is not None and found != wanted:
        raise InputError(f"verifier: {folder} has weights {found}, the traces were collected with {wanted}")
    model = _load_model(
        folder, "verifier", _load_config(folder, "verifier", False), torch.device("cpu"), "float32", False
    )
    matrix: Tensor = model.get_output_embeddings().weight.detach()
    return matrix


def resolve_device(device: str) -> torch.device:
    """``auto`` becomes a GPU where there is one; a device that is not there is refused."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device={device!r}: use auto, cpu, cuda, cuda:N or mps") from error
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device={device!r}: {torch.cuda.device_count()} CUDA devices visible; use auto or cpu"
        )
    if place.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device='mps': not available here; use auto or cpu")
    return place


def resolve_checkpoint(name: str | Path, role: str) -> Path:
    """Local folder of a checkpoint; a hub id is fetched (or found in the cache) first.

    Raises:
        InputError: no such folder, no checkpoint in it, or the hub has no such model or is out of reach.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"{role}: {name} holds no config.json; give a folder written by save_pretrained")
        if not list(folder.glob("*.safetensors")):
            raise InputError(f"{role}: {name} holds no .safetensors weights; save them with save_pretrained")
        return folder
    if folder.exists() or folder.is_absolute() or str(name).startswith(".") or str(name).count("/") != 1:
        raise InputError(
            f"{role}: {name} is not a folder; give a checkpoint folder or a hub id such as org/model"
        )
    return _from_hub(str(name), role)


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
def _one_line(role: str, folder: Path, what: str) -> Iterator[None]:
    """Turn whatever transformers raises on a damaged checkpoint into one line that names it."""
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("transformers", "train") from error
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{role}: {folder}: {what} cannot be loaded: {reason}") from error


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


def _load_config(folder: Path, role: str, trust_remote_code: bool) -> Any:
    with _one_line(role, folder, "config.json"):
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


def load_tokenizer(folder: str | Path, role: str = "tokenizer", trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint folder; one clear line where it has none."""
    with _one_line(role, Path(folder), "tokenizer"):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def _load_model(
    folder: Path, role: str, config: Any, device: torch.device, dtype: str, trust_remote_code: bool
) -> Any:
    with _one_line(role, folder, "weights"), without_bars():
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        kind: Any = DTYPES.get(dtype, "auto")
        loaded: Any = auto.from_pretrained(
            folder,
            config=config,
            dtype=kind,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
        model, info = loaded
        missing = sorted(info["missing_keys"])
        if missing:
            raise InputError(
                f"{role}: {folder} lacks {len(missing)} weights, first {missing[0]}; save it again"
            )
        if dtype == "auto" and device.type == "cpu" and model.dtype in (torch.float16, torch.bfloat16):
            model = model.float()  # half precision is emulated, slowly, on most CPUs
        return model.to(device).eval()


def _check_architectures(drafter: Any, verifier: Any) -> None:
    names = {True: "encoder-decoder", False: "decoder-only"}
    kinds = bool(drafter.is_encoder_decoder), bool(verifier.is_encoder_decoder)
    if kinds[0] != kinds[1]:
        raise InputError(
            f"pair: the drafter is {names[kinds[0]]} ({drafter.model_type}), the verifier {names[kinds[1]]} "
            f"({verifier.model_type}); use two models of one kind"
        )


def check_same_tokenizer(drafter: Any, verifier: Any) -> None:
    """Refuse two tokenizers that give an id different meanings; ids that only one has, too.

    Raises:
        InputError: names the first few differing ids with the token each tokenizer gives them.
    """
    left, right = (
        {i: token for token, i in tokenizer.get_vocab().items()} for tokenizer in (drafter, verifier)
    )
    differing = sorted(i for i in left.keys() | right.keys() if left.get(i) != right.get(i))
    if differing:
        shown = ", ".join(f"{i} ({left.get(i)!r} / {right.get(i)!r})" for i in differing[:3])
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise InputError(
            f"tokenizers differ in {len(differing)} ids (drafter / verifier): {shown}{more}; they must match"
        )
    if drafter.eos_token_id != verifier.eos_token_id:
        raise InputError(
            f"tokenizers differ in the end of sequence: {drafter.eos_token_id} (drafter), "
            f"{verifier.eos_token_id} (verifier); they must match"
        )


def _eos_ids(verifier: Any, tokenizer: Any) -> tuple[int, ...]:
    configured = getattr(verifier, "generation_config", None)
    ids = getattr(configured, "eos_token_id", None)
    if ids is None:
        ids = tokenizer.eos_token_id
    if ids is None:
        return ()
    return tuple(sorted({int(i) for i in (ids if isinstance(ids, (list, tuple)) else [ids])}))
