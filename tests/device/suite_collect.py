"""Collecting, fitting and the engine's verdict give on the pretend accelerator what they give on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from device import pretend_device
from device.cases import head_of
from pytorch_lightning.accelerators import Accelerator, AcceleratorRegistry
from pytorch_lightning.strategies import SingleDeviceStrategy, StrategyRegistry
from tiny_models import WORDS, tiny_model, tiny_pair
from training.trace_maker import small_language, write_traces

from deferral_train.collecting import CollectConfig, collect
from deferral_train.heads.rules import learned_rule
from deferral_train.pairs.gate import check_pair
from deferral_train.pairs.load import ModelPair, make_pair
from deferral_train.pairs.prompts import Prompt
from deferral_train.rules import make_rule
from deferral_train.serving.blocks import DraftedRows, RowSettings, verify
from deferral_train.traces import open_traces
from deferral_train.training.config import FitConfig
from deferral_train.training.fit import fit

pretend_device.install()


def prompts(count: int = 5) -> list[Prompt]:
    random = np.random.default_rng(0)

    def text() -> str:
        return " ".join(WORDS[n] for n in random.integers(0, len(WORDS), random.integers(2, 8)))

    return [Prompt(f"q{n}", text(), text()) for n in range(count)]


def pair_on(drafter: str, verifier: str, kind: str = "llama") -> ModelPair:
    models = tiny_pair(kind, 3, layers=1)
    return make_pair(models[0].to(drafter), models[1].to(verifier), models[2])


def _length(texts: Any, references: Any) -> np.ndarray:
    """A quality of texts that differs from text to text."""
    return np.array([len(text) for text in texts]) / 50


def same_traces(tmp_path: Path, devices: tuple[str, str], kind: str = "llama", **settings: Any) -> None:
    """Collect on the CPU and on ``devices``; every column must agree."""
    config = CollectConfig(
        **{
            "log_top_k": 4,
            "chunk_prompts": 3,
            "batch_tokens": 40,
            "hidden": "both",
            "max_new_tokens": 6,
            **settings,
        }
    )
    scores = {config.metrics[0]: _length} if config.labels == "autojudge" else None
    found = []
    for name, places in (("cpu", ("cpu", "cpu")), ("sim", devices)):
        out = tmp_path / name
        collect(config, out, progress=False, models=pair_on(*places, kind), prompts=prompts(), scores=scores)
        found.append(open_traces(out, verify=True))
    here, there = found
    assert len(here) == len(there) > 20
    assert here.columns == there.columns
    for name in here.columns:
        ours, theirs = np.asarray(here.column(name)), np.asarray(there.column(name))
        if ours.dtype.kind == "f":
            np.testing.assert_allclose(
                theirs.astype(float), ours.astype(float), atol=2e-3, rtol=2e-3, err_msg=name
            )
        else:
            np.testing.assert_array_equal(theirs, ours, err_msg=name)


MODES: dict[str, dict[str, Any]] = {
    "reference": {},
    "drafter": {"prefixes": "drafter"},
    "verifier": {"prefixes": "verifier", "temperature": 0.0},
    "cascade": {"prefixes": "cascade", "rule": "opt:alpha=0.1", "temperature": 0.7},
    "selfjudge": {
        "prefixes": "verifier",
        "temperature": 0.0,
        "labels": "selfjudge",
        "label_window": 3,
        "log_top_k": 0,
    },
    "autojudge": {"prefixes": "verifier", "temperature": 0.0, "labels": "autojudge", "log_top_k": 0},
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_collect(mode: str, tmp_path: Path) -> None:
    same_traces(tmp_path, ("sim", "sim"), **MODES[mode])


@pytest.mark.parametrize("mode", ["reference", "drafter", "cascade"])
def test_collect_with_the_models_on_two_devices(mode: str, tmp_path: Path) -> None:
    same_traces(tmp_path, ("cpu", "sim"), **MODES[mode])


def test_collect_of_an_encoder_decoder(tmp_path: Path) -> None:
    same_traces(tmp_path, ("sim", "sim"), "t5")


def test_collect_behind_a_learned_rule(tmp_path: Path) -> None:
    head = head_of("gap", "verify")
    head.metadata = {"alpha": 0.05}
    head.save_pretrained(tmp_path / "head")
    same_traces(
        tmp_path,
        ("sim", "sim"),
        prefixes="cascade",
        rule=f"learned:head={tmp_path / 'head'}",
        temperature=0.0,
    )


def test_a_pair_is_scored_and_timed_on_two_devices() -> None:
    results = [
        check_pair(pair_on(*places), prompts(), tries=1) for places in (("cpu", "cpu"), ("cpu", "sim"))
    ]
    assert results[0].tokens == results[1].tokens > 0
    for name in ("drafter_nats", "verifier_nats", "mean_tv", "agreement"):
        assert getattr(results[1], name) == pytest.approx(getattr(results[0], name), abs=1e-4)


# A fit, through Lightning's own way to bring an accelerator


class SimAccelerator(Accelerator):
    """The pretend device as Lightning's."""

    def setup_device(self, device: torch.device) -> None:
        pass

    def teardown(self) -> None:
        pass

    @staticmethod
    def parse_devices(devices: Any) -> int:
        return int(devices)

    @staticmethod
    def get_parallel_devices(devices: int) -> list[torch.device]:
        return [torch.device("sim", index) for index in range(devices)]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def name() -> str:
        return "sim"


