"""Load a drafter and a verifier that can work together, or say in one line why they cannot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deferral_train.errors import InputError
from deferral_train.pairs.checkpoint import (
    ADAPTER_CONFIG,
    Checkpoint,
    apply_adapter,
    find_checkpoint,
    need,
    one_line_errors,
    without_bars,
)
from deferral_train.pairs.fingerprint import tokenizer_fingerprint

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
# Ways of splitting text, as GGUF files name them, that are GPT-2's with every digit on its own (llama.cpp's list).
DIGITS_ALONE = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ModelPair:
    """Two models over one vocabulary, in eval mode; each on its device, or the verifier spread over several.

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
        """Where the verifier's inputs go, and where texts are decoded."""
        return self.verifier.device


@dataclass(frozen=True)
class Placement:
    """Where one model goes: a device, or a map by which accelerate spreads it over several."""

    device: torch.device
    device_map: Any = None


def load_models(
    drafter: str | Path,
    verifier: str | Path,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    *,
    drafter_device: str | None = None,
    device_map: Any = None,
) -> ModelPair:
    """Load two checkpoints and check that they make a pair.

    Args:
        drafter: the small model: a folder, a hub id, a ``.gguf`` file (dequantised), or a PEFT adapter's folder (its
            base is loaded and the adapter merged).
        verifier: the same of the large model; its tokenizer is used.
        device: ``auto`` (a GPU where there is one), ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        dtype: ``auto`` (as stored; on CPU half becomes float32), ``float32``, ``float16``, ``bfloat16``.
        trust_remote_code: run Python code that comes with a checkpoint. Off, and best left off.
        drafter_device: of the drafter, where it is not the verifier's.
        device_map: spreads the verifier over several devices, see :func:`resolve_placement`.

    Raises:
        InputError: folder missing, not a checkpoint, unlike tokenizers or architectures, no such device, an adapter for
            another base, a library that a quantised or GGUF checkpoint needs and that is not installed.
    """
    places = resolve_placement(device, drafter_device, device_map)
    if dtype != "auto" and dtype not in DTYPES:
        raise InputError(f"dtype={dtype!r}: use auto, {', '.join(DTYPES)}")
    found = {
        role: find_checkpoint(name, role) for role, name in (("drafter", drafter), ("verifier", verifier))
    }
    configs = {role: _load_config(one, trust_remote_code) for role, one in found.items()}
    _check_architectures(configs["drafter"], configs["verifier"])
    tokenizers = {role: load_tokenizer(one, role, trust_remote_code) for role, one in found.items()}
    check_same_tokenizer(tokenizers["drafter"], tokenizers["verifier"])
    models = {
        role: _load_model(one, configs[role], places[role], dtype, trust_remote_code)
        for role, one in found.items()
    }
    fingerprints: dict[str, Any] = {role: one.fingerprint() for role, one in found.items()}
    fingerprints["tokenizer"] = tokenizer_fingerprint(tokenizers["verifier"])
    return make_pair(models["drafter"], models["verifier"], tokenizers["verifier"], fingerprints)


def load_smaller(
    names: Sequence[str | Path], pair: ModelPair, dtype: str = "auto", trust_remote_code: bool = False
) -> list[Any]:
    """Further drafters for a pair, checked like its own; on the drafter's device, in eval mode, and among the pair's
    fingerprints.

    Raises:
        InputError: as for :func:`load_models`.
    """
    models = []
    for name in names:
        found = find_checkpoint(name, "drafter")
        config = _load_config(found, trust_remote_code)
        _check_architectures(config, pair.verifier.config)
        check_same_tokenizer(load_tokenizer(found, "drafter", trust_remote_code), pair.tokenizer)
        place = Placement(pair.drafter.device)
        models.append(_load_model(found, config, place, dtype, trust_remote_code))
        pair.fingerprints.setdefault("smaller", []).append(found.fingerprint())
    return models


