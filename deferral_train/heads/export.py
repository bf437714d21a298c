"""Export: a fitted head as a folder, with its operating point and what it costs here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deferral_train.errors import InputError
from deferral_train.heads.artifact import CARD, CONFIG, ONNX, WEIGHTS, import_hub
from deferral_train.heads.base import DeferralHead
from deferral_train.heads.config import MAX_ALPHA
from deferral_train.heads.cost import measure_cost
from deferral_train.heads.fingerprint import weights_key
from deferral_train.redaction import WITHHELD


def export_head(
    head: DeferralHead, folder: str | Path, alpha: float | None = None, threshold: float | None = None
) -> Path:
    """Write config.json, model.safetensors and README.md with the head's measured cost.

    Args:
        head: what to write; its metadata gains the cost, and the operating point where one is given.
        folder: where to.
        alpha: operating point; a certificate, which was of another one, is dropped. None keeps both.
        threshold: the same for a judge head, 0 to 1.

    Raises:
        InputError: alpha or threshold out of range, or for another head; alpha for a judge head.
    """
    given = {"alpha": alpha, "threshold": threshold}
    for other, value in given.items():
        if other != head.dial and value is not None:
            raise InputError(f"{other}: the dial of a {head.head_type} head is {head.dial}; give that")
    if threshold is not None and not 0 <= threshold <= 1:
        raise InputError(f"threshold is {threshold}; give a number from 0 to 1")
    if alpha is not None and not abs(alpha) <= MAX_ALPHA:
        raise InputError(f"alpha is {alpha:g}; give a number up to {MAX_ALPHA:g} in size")
    point = {name: float(value) for name, value in given.items() if value is not None}
    if point:
        kept = {name: value for name, value in head.metadata.items() if name != "certificate"}
        head.metadata = kept | point
    head.metadata = {**head.metadata, "cost": measure_cost(head)}
    return head.save_pretrained(folder)


def set_operating_point(
    folder: str | Path,
    alpha: float,
    certificate: Mapping[str, Any] | None = None,
    expected: Mapping[str, Any] | None = None,
) -> None:
    """Write an operating point and its certificate into an exported head, and renew its card.

    Args:
        folder: of the head.
        alpha: value of the head's dial: alpha, or a judge head's threshold.
        certificate: what was certified at that value; None drops the one that is there.
        expected: what was measured at that value (:mod:`deferral_train.evaluation.expectation`), kept under
            ``evaluation``; None drops the one that is there.
    """
    head = DeferralHead.from_pretrained(folder)
    head.metadata = {**head.metadata, head.dial: float(alpha)}
    head.metadata.pop("certificate", None)
    evaluation = {
        name: value for name, value in head.metadata.get("evaluation", {}).items() if name != "expected"
    }
    if expected is not None:
        evaluation |= {
            "metrics": evaluation.get("metrics", {}),
            "expected": {**expected, "weights": weights_key(head)},
        }
    head.metadata.pop("evaluation", None)
    if evaluation:
        head.metadata["evaluation"] = evaluation
    if certificate is not None:
        head.metadata["certificate"] = {**certificate, "weights": weights_key(head)}
    head.save_pretrained(folder)


def push_to_hub(head: DeferralHead, folder: str | Path, repo_id: str, token: str | None = None) -> str:
    """Save to ``folder`` and upload its files to ``repo_id``; returns the address. Needs huggingface_hub.

    Raises InputError where the hub refuses: no such name, no token, a token that may not write, no network.
    """
    hub = import_hub()
    head.save_pretrained(folder)
    api = hub.HfApi(token=token)
    patterns = [CONFIG, WEIGHTS, CARD, ONNX]
    try:
        api.create_repo(repo_id, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=str(folder), allow_patterns=patterns))
    except Exception as error:  # refusals, no network, a bad name: each its own class
        raise InputError(
            f"{repo_id}: the hub did not take the head ({_without(token, ' '.join(str(error).split()))[:160]}); "
            f"the files are in {folder}; check the name and that the token may write"
        ) from None


def _without(token: str | None, text: str) -> str:
    return text.replace(token, WITHHELD) if token else text