@pytest.fixture(scope="module", autouse=True)
def lightning_knows_the_device() -> Iterator[None]:
    AcceleratorRegistry.register("sim", SimAccelerator)
    StrategyRegistry.register("sim", SingleDeviceStrategy, device="sim:0")
    yield
    AcceleratorRegistry.remove("sim")
    StrategyRegistry.remove("sim")


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("traces")
    for name, sequences, seed in (("train", 30, 1), ("val", 20, 2)):
        write_traces(root / name, small_language(), sequences, 12, seed)
    return root


FITS = {
    "gap": {"head": "gap"}, "cost_sensitive": {"head": "cost_sensitive"}, "truth_mixture": {"head": "truth_mixture"},
    "token": {"head": "token"}, "draft": {"head": "gap", "stage": "draft"},
    "judge": {"head": "judge", "stage": "draft", "truth": "acceptance"},
    "recalibrated": {"head": "gap", "recalibration": "isotonic"},
}  # fmt: skip


@pytest.mark.parametrize("name", FITS)
def test_a_fit_of_one_epoch(name: str, traces: Path, tmp_path: Path) -> None:
    heads = []
    for device, strategy in (("cpu", "auto"), ("sim", "sim")):
        config = FitConfig(
            train=str(traces / "train"), val=str(traces / "val"), hidden=(8,), batch_size=64, epochs=1, figure_every=0,
            accelerator=device, strategy=strategy, **FITS[name],
        )  # fmt: skip
        done = fit(config, tmp_path / device)
        heads.append(done)
    for ours, theirs in zip(heads[0].head.state_dict().values(), heads[1].head.state_dict().values()):
        torch.testing.assert_close(theirs.cpu(), ours, atol=1e-4, rtol=1e-3)
    assert heads[1].metrics["regret"] == pytest.approx(heads[0].metrics["regret"], abs=1e-3)


# The verdict of a serving step

STEP_RULES = {
    "lossless": lambda: make_rule("lossless"),
    "opt": lambda: make_rule("opt", alpha=0.1),
    "token_v3": lambda: make_rule("token_v3", alpha=0.5),
    "typical": lambda: make_rule("typical", epsilon=0.1),
    "learned": lambda: learned_rule(head_of("gap", "verify"), 0.05),
    "learned tokens": lambda: learned_rule(head_of("token", "verify"), 0.05),
}


@pytest.mark.parametrize("limit", [None, 0.3])
@pytest.mark.parametrize("name", STEP_RULES)
def test_the_verdict_of_a_serving_step(name: str, limit: float | None) -> None:
    rows, drafts, vocabulary = 9, 3, 11
    generator = torch.Generator().manual_seed(0)
    verifier = 1.5 * torch.randn(rows, drafts, vocabulary, generator=generator)
    drafter = verifier + torch.randn(rows, drafts, vocabulary, generator=generator)
    temperatures = [(0.0, 0.7, 1.0)[row % 3] for row in range(rows)]
    drafted = torch.stack(
        [
            logits.argmax(-1) if not t else (logits / t).softmax(-1).multinomial(1, generator=generator)[:, 0]
            for logits, t in zip(drafter, temperatures)
        ]
    )
    lengths = torch.tensor([1 + row % drafts for row in range(rows)])
    numbers = torch.rand(rows, drafts + 1, dtype=torch.float64, generator=generator)
    place = torch.arange(rows * drafts).view(rows, drafts)
    outcomes = []
    for device in ("cpu", "sim"):
        step = DraftedRows(
            drafted.to(device), lengths.to(device), verifier.to(device), temperatures, drafter.to(device),
            [True] * rows, context={"position": place.to(device)},
        )  # fmt: skip
        plans = [RowSettings(STEP_RULES[name](), limit, 0.02 * row) for row in range(rows)]
        outcomes.append(verify(step, plans, numbers.to(device)).host())
    for field in ("accepted", "correction", "origin", "deferred"):
        ours, theirs = (torch.as_tensor(getattr(one, field)) for one in outcomes)
        assert torch.equal(theirs.cpu(), ours), field
    torch.testing.assert_close(
        torch.as_tensor(outcomes[1].loss), torch.as_tensor(outcomes[0].loss), atol=1e-6, rtol=0
    )
    assert not outcomes[0].faults
    assert not outcomes[1].faults


def test_a_verifier_spread_by_accelerate_decodes_and_collects() -> None:
    accelerate = pytest.importorskip("accelerate")
    from deferral_train.decoding import cascade_generate

    drafter, verifier, _ = tiny_pair("llama", 3)
    ids = torch.tensor([[5, 9, 12, 7], [0, 8, 30, 21]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    given = {"input_ids": ids, "attention_mask": mask}
    options = {"do_sample": False, "max_new_tokens": 8}
    expected = verifier.generate(**given, **options)
    spread = tiny_model("llama", 3)
    places = {"model.embed_tokens": "sim:0", "model.rotary_emb": "sim:0", "model.layers.0": "sim:0"}
    places |= {"model.layers.1": "sim:1", "model.norm": "sim:1", "lm_head": "sim:1"}
    spread = accelerate.dispatch_model(spread, device_map=places)
    there = {name: value.to("sim:0") for name, value in given.items()}
    assert torch.equal(spread.generate(**there, **options).cpu(), expected)
    found = spread.generate(**there, **options, custom_generate=cascade_generate, drafter=drafter.to("sim:0"))
    assert torch.equal(found.cpu(), expected)
