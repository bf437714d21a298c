"""Tiny Llama pairs that vLLM loads, engines over them in this process, and exact distributions to hold them against."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch

from deferral_train.rules import RULES
from deferral_train.serving.config import ServingConfig
from deferral_train.serving.counters import SCALARS

VOCABULARY, DRAFTS, LENGTH = 40, 4, 160


def save_pair(folder: Path, tokenizer: Any = None, heads: int = 1) -> Path:
    """`verifier`, `drafter` (the same weights with noise) of 64 units; heads of 32, which the CPU kernels know.

    Args:
        tokenizer: default one of `VOCABULARY` words.
        heads: key and value heads, at least one for each tensor-parallel rank.
    """
    from tiny_models import tiny_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizer or tiny_tokenizer()
    vocabulary = len(tokenizer)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=heads, head_dim=32, max_position_embeddings=256, pad_token_id=0, eos_token_id=1,
        bos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip

    def model() -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = LlamaForCausalLM(config).eval().requires_grad_(False)
            for parameter in made.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.15)
            made.lm_head.weight.mul_(2.0 / made(torch.randint(4, vocabulary, (8, 16))).logits.std())
        return made

    verifier, drafter = model(), model()
    generator = torch.Generator().manual_seed(1)
    for parameter in drafter.parameters():
        if parameter.dim() > 1:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15 * float(parameter.std()))
    for name, made in (("verifier", verifier), ("drafter", drafter)):
        made.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def start(
    folder: Path, deferral: dict | None = None, drafter: str | None = "drafter", **settings: Any
) -> Any:
    """An engine in this process; without a drafter it does not speculate."""
    from vllm import LLM

    speculative = settings.pop("speculative", {})
    if speculative.get("method") == "ngram":
        settings["speculative_config"] = speculative
    elif drafter is not None:
        settings["speculative_config"] = {
            "model": str(folder / drafter),
            "method": "draft_model",
            "num_speculative_tokens": DRAFTS,
            "draft_sample_method": "probabilistic",
            **speculative,
        }
    if deferral is not None:
        settings["additional_config"] = {"deferral": deferral}
    defaults = {
        "max_model_len": LENGTH,
        "dtype": "float32",
        "max_num_seqs": 64,
        "enforce_eager": True,
        "seed": 0,
    }
    return LLM(model=str(folder / "verifier"), disable_log_stats=False, **{**defaults, **settings})


def stop(llm: Any) -> None:
    """End an engine, so that the next one may start in the same process."""
    llm.llm_engine.engine_core.shutdown()
    gc.collect()


def runner_of(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def seam_of(llm: Any) -> Any:
    return runner_of(llm).rejection_sampler.seam


def use(llm: Any, **settings: Any) -> Any:
    """Put other settings into a running engine (a start costs seconds) and set its counters to zero."""
    seam = seam_of(llm)
    seam.drain()
    config = ServingConfig.parse(settings)
    seam.adopt(config, config.make_rule())
    seam.counters.values[:] = 0
    return seam


def counts(seam: Any) -> dict[str, float]:
    seam.drain()
    return {name: seam.counters.get(name) for name in SCALARS}


def generate(
    llm: Any, prompts: list[list[int]], extra: dict | list | None = None, **sampling: Any
) -> list[list[int]]:
    """Token ids of every prompt; `extra` are extra arguments, for all or one by one."""
    from vllm import SamplingParams

    sampling = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True, **sampling}
    each = extra if isinstance(extra, list) else [extra] * len(prompts)
    params = [SamplingParams(**sampling, extra_args=one) for one in each]
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def prompts(count: int, seed: int = 0, shortest: int = 2, longest: int = 12) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(4, VOCABULARY, (size,), generator=generator).tolist() for size in sizes]


def exact_logits(folder: Path, sequences: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Drafter's and verifier's logits [N, L, V] in float64 over sequences of one length."""
    from transformers import LlamaForCausalLM

    found = []
    for name in ("drafter", "verifier"):
        model = LlamaForCausalLM.from_pretrained(folder / name, dtype=torch.float64).eval()
        with torch.no_grad():
            found.append(model(torch.tensor(sequences)).logits)
    return found[0], found[1]


