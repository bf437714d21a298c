"""Passes of fixed shape give what ordinary passes give, are built once, and wait for nothing while drafting.

``static`` runs on a CPU what a CUDA graph records on a GPU: the same buffers, masks and slots.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from decoding.helpers import draft_without_looking, generate, pair_of, prompts_for, row_of
from decoding.test_generate import Head
from tiny_models import KINDS, tiny_config, tiny_model
from torch._dynamo.utils import counters

from deferral_train.decoding import CascadeOutput
from deferral_train.decoding.compiled import StaticModel
from deferral_train.decoding.pair import Settings
from deferral_train.decoding.proposing import ModelProposer
from deferral_train.decoding.static_shape import Shape
from deferral_train.decoding.static_shelf import _SHELVES, lent, release_passes
from deferral_train.decoding.static_support import NotStaticError, reason_against
from deferral_train.decoding.stopping import ConfidenceStop
from deferral_train.errors import InputError
from deferral_train.rules import LearnedRule, make_rule


def both(
    kind: str, compile: str, rule: Any = "lossless", **options: Any
) -> tuple[CascadeOutput, CascadeOutput]:
    """The same call with ordinary passes and with passes of fixed shape; rows leave and others join.

    When sampling nobody waits: who draws first from the generator depends on where a row that joins is put.
    """
    drafter, verifier, _ = pair_of(kind, options.pop("drafter", "sometimes"))
    inputs = prompts_for(kind, rows=6, seed=options.pop("prompts", 0))
    at_once = None if options.get("do_sample") else 3
    options = {"max_new_tokens": 14, "rows_at_once": at_once, **options}
    results = []
    for how in ("off", compile):
        generator = torch.Generator().manual_seed(5)
        results.append(generate(drafter, verifier, inputs, rule, compile=how, generator=generator, **options))
    return results[0], results[1]


def alike(ordinary: CascadeOutput, static: CascadeOutput) -> bool:
    """The same tokens of the same origin, from the same number of drafts."""
    return all(
        torch.equal(*found)
        for found in (
            (ordinary.sequences, static.sequences),
            (ordinary.stats.origin, static.stats.origin),
            (ordinary.stats.drafted, static.stats.drafted),
            (ordinary.stats.drafter_calls, static.stats.drafter_calls),
        )
    )


@pytest.mark.parametrize("drafter", ["always", "sometimes"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tokens_from_ragged_rows_that_leave_and_join(kind: str, drafter: str) -> None:
    ordinary, static = both(kind, "static", drafter=drafter)
    assert alike(ordinary, static)
    assert static.stats.ways == {"drafter": "static", "verifier": "static"}
    assert set(ordinary.stats.ways.values()) == {"dynamic"}


LIMITED = make_rule("chow", alpha=0.4)
CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "opt": lambda: {"rule": make_rule("opt", alpha=0.2)},
    "sampled": lambda: {"rule": make_rule("token_v3", alpha=0.3), "do_sample": True, "temperature": 0.8},
    "truncated": lambda: {"do_sample": True, "top_k": 6, "top_p": 0.9},
    "exact bonus": lambda: {"rule": LIMITED, "bonus": "exact", "do_sample": True},
    "processors": lambda: {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "stop": lambda: {"stop": ConfidenceStop(0.5)},
    "short blocks": lambda: {"num_draft_tokens": 1},
    "long blocks": lambda: {"num_draft_tokens": 9, "max_new_tokens": 12},
    "bounded": lambda: {"rule": make_rule("opt", alpha=0.2), "max_request_loss": 0.5},
    "token": lambda: {"rule": LIMITED, "execution": "token"},
    "token, reads the verifier": lambda: {"rule": make_rule("opt", alpha=0.2), "execution": "token"},
    "lazy": lambda: {"rule": LIMITED, "execution": "lazy"},
    "sequence": lambda: {"rule": LIMITED, "execution": "sequence"},
    "drafter alone": lambda: {"rule": "drafter_only"},
    "verifier alone": lambda: {"rule": "verifier_only"},
    "head": lambda: {"rule": LearnedRule(head=Head(), alpha=0.3)},
}


@pytest.mark.parametrize(
    ("kind", "case"),
    [("gemma3", case) for case in CASES]
    + [("t5", case) for case in ("sampled", "long blocks", "token", "sequence", "head")],
)
def test_the_same_whatever_is_asked(kind: str, case: str) -> None:
    ordinary, static = both(kind, "static", **CASES[case]())
    assert alike(ordinary, static)
    assert static.stats.ways["drafter"] == "static"


@pytest.mark.parametrize(("kind", "backend"), [("t5", "eager"), ("gemma3", "aot_eager")])
def test_one_graph_per_pass_and_none_built_later(kind: str, backend: str) -> None:
    """fullgraph leaves no way to ask the device for a value; after the first call nothing is compiled."""
    rule = LearnedRule(head=Head(), alpha=0.3)
    drafter, verifier, _ = pair_of(kind, "sometimes")
    release_passes(drafter, verifier)  # another test may have built the same ones
    torch.compiler.reset()
    counters.clear()
    ordinary, static = both(kind, backend, rule)
    assert alike(ordinary, static)
    assert counters["stats"]["unique_graphs"] == 3  # the drafter's two widths and the verifier's one
    assert not counters["graph_break"]
    one = row_of(kind, prompts_for(kind, rows=4), 0)  # shorter, one row less than half of the slots
    few = {name: values[:2] for name, values in prompts_for(kind, rows=4, seed=3).items()}
    with torch.compiler.set_stance("fail_on_recompile"):
        assert alike(*both(kind, backend, rule, prompts=8, max_new_tokens=13, rows_at_once=4))
        for inputs in (one, few):
            assert torch.equal(
                generate(drafter, verifier, inputs, rule, compile=backend).sequences,
                generate(drafter, verifier, inputs, rule, compile="off").sequences,
            )
    assert counters["stats"]["unique_graphs"] == 3


@pytest.mark.parametrize("kind", ["t5", "llama"])
@pytest.mark.parametrize("sampled", [False, True])
def test_a_draft_waits_for_nothing(kind: str, sampled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA: between the start of a draft and its end the host reads no tensor and sends none but through
    pinned memory. The tokens are the same.
    """
    options = {"do_sample": sampled, "drafter": "always"}
    expected = both(kind, "static", **options)[0]
    propose = ModelProposer.propose
    reads: list[str] = []

    def spied(self: ModelProposer, *arguments: Any) -> Any:
        if getattr(self.drafter, "_empty", True):  # prompts are an ordinary pass
            return propose(self, *arguments)
        with pytest.MonkeyPatch.context() as patch:
            for name in ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "cpu"):
                real = getattr(torch.Tensor, name)
                patch.setattr(
                    torch.Tensor, name, lambda *a, _name=name, _real=real: (reads.append(_name), _real(*a))[1]
                )
            return propose(self, *arguments)

    draft_without_looking(monkeypatch)
    monkeypatch.setattr(ModelProposer, "propose", spied)
    # NumPy's argmax is the CPU's own way; a GPU takes torch's.
    monkeypatch.setattr(
        "deferral_train.decoding.laws.lowest_argmax", lambda values: values.max(dim=-1).indices
    )
    found = both(kind, "static", **options)[1]
    assert torch.equal(found.sequences, expected.sequences)
    assert reads == []


