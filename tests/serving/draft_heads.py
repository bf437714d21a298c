"""Tiny draft heads in the checkpoint formats that vLLM reads: EAGLE, EAGLE-3 with a reduced vocabulary, MTP (MiMo).

Linear but for what rounding leaves of attention, and fitted by least squares to the verifier's own hidden states, so
that they draft what the verifier says more often than chance does. Their names and shapes are those that vLLM's
`llama_eagle.py`, `llama_eagle3.py` and `mimo_mtp.py` load.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SELF = 8.0  # bias of queries and keys that makes a position attend to itself alone
ONE_LAYER: dict[str, Any] = {"num_hidden_layers": 1, "num_key_value_heads": 2, "tie_word_embeddings": False}


def save_eagle(pair: Path, folder: Path) -> Path:
    """An EAGLE head for the verifier in ``pair``: it has the verifier's vocabulary and output matrix."""
    from transformers import LlamaForCausalLM

    verifier = LlamaForCausalLM.from_pretrained(pair / "verifier").eval()
    states, layer = _states(verifier), _layer(verifier.config)
    layer["self_attn.o_proj.weight"].zero_()
    del layer["input_layernorm.weight"], layer["hidden_norm.weight"]
    weights = {f"layers.0.{name}": one for name, one in layer.items()}
    weights["fc.weight"] = _fitted(torch.cat([states["embedding"], states["last"]], dim=-1), states["next"])
    _save(folder, {**verifier.config.to_dict(), **ONE_LAYER, "architectures": ["LlamaForCausalLM"]}, weights)
    return folder


def save_eagle3(pair: Path, folder: Path, vocabulary: int | None = None) -> Path:
    """An EAGLE-3 head for the verifier in ``pair``; with ``vocabulary`` it drafts so many of the tokens alone."""
    from transformers import LlamaForCausalLM

    verifier = LlamaForCausalLM.from_pretrained(pair / "verifier").eval()
    config, states, layer = verifier.config, _states(verifier), _layer(verifier.config)
    width, size = config.hidden_size, vocabulary or config.vocab_size
    read = [states[name] for name in ("low", "middle", "high")] + [_normed(states["embedding"])]
    fitted = _fitted(torch.cat(read, dim=-1), states["next"])
    value = torch.cat([torch.eye(width), torch.zeros(width, width)], dim=1)  # the embedding passes
    layer |= {f"self_attn.{name}_proj.weight": torch.zeros(width, 2 * width) for name in "qk"}
    layer |= {f"self_attn.{name}_proj.bias": torch.full((width,), SELF) for name in "qk"}
    layer |= {f"self_attn.{name}_proj.bias": torch.zeros(width) for name in "vo"}
    layer |= {"self_attn.v_proj.weight": value, "self_attn.o_proj.weight": fitted[:, 3 * width :]}
    weights = {f"midlayer.{name}": one for name, one in layer.items()}
    weights |= {"fc.weight": fitted[:, : 3 * width], "norm.weight": _ones(config)}
    kept = torch.arange(size)
    if vocabulary:
        words = torch.randperm(config.vocab_size - 4, generator=torch.Generator().manual_seed(3)) + 4
        kept, known = words[:size].sort().values, torch.zeros(config.vocab_size, dtype=torch.bool)
        known[kept] = True
        weights |= {"d2t": kept - torch.arange(size), "t2d": known}
    weights["lm_head.weight"] = verifier.lm_head.weight.detach()[kept]
    settings = {
        "architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": size, "attention_bias": True,
        "eagle_aux_hidden_state_layer_ids": [0, 1, 2],
    }  # fmt: skip
    _save(folder, {**config.to_dict(), **ONE_LAYER, **settings}, weights)
    return folder