def load_model(name: str | Path, role: str, dtype: str = "auto") -> Any:
    """One model alone, on the CPU, in eval mode.

    Args:
        name: a folder, a hub id, a ``.gguf`` file or an adapter's folder.
        role: what it is called in messages.
        dtype: as for :func:`load_models`, or ``stored``: as stored, half precision too; of a GGUF file float32.

    Raises:
        InputError: as for :func:`load_models`.
    """
    found = find_checkpoint(name, role)
    return _load_model(found, _load_config(found, False), Placement(torch.device("cpu")), dtype, False)


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
        eos_ids(getattr(verifier, "generation_config", None), tokenizer),
        fingerprints or {},
    )


def output_size(model: Any) -> int:
    """Number of logit columns of a model, padding included."""
    head = model.get_output_embeddings()
    size = getattr(
        head, "out_features", None
    )  # packed and dynamically quantised weights have another shape, or none
    return int(head.weight.shape[0] if size is None else size)


def output_matrix(verifier: str | Path, recorded: Mapping[str, Any] | None = None) -> Tensor:
    """Rows of a checkpoint's output matrix, float32 [V, D]: the embeddings that a token's logit is a product with.

    Args:
        verifier: what a checkpoint is named by.
        recorded: fingerprint of the checkpoint that it must be; empty accepts any.

    Raises:
        InputError: no such checkpoint, or another one.
    """
    found = find_checkpoint(verifier, "verifier")
    wanted, own = (recorded or {}).get("weights"), found.fingerprint().get("weights")
    if wanted is not None and own != wanted:
        raise InputError(f"verifier: {verifier} has weights {own}, the traces were collected with {wanted}")
    matrix: Tensor = load_model(verifier, "verifier", "float32").get_output_embeddings().weight.detach()
    return matrix


def resolve_device(device: str, field: str = "device") -> torch.device:
    """``auto`` becomes a GPU where there is one; a device that is not there is refused.

    Args:
        field: what the value is called in messages.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"{field}={device!r}: use auto, cpu, cuda, cuda:N or mps") from error
    if place.type == "cpu":
        return place
    count = _devices_of(place.type)
    if (place.index or 0) >= count:
        raise InputError(f"{field}={device!r}: {count} {place.type.upper()} devices visible; use auto or cpu")
    return place


def _devices_of(kind: str) -> int:
    """Devices of a type that this process can use; 0 for a type that torch was built without."""
    try:
        module = torch.get_device_module(kind)
        return int(module.device_count()) if kind == "mps" or module.is_available() else 0
    except (RuntimeError, AttributeError):
        return 0


def resolve_placement(
    device: str = "auto", drafter_device: str | None = None, device_map: Any = None
) -> dict[str, Placement]:
    """Where the drafter and the verifier go, by role.

    Args:
        device: of both models.
        drafter_device: of the drafter, where it is another.
        device_map: how accelerate spreads the verifier over devices: ``auto``, ``balanced``, ``balanced_low_0``,
            ``sequential`` or, from Python, a dictionary of module and device; ``device`` must then be ``auto``.

    Raises:
        InputError: a device that is not there, an unknown map, or accelerate is not installed.
    """
    if device_map is not None:
        if not isinstance(device_map, dict) and device_map not in DEVICE_MAPS:
            raise InputError(f"device_map={device_map!r}: use {', '.join(DEVICE_MAPS)}")
        if device != "auto":
            raise InputError(
                f"device_map={device_map!r}, device={device!r}: give one of the two, a map places the verifier"
            )
        need("accelerate")
    place = resolve_device(device)
    drafter = place if drafter_device is None else resolve_device(drafter_device, "drafter_device")
    return {"drafter": Placement(drafter), "verifier": Placement(place, device_map)}


def load_tokenizer(
    source: str | Path | Checkpoint, role: str = "tokenizer", trust_remote_code: bool = False
) -> Any:
    """The tokenizer of a checkpoint, or of a folder that holds one; one clear line where there is none."""
    if not isinstance(source, Checkpoint):
        own = (Path(source) / ADAPTER_CONFIG).is_file() or str(source).endswith(".gguf")
        source = find_checkpoint(source, role) if own else Checkpoint(role, Path(source))
    where = source.source
    if source.adapter and (source.adapter / "tokenizer_config.json").is_file():
        where = {
            "pretrained_model_name_or_path": source.adapter
        }  # saved beside the adapter, perhaps with a template
    with one_line_errors(role, source.path, "tokenizer"):
        from transformers import AutoTokenizer

        found = AutoTokenizer.from_pretrained(**where, trust_remote_code=trust_remote_code)
        return _as_in_the_file(found, source.path) if source.gguf else found


def _as_in_the_file(tokenizer: Any, path: Path) -> Any:
    """A tokenizer made from GGUF that splits text as the file says, without the tokens that the file does not have.

    transformers builds it as a GPT2Tokenizer, whose own end of text is added to a vocabulary without one, as an id
    beyond the model's, and which splits as GPT-2 wherever it does not know the name of the file's own way.
    """
    from tokenizers import Tokenizer, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if _splitting(path) in DIGITS_ALONE:
        bytes_behind = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), bytes_behind]
        )
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = [token for token in state["added_tokens"] if token["id"] < len(state["model"]["vocab"])]
    if len(kept) == len(state["added_tokens"]):
        return tokenizer
    names = (
        "bos_token",
        "eos_token",
        "unk_token",
        "pad_token",
        "chat_template",
        "model_max_length",
        "padding_side",
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state | {"added_tokens": kept})),
        **{name: getattr(tokenizer, name) for name in names},
    )


def _splitting(path: Path) -> str | None:
    """Name of the way in which a GGUF file's tokenizer splits text before it merges."""
    from gguf import GGUFReader

    field = GGUFReader(path).fields.get("tokenizer.ggml.pre")
    return None if field is None else str(field.contents())


