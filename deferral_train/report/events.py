"""Scalar curves of a fit, from the TensorBoard events under its folder."""

from __future__ import annotations

from pathlib import Path


def read_training(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag to [(step, value)] of the newest event folder under ``folder``; empty where there is none."""
    events = sorted(folder.rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime)
    if not events:
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(
        str(events[-1].parent), size_guidance={"scalars": 0, "images": 1, "histograms": 1}
    )
    reader.Reload()
    return {
        tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]
    }