def save_mtp(folder: Path) -> Path:
    """`verifier`: a MiMo model whose checkpoint holds one MTP layer; it is verifier and drafter in one folder."""
    from tiny_models import tiny_tokenizer
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = tiny_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, eos_token_id=1, bos_token_id=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        verifier = Qwen2ForCausalLM(config).eval().requires_grad_(False)
        for parameter in verifier.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
        verifier.lm_head.weight.mul_(2.0 / verifier(torch.randint(4, len(tokenizer), (8, 16))).logits.std())
    verifier.save_pretrained(folder / "verifier")
    tokenizer.save_pretrained(folder / "verifier")
    states, layer = _states(verifier), _layer(config)
    inputs = torch.cat([_normed(states["high"]), _normed(states["embedding"])], dim=-1)
    layer["self_attn.o_proj.weight"].zero_()
    layer |= {f"self_attn.{name}_proj.bias": torch.zeros(64) for name in "qkv"}
    layer |= {name: _ones(config) for name in ("token_layernorm.weight", "hidden_layernorm.weight")}
    layer |= {"final_layernorm.weight": _ones(config), "input_proj.weight": _fitted(inputs, states["next"])}
    path = folder / "verifier" / "model.safetensors"
    del layer["hidden_norm.weight"]
    weights = load_file(path) | {f"model.mtp_layers.0.{name}": one for name, one in layer.items()}
    described = {
        **config.to_dict(), "model_type": "mimo", "architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1,
    }  # fmt: skip
    _save(folder / "verifier", described, weights)
    return folder


def register_mimo() -> None:
    """Make transformers know the model type, whose class is remote code in published checkpoints."""
    from transformers import AutoConfig, Qwen2Config

    class MiMoConfig(Qwen2Config):
        model_type = "mimo"

    AutoConfig.register("mimo", MiMoConfig, exist_ok=True)


def _states(verifier: Any) -> dict[str, Tensor]:
    """Hidden states [N, D] by place in the model, the next token's embedding, and the last states a token later."""
    ids = torch.randint(4, verifier.config.vocab_size, (192, 24), generator=torch.Generator().manual_seed(5))
    before_norm: list[Tensor] = []
    hook = verifier.model.norm.register_forward_pre_hook(lambda module, inputs: before_norm.append(inputs[0]))
    with torch.no_grad():
        output = verifier.model(ids, output_hidden_states=True)
        embedding = verifier.get_input_embeddings()(ids)
    hook.remove()
    low, middle = output.hidden_states[:2]
    last = output.last_hidden_state
    found = {"low": low, "middle": middle, "high": before_norm[0], "last": last}
    after = {"embedding": embedding, "next": last}
    return {
        **{name: one[:, 1:-1].flatten(0, 1) for name, one in found.items()},
        **{name: one[:, 2:].flatten(0, 1) for name, one in after.items()},
    }


def _fitted(inputs: Tensor, wanted: Tensor) -> Tensor:
    """W [D, n] with inputs [N, n] W^T close to what is wanted [N, D]; a ridge, since embeddings of few words depend."""
    inputs, wanted = inputs.double(), wanted.double()
    ridge = 1e-3 * len(inputs) * torch.eye(inputs.shape[1], dtype=torch.float64)
    return torch.linalg.solve(inputs.T @ inputs + ridge, inputs.T @ wanted).T.float().contiguous()


def _normed(states: Tensor) -> Tensor:
    return states * states.pow(2).mean(dim=-1, keepdim=True).add(1e-6).rsqrt()


def _ones(config: Any) -> Tensor:
    return torch.ones(config.hidden_size)


def _layer(config: Any) -> dict[str, Tensor]:
    """One decoder layer with two key and value heads, whose attention and MLP give nothing until weights are put in."""
    width, inner, generator = config.hidden_size, config.intermediate_size, torch.Generator().manual_seed(2)
    norms = ("input_layernorm", "post_attention_layernorm", "hidden_norm")
    return {
        **{
            f"self_attn.{name}_proj.weight": 0.05 * torch.randn(width, width, generator=generator)
            for name in "qkvo"
        },
        "mlp.gate_proj.weight": 0.05 * torch.randn(inner, width, generator=generator),
        "mlp.up_proj.weight": 0.05 * torch.randn(inner, width, generator=generator),
        "mlp.down_proj.weight": torch.zeros(width, inner),
        **{f"{name}.weight": _ones(config) for name in norms},
    }


def _save(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: one.contiguous() for name, one in weights.items()}, folder / "model.safetensors")