def loop(
    folder: Path, rule: Any, rows: list[list[int]], tokens: int, temperature: float, seed: int = 0
) -> Any:
    """This project's own loop over prompts of one length: its result with `sequences` and `stats`."""
    from transformers import LlamaForCausalLM

    from deferral_train import cascade_generate

    drafter, verifier = (
        LlamaForCausalLM.from_pretrained(folder / name).eval() for name in ("drafter", "verifier")
    )
    verifier.generation_config.eos_token_id = None
    sampling = (
        {"do_sample": False}
        if temperature == 0
        else {"do_sample": True, "temperature": temperature, "top_k": 0}
    )
    sampling["generator"] = torch.Generator().manual_seed(seed)
    ids = torch.tensor(rows)
    return verifier.generate(
        ids, attention_mask=torch.ones_like(ids), custom_generate=cascade_generate, drafter=drafter, rule=rule,
        num_draft_tokens=DRAFTS, max_new_tokens=tokens, return_dict_in_generate=True, **sampling,
    )  # fmt: skip


def uniformity(
    distributions: torch.Tensor, tokens: torch.Tensor, order: torch.Tensor, bins: int = 20
) -> float:
    """p-value that each token [N] was drawn from its own distribution [N, V].

    Each draw is turned to a number that is uniform under its distribution (the probability of the tokens before it
    in `order` [N, V], plus a random part of its own); their histogram goes to a chi-square test of `bins` cells.
    """
    from scipy.stats import chisquare

    sorted_distributions = distributions.gather(1, order)
    place = (order == tokens[:, None]).double().argmax(dim=1, keepdim=True)
    before = (sorted_distributions.cumsum(1) - sorted_distributions).gather(1, place)[:, 0]
    part = torch.rand(len(tokens), generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    numbers = before + part * sorted_distributions.gather(1, place)[:, 0]
    cells = torch.histc(numbers.clamp(0, 1 - 1e-12), bins, 0, 1)
    return float(chisquare(cells.numpy()).pvalue)


def drafted_and_accepted(engine):
    """The engine's own counters of speculation."""
    found = {metric.name: metric.value for metric in engine.get_metrics() if hasattr(metric, "value")}
    return [found[f"vllm:spec_decode_num_{name}_tokens"] for name in ("draft", "accepted")]


def always_busy(original):
    """`Requests.of` whose requests all count as logged: rows decided by us, whatever their rule."""

    def of(*arguments):
        request = original(*arguments)
        request.logged = True  # a logged row is decided by us, whatever its rule
        return request

    return of


def lossless_ends() -> dict[str, str]:
    """Every rule with a lossless end, at it."""
    return {
        name: f"{name}:{rule.dial.parameter}={rule.dial.lossless:g}"
        for name, rule in RULES.items()
        if rule.dial is not None and rule.dial.lossless is not None and name not in ("judge", "csd")
    }


def greedy_text(folder: Path, rows: list[list[int]], tokens: int) -> list[list[int]]:
    """What the verifier alone says, greedily, by transformers and one prompt at a time."""
    from transformers import LlamaForCausalLM

    verifier = LlamaForCausalLM.from_pretrained(folder / "verifier").eval()
    said = []
    for row in rows:
        ids = torch.tensor([row])
        with torch.no_grad():
            for _ in range(tokens):
                ids = torch.cat([ids, verifier(ids).logits[:, -1:].argmax(-1)], dim=1)
        said.append(ids[0, len(row) :].tolist())
    return said


class Remembering:
    """A head that decides by the tokens before a position, and always leaves the first to the verifier."""

    features = ("previous_token_1", "previous_token_2", "previous_token_3", "position", "draft_position")
    stage, metadata = "verify", {}

    def gap(self, summary):
        code = 5 * summary.previous_token_1 + 3 * summary.previous_token_2 + summary.previous_token_3
        return torch.where(summary.position == 0, 1.0, (code % 3 == 0).float()) - 0.5


def looking_up(pair, kind, folder):
    """A head with look-up tables and the verifier's hidden state, folded, as it comes back from its folder."""
    from transformers import LlamaForCausalLM

    from deferral_train.heads import DeferralHead, GapHead, TokenGapHead
    from deferral_train.heads.folding import folded

    matrix = LlamaForCausalLM.from_pretrained(pair / "verifier").get_output_embeddings().weight.detach()
    widths = {"vocabulary": VOCABULARY, "matrix": matrix.shape[1], "verifier_hidden": matrix.shape[1]}
    shared = ("verifier_margin", "drafter_margin", "verifier_hidden", "verifier_entropy")
    if kind == "token_gap":
        head = TokenGapHead(
            (*shared, "token_embedding"), loss="sequence_sampled", body="linear", widths=widths
        )
    else:
        argmaxes = ("drafter_argmax_embedding", "verifier_argmax_embedding", "argmax_cosine")
        head = GapHead((*shared, *argmaxes), loss="sequence", body="linear", widths=widths)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    head.inputs.lookups.set_matrix(matrix)
    folded(head).save_pretrained(folder)
    return DeferralHead.from_pretrained(folder)


def p_value(distributions, tokens, drafter, verifier, at):
    """p-value that the tokens at some places were drawn from these distributions [N, L, V]."""
    order = (verifier - drafter)[:, at].argsort(-1)  # what a wrong mixture of the two would shift
    size = distributions.shape[-1]
    return uniformity(
        distributions[:, at].reshape(-1, size), tokens[:, at].reshape(-1), order.reshape(-1, size)
    )


def check_rows(traces, pair, asked, said, numbers, first=0):
    """Every logged row against both models run over the very text that the engine gave; ``first``: its first id."""
    import numpy as np

    from deferral_train.rules import summarize

    column = {
        name: traces.column(name) for name in ("position", "token", "kl", "drafter_max", "verifier_logprob")
    }
    rows_of = traces.prompt_of_row
    checked = 0
    for number in numbers:
        name = traces.manifest.prompt_ids[number]
        place = int(name.split("-")[0]) - first
        prompt, text = asked[place], said[place]
        rows = np.flatnonzero(rows_of == number)
        positions = column["position"][rows]
        inside = positions < len(text)  # a block may run over the request's last token
        rows, positions = rows[inside], torch.from_numpy(positions[inside].astype(np.int64))
        assert (np.array(text)[positions] == column["token"][rows]).all()
        drafter, verifier = exact_logits(pair, [prompt + text])
        at = len(prompt) - 1 + positions
        expected = summarize(drafter[0, at], verifier[0, at], token=torch.tensor(text)[positions])
        for field in ("kl", "drafter_max", "verifier_logprob"):
            np.testing.assert_allclose(column[field][rows], expected[field], atol=2e-4)
        checked += len(rows)
    assert checked > 50


def preemptions(engine):
    """Requests that the engine has put aside so far, by its own counter."""
    return next(metric.value for metric in engine.get_metrics() if metric.name == "vllm:num_preemptions")


def remembering(requests, spent):
    """`Requests.forget` that first notes what each request has spent, into the dictionary `spent`."""
    original = requests.forget

    def forget(names):
        names = list(names)
        spent.update(
            {name: requests._known[name].settings.spent for name in names if name in requests._known}
        )
        return original(names)

    return forget


def per_block(found, prefix):
    """Mean drafted tokens that stand per block, and its standard error."""
    blocks = found[prefix + "blocks"]
    mean = (found[prefix + "kept"] + found[prefix + "accepted"]) / blocks
    return mean, ((found[prefix + "squares"] / blocks - mean**2) / blocks) ** 0.5
