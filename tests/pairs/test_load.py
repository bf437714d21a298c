"""Pairs that load, and pairs that are refused in one line."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from tiny_models import KINDS, VOCAB, save_tiny_pair, tiny_model, tiny_pair, tiny_tokenizer

from deferral_train.errors import InputError
from deferral_train.pairs.fingerprint import checkpoint_fingerprint, tokenizer_fingerprint
from deferral_train.pairs.load import check_same_tokenizer, load_models, make_pair, resolve_device


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny_pair("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return save_tiny_pair("t5", tmp_path_factory.mktemp("t5"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_loads_with_the_saved_weights(kind, tmp_path):
    drafter, verifier = save_tiny_pair(kind, tmp_path, seed=3)
    pair = load_models(drafter, verifier, device="cpu")
    assert pair.is_encoder_decoder == (kind == "t5")
    assert pair.vocab_size == VOCAB
    assert pair.eos_ids == (1,)
    assert not pair.drafter.training
    expected = tiny_pair(kind, seed=3)
    for loaded, made in zip((pair.drafter, pair.verifier), expected[:2]):
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), made.parameters()))


def test_differently_padded_vocabularies_share_the_real_one():
    pair = make_pair(tiny_model("llama", 0, VOCAB + 24), tiny_model("llama", 1, VOCAB + 8), tiny_tokenizer())
    assert pair.vocab_size == VOCAB
    larger = tiny_tokenizer()
    larger.add_tokens(["one_more"])
    with pytest.raises(InputError, match=r"drafter: 40 output columns but the tokenizer has 41"):
        make_pair(tiny_model("gpt2"), tiny_model("gpt2", 1), larger)


def test_dtype_and_half_weights_on_cpu(llama, tmp_path):
    assert load_models(*llama, device="cpu", dtype="bfloat16").verifier.dtype == torch.bfloat16
    model = tiny_model("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert load_models(tmp_path, tmp_path, device="cpu").verifier.dtype == torch.float32


def test_unlike_tokenizers_name_the_ids(llama, tmp_path):
    shutil.copytree(llama[0], tmp_path / "drafter")
    tiny_tokenizer(extra_word="zebra").save_pretrained(tmp_path / "drafter")
    with pytest.raises(InputError, match=r"differ in 1 ids .*39 \('zebra' / 'w35'\)"):
        load_models(tmp_path / "drafter", llama[1])
    left, right = tiny_tokenizer(), tiny_tokenizer()
    left.eos_token = "<s>"
    with pytest.raises(InputError, match=r"end of sequence: 2 \(drafter\), 1 \(verifier\)"):
        check_same_tokenizer(left, right)


def test_unlike_architectures(llama, t5):
    with pytest.raises(
        InputError, match=r"drafter is encoder-decoder \(t5\), the verifier decoder-only \(llama\)"
    ):
        load_models(t5[0], llama[1])


def test_what_is_no_checkpoint_is_refused_in_one_line(llama, tmp_path, monkeypatch):
    def refusal(folder):
        with pytest.raises(InputError) as caught:
            load_models(folder, llama[1])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "is not a folder" in refusal(tmp_path / "nowhere")
    assert "no config.json" in refusal(tmp_path)
    assert "neither a folder nor a model that the hub gives" in refusal("org/absent-model")
    folder = tmp_path / "damaged"
    shutil.copytree(llama[0], folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "weights cannot be loaded" in refusal(folder)
    weights.unlink()
    assert "no .safetensors weights" in refusal(folder)
    weights.write_bytes(b"")
    (folder / "config.json").write_text("{not json")
    assert "config.json cannot be loaded" in refusal(folder)


def test_missing_weights_are_not_filled_in_silently(llama, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "part"
    shutil.copytree(llama[0], folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 weights, first model.layers.1.mlp.up_proj.weight"):
        load_models(folder, llama[1])


def test_devices():
    assert resolve_device("cpu").type == "cpu"
    with pytest.raises(InputError, match="device='toaster'"):
        resolve_device("toaster")
    with pytest.raises(InputError, match=r"cuda:99.*CUDA devices visible"):
        resolve_device("cuda:99")


def test_fingerprints_are_stable_and_notice_a_changed_byte(llama, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(llama[0], folder)
    first, again = checkpoint_fingerprint(llama[0]), checkpoint_fingerprint(folder)
    assert {**first, "name": "copy"} == again
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_version": "9.9.9"}))
    assert checkpoint_fingerprint(folder)["config"] == first["config"]
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    assert checkpoint_fingerprint(folder)["config"] != first["config"]
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    assert checkpoint_fingerprint(folder)["weights"] != first["weights"]
    assert tokenizer_fingerprint(tiny_tokenizer()) == tokenizer_fingerprint(tiny_tokenizer())
    assert tokenizer_fingerprint(tiny_tokenizer()) != tokenizer_fingerprint(tiny_tokenizer("zebra"))


def test_tokenizer_fingerprint_ignores_what_a_call_sets():
    tokenizer = tiny_tokenizer()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["w1 w2", "w1"], padding=True, truncation=True, max_length=1)
    assert tokenizer_fingerprint(tokenizer) == before


def test_hub_snapshot_carries_its_revision(llama, tmp_path):
    folder = tmp_path / "models--org--small" / "snapshots" / "0a1b2c"
    shutil.copytree(llama[0], folder)
    fingerprint = checkpoint_fingerprint(folder)
    assert (fingerprint["name"], fingerprint["revision"]) == ("org/small", "0a1b2c")


def test_importing_pairs_leaves_transformers_alone():
    code = "import sys, deferral_train.pairs; sys.exit(bool({'transformers', 'datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_shared_pair_loads(t5_pair):
    pair = load_models(t5_pair / "drafter", t5_pair / "verifier", device="cpu")
    assert pair.is_encoder_decoder
    assert pair.vocab_size == 4000