class Reference:
    """What a saved head drafts, by its formula in plain PyTorch: an independent reading of the checkpoint.

    Args:
        pair: folder with `verifier`. head: the head's folder, that of the verifier itself for ``mtp``.
    """

    def __init__(self, pair: Path, head: Path, method: str) -> None:
        from transformers import LlamaForCausalLM, Qwen2ForCausalLM

        self.weights, self.method = load_file(head / "model.safetensors"), method
        kind = Qwen2ForCausalLM if method == "mtp" else LlamaForCausalLM
        folder = pair / "verifier"
        self.verifier = (
            kind.from_pretrained(folder) if method != "mtp" else _without_mtp(kind, folder)
        ).eval()
        self.matrix = self.verifier.lm_head.weight.detach()

    def verifier_logits(self, tokens: list[int]) -> tuple[Tensor, Tensor]:
        """Logits [L, V] at every token, and the states [L, ..] that a head begins from."""
        ids, before_norm = torch.tensor([tokens]), []
        hook = self.verifier.model.norm.register_forward_pre_hook(
            lambda module, given: before_norm.append(given[0])
        )
        with torch.no_grad():
            output = self.verifier(ids, output_hidden_states=True)
        hook.remove()
        low, middle, *_, last = output.hidden_states
        states = {
            "eagle": last,
            "mtp": before_norm[0],
            "eagle3": torch.cat([low, middle, before_norm[0]], dim=-1),
        }
        begin = states[self.method][0]
        return output.logits[0], begin @ self.weights["fc.weight"].T if self.method == "eagle3" else begin

    def step(self, state: Tensor, token: int) -> tuple[Tensor, Tensor]:
        """Logits [V] of the token after ``token``, and the state [D] that the next step begins from."""
        embedding = self.verifier.get_input_embeddings().weight.detach()[token]
        if self.method == "eagle":
            state = torch.cat([embedding, state]) @ self.weights["fc.weight"].T
            return state @ self.matrix.T, state
        if self.method == "mtp":
            projection = self.weights["model.mtp_layers.0.input_proj.weight"]
            state = _normed(torch.cat([_normed(state), _normed(embedding)]) @ projection.T)
            return state @ self.matrix.T, state
        state = state + self.weights["midlayer.self_attn.o_proj.weight"] @ _normed(embedding)
        logits = _normed(state) @ self.weights["lm_head.weight"].T
        if "d2t" not in self.weights:
            return logits, state
        known = torch.arange(len(logits)) + self.weights["d2t"]
        return torch.full((len(self.matrix),), -torch.inf).scatter(0, known, logits), state

    def text(self, rule: Any, prompt: list[int], tokens: int, drafts: int) -> tuple[list[int], int, int]:
        """Greedy text under a rule, with blocks of ``drafts`` tokens; and how many were drafted, and how many stood."""
        from deferral_train.rules import verify_block

        said, drafted_count, accepted_count = [int(self.verifier_logits(prompt)[0][-1].argmax())], 0, 0
        while len(said) < tokens:
            _, begin = self.verifier_logits(prompt + said)
            state, token, drafted, rows = begin[-2], said[-1], [], []
            for _ in range(drafts):
                logits, state = self.step(state, token)
                token = int(logits.argmax())
                drafted.append(token)
                rows.append(logits)
            verifier, _ = self.verifier_logits(prompt + said + drafted)
            verdict = verify_block(
                rule,
                torch.tensor([drafted]),
                torch.stack(rows)[None],
                verifier[None, -drafts - 1 :],
                temperature=0.0,
            )
            accepted = int(verdict.accepted)
            said += [*drafted[:accepted], int(verdict.next_token)]
            drafted_count, accepted_count = drafted_count + drafts, accepted_count + accepted
        return said[:tokens], drafted_count, accepted_count


def _without_mtp(kind: Any, folder: Path) -> Any:
    """The verifier of a MiMo checkpoint, a Qwen2 model but for its MTP layer."""
    described = json.loads((folder / "config.json").read_text())
    config = kind.config_class(**{**described, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]})
    model = kind(config)
    weights = {
        name: one for name, one in load_file(folder / "model.safetensors").items() if "mtp_layers" not in name
    }
    model.load_state_dict(weights)
    return model
