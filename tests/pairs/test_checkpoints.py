"""Checkpoints as people have them: GGUF files, PEFT adapters, spread and quantised models; refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import write_gguf
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_pair, tiny_model, tiny_pair

from deferral_train import load_pair
from deferral_train.cli import main
from deferral_train.collecting import CollectConfig
from deferral_train.errors import InputError
from deferral_train.pairs import checkpoint as checkpoints
from deferral_train.pairs.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from deferral_train.pairs.load import load_models, load_tokenizer

IDS = torch.tensor([[5, 9, 12, 7]])


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a tiny Llama pair."""
    return save_tiny_pair("llama", tmp_path_factory.mktemp("pair"), seed=3)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def refusal(*models: str | Path, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        load_models(*models, **{"device": "cpu", **options})
    return str(caught.value)


# GGUF


@pytest.fixture(scope="module")
def gguf_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A drafter as GGUF and a verifier as safetensors with the drafter's tokenizer."""
    pytest.importorskip("gguf")
    root = tmp_path_factory.mktemp("gguf")
    drafter, verifier, _ = tiny_pair("llama", 3)
    path = write_gguf(drafter, root / "drafter.gguf")
    verifier.save_pretrained(root / "verifier")
    load_tokenizer(path).save_pretrained(root / "verifier")
    return path, root / "verifier"


def test_a_gguf_file_is_a_drafter(gguf_pair: tuple[Path, Path]) -> None:
    found = load_models(*gguf_pair, device="cpu")
    drafter, verifier, _ = tiny_pair("llama", 3)
    torch.testing.assert_close(logits(found.drafter), logits(drafter))
    assert found.tokenizer("abcdz")["input_ids"] == [30, 31, 29]
    text = load_pair(*map(str, gguf_pair), device="cpu").generate("ab cd", max_new_tokens=6).sequences
    ids = found.tokenizer("ab cd", return_tensors="pt")["input_ids"]
    own = verifier.generate(ids, do_sample=False, max_new_tokens=6)[0, ids.shape[1] :].tolist()
    assert text == [own]


def test_a_gguf_file_is_a_verifier_and_its_bytes_are_its_fingerprint(
    gguf_pair: tuple[Path, Path], tmp_path: Path
) -> None:
    first = load_models(gguf_pair[1], gguf_pair[0], device="cpu").fingerprints["verifier"]
    assert first["name"] == "drafter.gguf"
    copy = tmp_path / "drafter.gguf"
    data = bytearray(gguf_pair[0].read_bytes())
    copy.write_bytes(data)
    assert checkpoints.find_checkpoint(copy, "verifier").fingerprint() == first
    data[len(data) // 2] ^= 1
    copy.write_bytes(data)
    assert checkpoints.find_checkpoint(copy, "verifier").fingerprint()["weights"] != first["weights"]


def test_gguf_files_that_cannot_be_read_are_refused_in_one_line(
    gguf_pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strange = write_gguf(tiny_model("llama", 3), tmp_path / "strange.gguf", architecture="wonderful")
    said = refusal(strange, gguf_pair[1])
    assert "drafter" in said
    assert "wonderful" in said
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"hello")
    assert "damaged.gguf cannot be loaded" in refusal(damaged, gguf_pair[1])
    assert "there is no file" in refusal(tmp_path / "absent.gguf", gguf_pair[1])
    monkeypatch.setattr(checkpoints.importlib.util, "find_spec", lambda name: None)
    assert "gguf is not installed; run: pip install 'deferral-train[gguf]'" in refusal(*gguf_pair)


@pytest.mark.parametrize(
    ("splitting", "digits", "lines"),
    [("smollm", ["1", "2"], ["ĊĊ", "1"]), ("default", ["12"], ["Ċ", "Ċ", "1"])],
)
def test_a_gguf_tokenizer_splits_text_as_the_file_says(
    splitting: str, digits: list[str], lines: list[str], tmp_path: Path
) -> None:
    """SmolLM's own tokenizer.json parts digits before merging and keeps line ends together, GPT-2 neither."""
    pytest.importorskip("gguf")
    tokens = ["<pad>", "</s>", "<s>", "<unk>", "1", "2", "Ċ", "ĊĊ", "12", *map(chr, range(97, 123))]
    path = write_gguf(
        tiny_model("llama", 3), tmp_path / "own.gguf", "llama", splitting, tokens, ["1 2", "Ċ Ċ"]
    )
    tokenizer = load_tokenizer(path)
    assert tokenizer.tokenize("12") == digits
    assert tokenizer.tokenize("\n\n1") == lines
    assert tokenizer.tokenize("ab1") == ["a", "b", "1"]
    tokenizer.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").tokenize("a12\n\n1") == tokenizer.tokenize("a12\n\n1")


# Adapters


def save_adapter(base: Path, folder: Path, **options: Any) -> Any:
    """A random LoRA adapter of the model in ``base``, saved; returns the adapted model."""
    peft = pytest.importorskip("peft")
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    given = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **options}
    torch.manual_seed(4)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**given))
    adapted.save_pretrained(folder)
    return adapted.eval()


def edit(folder: Path, **fields: Any) -> None:
    path = folder / ADAPTER_CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_an_adapter_is_merged_into_the_base_that_it_names(pair: tuple[Path, Path], tmp_path: Path) -> None:
    adapted = save_adapter(pair[1], tmp_path / "adapter")
    found = load_models(pair[0], tmp_path / "adapter", device="cpu")
    torch.testing.assert_close(logits(found.verifier), logits(adapted), atol=1e-5, rtol=1e-5)
    bare = load_models(*pair, device="cpu")
    assert (logits(found.verifier) - logits(bare.verifier)).abs().max() > 0.1
    assert type(found.verifier) is type(bare.verifier)
    ours, base = (one.fingerprints["verifier"] for one in (found, bare))
    assert ours["weights"] == base["weights"]
    assert ours["adapter"]
    assert "adapter" not in base