@pytest.mark.parametrize("case", ["sampled", "exact bonus", "head", "stop"])
def test_results_are_taken_before_they_are_overwritten(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replayed graph writes its logits and hidden states where the last replay did."""
    run = StaticModel.run
    places: dict[Any, torch.Tensor] = {}

    def in_place(self: StaticModel, model: Any, width: int, keep: int) -> torch.Tensor:
        logits = run(self, model, width, keep)
        fixed = places.setdefault((id(self), width), torch.empty_like(logits)).copy_(logits)
        if self.hidden is not None:
            self.hidden = places.setdefault((id(self), -width), torch.empty_like(self.hidden)).copy_(
                self.hidden
            )
        return fixed

    monkeypatch.setattr(StaticModel, "run", in_place)
    assert alike(*both("gemma3", "static", **CASES[case]()))
    assert places


def test_passes_are_kept_lent_and_dropped_with_their_model() -> None:
    drafter, verifier = tiny_model("llama", 1), tiny_model("llama", 2)
    inputs = prompts_for("llama")
    generate(drafter, verifier, inputs, "lossless", compile="static")
    first = _SHELVES[drafter].built[0]
    generate(drafter, verifier, inputs, "lossless", compile="static", max_new_tokens=9)
    assert _SHELVES[drafter].built == [first]
    with (
        lent(drafter, first.shape, lambda built: None) as one,
        lent(drafter, first.shape, lambda built: None) as other,
    ):
        assert one is first
        assert other is not first  # lent out: another call has buffers of its own
    assert len(_SHELVES[drafter].built) == 1  # one of a shape is kept
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.data = parameter.data.clone()  # moved: recorded addresses no longer hold
    generate(drafter, verifier, inputs, "lossless", compile="static")
    assert first not in _SHELVES[drafter].built
    known = len(_SHELVES)
    del drafter, verifier, first, one, other
    gc.collect()
    assert len(_SHELVES) == known - 2


def test_passes_are_built_anew_for_what_a_recording_would_not_notice() -> None:
    model = tiny_model("llama", 1)
    shape = Shape.around(1, 8, 0, "static", True, ((1, 1),))

    def current() -> StaticModel:
        with lent(model, shape, lambda built: None) as static:
            return static

    layer, rope = model.model.layers[0], model.model.rotary_emb
    changes: list[Callable[[], Any]] = [
        lambda: setattr(layer, "_active_adapter", ["first"]),
        lambda: setattr(layer, "_active_adapter", ["second"]),
        lambda: setattr(layer, "_disable_adapters", True),
        lambda: layer.register_forward_hook(lambda module, arguments, output: None),
        lambda: rope.register_buffer("inv_freq", rope.inv_freq.clone(), persistent=False),
        lambda: release_passes(model),
        release_passes,
    ]
    for change in changes:
        before = current()
        assert current() is before
        change()
        assert current() is not before


def test_calls_in_several_threads_borrow_passes_of_their_own() -> None:
    drafter, verifier, _ = pair_of("llama")
    inputs = [prompts_for("llama", seed=seed) for seed in range(4)]
    wanted = [generate(drafter, verifier, one, "opt", compile="off").sequences for one in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(
            lambda one: generate(drafter, verifier, one, "opt", compile="static").sequences, inputs * 3
        )
    assert all(torch.equal(one, other) for one, other in zip(found, wanted * 3))


def test_shapes_are_rounded_up_and_serve_smaller_calls() -> None:
    passes = ((1, 1), (2, 1))
    asked = Shape.around(5, 300, 40, "static", False, passes)
    assert (asked.slots, asked.columns, asked.states) == (8, 512, 64)
    assert Shape.around(1, 10, 0, "static", False, passes) == Shape(1, 128, 0, "static", False, passes)
    assert asked.serves(Shape.around(2, 129, 33, "static", False, passes))
    assert not asked.serves(Shape.around(1, 300, 40, "static", False, passes))  # eight times the rows
    assert not asked.serves(Shape.around(9, 300, 40, "static", False, passes))
    assert not asked.serves(Shape.around(5, 300, 40, "eager", False, passes))
    assert not asked.serves(Shape.around(5, 300, 40, "static", True, passes))


def odd_models() -> dict[str, Any]:
    """Models that static shapes do not fit, and a word of the reason."""
    import transformers

    torch.manual_seed(0)
    size = {"vocab_size": 40, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    local = transformers.GPTNeoConfig(
        hidden_size=32, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], window_size=3,
        max_position_embeddings=128, **size,
    )  # fmt: skip
    alibi = transformers.FalconConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, alibi=True, **size
    )
    flash = tiny_model("llama")
    flash.config._attn_implementation = "flash_attention_2"
    auto = transformers.AutoModelForCausalLM
    return {
        "other logits": auto.from_config(local).eval(),
        "ValueError": auto.from_config(alibi).eval(),
        "flash_attention_2": flash,
    }


@pytest.mark.parametrize("word", ["other logits", "ValueError", "flash_attention_2"])
def test_what_does_not_fit_is_refused_with_its_reason(word: str) -> None:
    model = odd_models()[word]
    with pytest.raises(InputError, match=word) as error:
        generate(model, model, prompts_for("llama"), "lossless", compile="static")
    assert "\n" not in str(error.value)
    assert "compile='auto'" in str(error.value)


def test_auto_goes_on_without_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA ``auto`` means ``static`` and falls back; a CPU stays with ordinary passes."""
    from deferral_train.decoding import static_stepper

    drafter, verifier, _ = pair_of("llama")
    inputs = prompts_for("llama")
    plain = generate(drafter, verifier, inputs, "lossless")
    assert set(plain.stats.ways.values()) == {"dynamic"}
    monkeypatch.setattr(
        static_stepper, "reason_against", lambda model: "has no luck" if model is drafter else None
    )
    monkeypatch.setattr(static_stepper, "suits", lambda device: True)
    found = generate(drafter, verifier, inputs, "lossless")
    assert found.stats.ways == {"drafter": "dynamic: has no luck", "verifier": "static"}
    assert alike(plain, found)


def test_a_failed_build_is_remembered() -> None:
    model = odd_models()["other logits"]
    assert reason_against(model) is None  # only running it shows
    for _ in range(2):
        with pytest.raises(InputError, match="off by"):
            generate(model, model, prompts_for("llama"), "lossless", compile="static")
    shape = next(iter(_SHELVES[model].failed))
    with pytest.raises(NotStaticError, match="off by"), lent(model, shape, lambda built: None):
        raise AssertionError("was built again")


def test_unknown_ways_are_refused() -> None:
    drafter, verifier, _ = pair_of("llama")
    with pytest.raises(InputError, match="compile is 'triton'; use one of auto, off, static"):
        generate(drafter, verifier, prompts_for("llama"), "lossless", compile="triton")
    with pytest.raises(InputError, match="compile is True"):
        Settings(compile=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("compile", ["off", "static"])
def test_drafts_may_run_on_behind_the_end_of_the_context(compile: str) -> None:
    """A row at the model's last position stands beside rows that still draft."""
    drafter, verifier, _ = pair_of("gpt2", "sometimes")
    assert tiny_config("gpt2").n_positions == 128
    inputs = prompts_for("gpt2")
    options = {"max_new_tokens": 128 - inputs["input_ids"].shape[1], "eos_token_id": None}
    ordinary = verifier.generate(**inputs, do_sample=False, **options)
    ours = generate(drafter, verifier, inputs, "lossless", compile=compile, **options)
    assert torch.equal(ours.sequences, ordinary)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_graphs(kind: str) -> None:
    """The same tokens as without; a draft makes the host wait for nothing."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    drafter, verifier = (one.to("cuda") for one in pair_of(kind)[:2])
    inputs = {name: values.to("cuda") for name, values in prompts_for(kind, rows=7).items()}
    options = {"max_new_tokens": 20, "rows_at_once": 3}
    ordinary = generate(drafter, verifier, inputs, "lossless", compile="off", **options)
    propose = ModelProposer.propose

    def strict(self: ModelProposer, *arguments: Any) -> Any:
        if getattr(self.drafter, "_empty", True):  # prompts are an ordinary pass
            return propose(self, *arguments)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return propose(self, *arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelProposer, "propose", strict)
        static = generate(drafter, verifier, inputs, "lossless", **options)
    assert alike(ordinary, static)
    assert static.stats.ways == {"drafter": "static, CUDA graphs", "verifier": "static, CUDA graphs"}
    inductor = generate(drafter, verifier, inputs, "lossless", compile="inductor", **options)
    assert torch.equal(ordinary.sequences, inductor.sequences)