def _load_config(checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    part = checkpoint.gguf or "config.json"
    with one_line_errors(checkpoint.role, checkpoint.folder, part), without_bars():
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(**checkpoint.source, trust_remote_code=trust_remote_code)


def _load_model(
    checkpoint: Checkpoint, config: Any, placement: Placement, dtype: str, trust_remote_code: bool
) -> Any:
    """The model in eval mode where it is to run, its adapter merged."""
    with one_line_errors(checkpoint.role, checkpoint.path, "weights"), without_bars():
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

        quantised = getattr(config, "quantization_config", None) is not None
        if quantised:
            need("accelerate")  # which puts packed weights in their place
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        given: dict[str, Any] = {"dtype": DTYPES.get(dtype, "auto"), "trust_remote_code": trust_remote_code}
        given |= {"config": config, "output_loading_info": True}
        given |= _plain_numbers() if checkpoint.gguf else {"use_safetensors": True}
        mapped = placement.device_map or ({"": placement.device} if quantised else None)
        if mapped is not None:
            given["device_map"] = mapped
        loaded: Any = auto.from_pretrained(**checkpoint.source, **given)
        model, info = loaded
        missing = sorted(info["missing_keys"])
        if missing:
            raise InputError(
                f"{checkpoint.role}: {checkpoint.folder} lacks {len(missing)} weights, first {missing[0]}; "
                "save it again"
            )
        if checkpoint.gguf and hasattr(model.config, "quantization_config"):
            del (
                model.config.quantization_config
            )  # its weights are plain numbers now, and may be saved as such
        model = apply_adapter(model, checkpoint)
        if quantised:  # its packed weights can be neither cast nor moved
            return model.eval()
        only_cpu = placement.device.type == "cpu" and {p.device.type for p in model.parameters()} == {"cpu"}
        if dtype == "auto" and only_cpu and model.dtype in (torch.float16, torch.bfloat16):
            model = model.float()  # half precision is emulated, slowly, on most CPUs
        return (model if mapped is not None else model.to(placement.device)).eval()


def _plain_numbers() -> dict[str, Any]:
    """Arguments that have transformers dequantise a GGUF file; releases that know no other way need none."""
    import transformers

    settings = getattr(transformers, "GgufConfig", None)
    return {} if settings is None else {"quantization_config": settings(dequantize=True)}


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


def eos_ids(configured: Any, tokenizer: Any) -> tuple[int, ...]:
    """Ids that end a text: those of the verifier's generation config, else the tokenizer's; none where neither says."""
    ids = getattr(configured, "eos_token_id", None)
    if ids is None:
        ids = tokenizer.eos_token_id
    if ids is None:
        return ()
    return tuple(sorted({int(i) for i in (ids if isinstance(ids, (list, tuple)) else [ids])}))