def test_a_relative_base_is_looked_for_beside_the_adapter(pair: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(pair[1], tmp_path / "base")
    adapted = save_adapter(tmp_path / "base", tmp_path / "adapter")
    edit(tmp_path / "adapter", base_model_name_or_path="../base")
    found = load_models(pair[0], tmp_path / "adapter", device="cpu")
    torch.testing.assert_close(logits(found.verifier), logits(adapted), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("other", ["narrower", "shallower", "another architecture"])
def test_an_adapter_for_another_base_is_refused(pair: tuple[Path, Path], tmp_path: Path, other: str) -> None:
    import transformers

    save_adapter(pair[1], tmp_path / "adapter")
    shutil.copytree(pair[1], tmp_path / "base")
    model = {
        "narrower": lambda: transformers.LlamaForCausalLM(_narrow(tiny_model("llama").config)),
        "shallower": lambda: tiny_model("llama", layers=1),
        "another architecture": lambda: tiny_model("gpt2"),
    }[other]()
    model.save_pretrained(tmp_path / "base")
    edit(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base"))
    said = refusal(pair[0], tmp_path / "adapter")
    assert "adapter for another base" in said
    assert "adapter_config.json" in said


def _narrow(config: Any) -> Any:
    config.hidden_size, config.head_dim = 16, 8
    return config


def test_adapters_that_cannot_be_used_are_refused_in_one_line(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "adapter"
    save_adapter(pair[1], folder)
    edit(folder, megatron_config={"a": 1}, megatron_core="os")
    assert "would import code" in refusal(pair[0], folder)
    edit(folder, megatron_config=None, base_model_name_or_path=str(tmp_path / "gone"))
    assert "is not a folder" in refusal(pair[0], folder)
    edit(folder, base_model_name_or_path=None)
    assert "names no base model" in refusal(pair[0], folder)
    edit(folder, base_model_name_or_path=str(pair[1]))
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    save_file(dict(list(tensors.items())[1:]), folder / ADAPTER_WEIGHTS)
    assert "1 weights fit nothing" in refusal(pair[0], folder)
    (folder / ADAPTER_WEIGHTS).unlink()
    assert "holds no adapter_model.safetensors" in refusal(pair[0], folder)
    monkeypatch.setattr(checkpoints.importlib.util, "find_spec", lambda name: None)
    assert "peft is not installed; run: pip install 'deferral-train[peft]'" in refusal(pair[0], folder)


# Spread and quantised


def test_a_map_loads_through_accelerate(pair: tuple[Path, Path]) -> None:
    pytest.importorskip("accelerate")
    found = load_models(*pair, device_map="auto")
    bare = load_models(*pair, device="cpu")
    torch.testing.assert_close(logits(found.verifier).cpu(), logits(bare.verifier))


def test_a_spread_verifier_has_one_process() -> None:
    with pytest.raises(InputError, match="device_map='auto', devices=2, num_nodes=1: a spread verifier"):
        CollectConfig(device_map="auto", devices=2)


def test_maps_and_devices_that_are_not_there(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "device_map='everywhere': use auto" in refusal(*pair, device="auto", device_map="everywhere")
    assert "give one of the two" in refusal(*pair, device_map="auto")
    for name in ("cuda:99", "xpu", "meta", "toaster"):
        assert f"device={name!r}" in refusal(*pair, device=name)
        assert f"drafter_device={name!r}" in refusal(*pair, drafter_device=name)
    monkeypatch.setattr(checkpoints.importlib.util, "find_spec", lambda name: None)
    assert "deferral-train[accelerate]" in refusal(*pair, device="auto", device_map="auto")


@pytest.mark.parametrize(
    ("quantisation", "library"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, ""),
    ],
)
def test_a_quantised_checkpoint_without_its_library(
    pair: tuple[Path, Path], tmp_path: Path, quantisation: dict[str, Any], library: str
) -> None:
    if library and checkpoints.importlib.util.find_spec(library):
        pytest.skip(f"{library} is installed")
    folder = tmp_path / "packed"
    shutil.copytree(pair[1], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantisation}))
    said = refusal(pair[0], folder)
    assert said.startswith(f"verifier: {folder}: weights ")
    assert library in said


def test_dynamically_quantised_models_in_memory_make_a_pair() -> None:
    from deferral_train.pairs.load import make_pair

    drafter, verifier, tokenizer = tiny_pair("llama", 3)
    packed = torch.ao.quantization.quantize_dynamic(verifier, {torch.nn.Linear})
    assert make_pair(drafter, packed, tokenizer).vocab_size == 40


def test_commands_say_it_and_exit_with_2(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("w1 w2\n")
    common = [
        "--drafter",
        str(pair[0]),
        "--verifier",
        str(pair[1]),
        "--prompts",
        str(tmp_path / "prompts.txt"),
    ]
    for command in ("decode", "collect"):
        for flags, said in (
            (["--device", "cuda:99"], "device='cuda:99'"),
            (["--drafter_device", "cuda:99"], "drafter_device='cuda:99'"),
            (["--device_map", "everywhere"], "device_map='everywhere'"),
        ):
            rules = ["--rules", "[lossless]"] if command == "decode" else []
            assert main([command, *common, "--out", str(tmp_path / command), *rules, *flags]) == 2
            assert said in capsys.readouterr().err
