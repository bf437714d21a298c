"""`deferral-train train-pair`: a drafter/verifier pair from scratch, as transformers checkpoints."""

from __future__ import annotations

from deferral_train.pairs.scratch.train_config import PairConfig


def run(
    *,
    out: str = "runs/pair",
    pair: PairConfig = PairConfig(),  # noqa: B008 - frozen
    min_nats: float = 0.2,
    min_cost_ratio: float = 3.0,
    fresh: bool = False,
) -> int:
    """Train a drafter and a verifier on text or parallel text and check that they make a pair worth using.

    A rerun continues an interrupted training and reuses a finished one.

    Args:
        out: folder of the pair: ``drafter/``, ``verifier/``, ``training_ids.json``, ``pair.json``.
        pair: text, sizes and schedules; flags such as ``--pair.kind t5`` or a YAML file.
        min_nats: refuse a verifier that is not better by this many nats a token on held-out text.
        min_cost_ratio: refuse a verifier whose pass costs less than this many drafter passes.
        fresh: remove the pair that lies in ``out`` and train anew.
    """
    from deferral_train.pairs.scratch.progress import TrainingBars
    from deferral_train.pairs.scratch.train import train_pair

    with TrainingBars() as bars:
        result = train_pair(pair, out, bars, fresh, print)
    gate = result.gate
    state = "reused" if result.reused else "trained"
    print(f"{state} {result.verifier} and {result.drafter}; what they saw is in {result.training_ids}")
    print(
        f"held-out nats a token: verifier {gate.verifier_nats:.3f}, drafter {gate.drafter_nats:.3f}; "
        f"mean total variation {gate.mean_tv:.3f}; a verifier pass costs {gate.cost_ratio:.1f} drafter passes"
    )
    gate.require(min_nats, min_cost_ratio)
    return 0
