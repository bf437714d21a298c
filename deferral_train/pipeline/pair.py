"""The pair stage: train a pair or take the user's, and see whether it is worth the rest of the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deferral_train import provenance
from deferral_train.pairs.gate import GateResult, check_pair
from deferral_train.pairs.load import ModelPair, load_models
from deferral_train.pairs.scratch.progress import TrainingBars
from deferral_train.pairs.scratch.train import train_pair
from deferral_train.pairs.scratch.train_config import PairConfig
from deferral_train.pipeline.ask import taught
from deferral_train.pipeline.config import GateConfig, PairSection
from deferral_train.pipeline.console import RunConsole
from deferral_train.pipeline.text import read_part, refuse_seen

FOLDER = "pair"
GATE_FILE = "gate.json"
# Held-out prompts that a brought pair is scored and timed on.
GATE_PROMPTS = 100


def prepare_pair(
    config: PairSection, gate: GateConfig, run: Path, console: RunConsole, questions: bool = False
) -> dict[str, Any]:
    """Train or check the pair; returns where it lies, its gate and how many training texts were compared.

    Args:
        questions: the run asks questions of its own, and a pair to be trained learns from some of them.

    Raises:
        InputError: the pair fails a required gate, or prompts of the run were in its training text.
    """
    if config.train is not None:
        result = _trained(taught(config.train, run) if questions else config.train, run, console)
    else:
        result = _brought(config, run, console)
    compared = refuse_seen(Path(result["drafter"]).parent, run)
    measured = GateResult(**result["gate"])
    if gate.required:
        measured.require(gate.min_nats, gate.min_cost_ratio)
    warnings = measured.reasons(gate.min_nats, gate.min_cost_ratio)
    console.line(
        f"       held-out nats a token: drafter {measured.drafter_nats:.2f}, verifier {measured.verifier_nats:.2f}; "
        f"mean total variation {measured.mean_tv:.2f}; a verifier pass costs {measured.cost_ratio:.1f} drafter passes"
    )
    return {**result, "compared_training_texts": compared, "warnings": warnings}


def open_pair(config: PairSection, result: Mapping[str, Any]) -> ModelPair:
    """The models that the pair stage settled on."""
    return _load(config, result["drafter"], result["verifier"])


def _load(config: PairSection, drafter: str, verifier: str) -> ModelPair:
    """Two checkpoints where the config wants them."""
    return load_models(
        drafter,
        verifier,
        config.device,
        config.dtype,
        drafter_device=config.drafter_device,
        device_map=config.device_map,
    )


def _trained(config: PairConfig, run: Path, console: RunConsole) -> dict[str, Any]:
    with TrainingBars(console.console) as bars:
        done = train_pair(config, run / FOLDER, bars, say=console.indented)
    return {
        "drafter": str(done.drafter),
        "verifier": str(done.verifier),
        "gate": asdict(done.gate),
        "trained": True,
    }


def _brought(config: PairSection, run: Path, console: RunConsole) -> dict[str, Any]:
    """Score and time a pair once; timings are noisy, so a rerun reads what was measured first."""
    record = run / FOLDER / GATE_FILE
    pair = _load(config, config.drafter, config.verifier)
    wanted = {"fingerprints": pair.fingerprints, "device": str(pair.device)}
    stored = provenance.read_object(record, "remove it") or {}
    if stored.get("for") == wanted and isinstance(stored.get("gate"), dict):
        gate = stored["gate"]
    else:
        prompts = read_part(run, "validation", GATE_PROMPTS)
        gate = asdict(check_pair(pair, prompts, say=console.indented))
        provenance.write_json(record, {"for": wanted, "gate": gate})
    return {"drafter": config.drafter, "verifier": config.verifier, "gate": gate, "trained": False}
