"""Evidence for a certificate: a decode folder that is whole, and what it says about the weights that were decoded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deferral_train.decoding.outputs import BATCHES, OUTPUTS, RUN, SUMMARY, read_lines
from deferral_train.errors import InputError
from deferral_train.evaluation.settings import Dials, dials_of
from deferral_train.heads.fingerprint import weights_key
from deferral_train.provenance import read_json

CONDITIONS = ("engine", "temperature", "dtype", "quantization")
DECODING = ("num_draft_tokens", "max_new_tokens", "top_k", "top_p", "execution", "bonus", "max_request_loss")
AGAIN = "run the same decode again to finish it"


@dataclass(frozen=True)
class Evidence:
    """A decode folder as `choose` reads it.

    Attributes:
        folder: where it lies.
        rows: of ``outputs.jsonl``.
        record: of ``run.json``, what was decoded; None for rows that no decode run wrote here.
        summary: of ``summary.json``; None where there is none.
    """

    folder: Path
    rows: list[dict[str, Any]]
    record: Mapping[str, Any] | None
    summary: Mapping[str, Any] | None

    @property
    def dials(self) -> Dials | None:
        """The dial of each label."""
        try:
            return None if self.summary is None else dials_of(self.summary)
        except (KeyError, AttributeError, TypeError):
            raise InputError(f"{self.folder / SUMMARY} is damaged; {AGAIN}") from None

    @property
    def conditions(self) -> dict[str, Any]:
        """Engine, number formats, temperature and pair that the outputs were decoded with: a claim holds for these."""
        found = (self.summary or {}).get("conditions") or {}
        pair = (self.record or {}).get("pair")
        settings = (self.summary or {}).get("settings") or {}
        decoding = {name: settings[name] for name in DECODING if settings.get(name) is not None}
        conditions = {name: found.get(name) for name in CONDITIONS}
        return conditions | ({"pair": pair} if pair else {}) | ({"decoding": decoding} if decoding else {})

    def check_head(self, head: Any, label: str, folder: str) -> None:
        """Refuse a head of other weights than those that were decoded under ``label``.

        Raises:
            InputError: the weights differ, or the outputs do not say which were decoded.
        """
        if self.record is None:
            return
        rule = (self.record.get("rules") or {}).get(label)
        decoded = rule.get("head") if isinstance(rule, Mapping) else None
        if not isinstance(decoded, Mapping) or "weights" not in decoded:
            raise InputError(
                f"outputs={self.folder} do not say which head's weights they were decoded with (an earlier release); "
                "decode again, or leave head out"
            )
        if decoded["weights"] != weights_key(head):
            raise InputError(
                f"head={folder} has other weights than those decoded in {self.folder} as {label}; nothing was stored: "
                "name the head that was decoded, or decode this one"
            )


def read_evidence(folder: str | Path) -> Evidence:
    """Outputs of a decode run that came to its end.

    Raises:
        InputError: no outputs, a run that was cut short or is still going on, or damaged files.
    """
    root = Path(folder)
    if not (root / OUTPUTS).is_file():
        raise InputError(f"outputs={root} holds no {OUTPUTS}; give the --out of a decode run")
    rows = [_checked(row, root) for row in read_lines(root / OUTPUTS)]
    found = Evidence(root, rows, read_json(root / RUN, AGAIN), read_json(root / SUMMARY, AGAIN))
    _check_whole(found)
    return found


def _checked(row: dict[str, Any], root: Path) -> dict[str, Any]:
    counts = row.get("counts")
    if not (
        isinstance(row.get("rule"), str)
        and isinstance(row.get("repetition"), int)
        and isinstance(row.get("id"), str | int)
        and isinstance(row.get("text"), str)
        and isinstance(row.get("reference"), str | None)
        and isinstance(counts, dict)
        and all(_is_count(counts.get(name)) for name in ("verifier_calls", "emitted"))
    ):
        raise InputError(f"{root / OUTPUTS}: a row is damaged ({str(row)[:80]}); decode again with --fresh")
    return row


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _check_whole(found: Evidence) -> None:
    """Refuse a part of a run: batches are made of prompts of like length, so that a part is no sample of all."""
    batches = list(read_lines(found.folder / BATCHES))
    if found.record is None and not batches and found.summary is None:
        _check_even(found, Counter(), None)
        return
    if found.summary is None:
        raise InputError(f"outputs={found.folder} are not whole: decoding has not come to its end; {AGAIN}")
    lines: Counter[str] = Counter()
    for batch in batches:
        if batch.get("repetition") == 0 and _is_count(batch.get("rows")):
            lines[str(batch.get("rule"))] += batch["rows"]
    _check_even(found, lines, (found.record or {}).get("prompts_planned"))


def _check_even(found: Evidence, lines: Mapping[str, int], planned: Any) -> None:
    """Every rule was decoded on as many prompts as the others, as its batches say and as were planned."""
    ids: dict[str, set[str]] = {}
    for row in found.rows:
        if row["repetition"] == 0:
            ids.setdefault(row["rule"], set()).add(str(row["id"]))
    rules = (found.summary or {}).get("rules")
    wanted = set(rules) if isinstance(rules, Mapping) else set(ids)
    sizes = {label: len(ids.get(label, ())) for label in {*wanted, *ids}}
    for label, size in sorted(sizes.items()):
        most = max([*sizes.values(), lines.get(label, 0), planned if _is_count(planned) else 0])
        if size != most:
            raise InputError(
                f"outputs={found.folder} are not whole: {size} of {most} prompts of {label}; {AGAIN}"
            )
