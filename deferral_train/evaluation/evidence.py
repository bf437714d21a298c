"""Evidence for a certificate: a decode folder that is whole, and what it says about the weights that were decoded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deferral_train.decoding.outputs import (
    BATCHES,
    OUTPUTS,
    RUN,
    SUMMARY,
    identity_of,
    is_whole,
    read_lines,
    read_record,
    rows_by_batch,
)
from deferral_train.errors import InputError
from deferral_train.evaluation.settings import Dials, dials_of
from deferral_train.heads.fingerprint import weights_key

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
        record, summary = self.record or {}, self.summary or {}
        pair = record.get("pair")
        # What decided the outputs comes first; a record of an earlier release holds no conditions.
        found = record.get("conditions") or summary.get("conditions") or {}
        settings = record.get("settings") or summary.get("settings") or {}
        decoding = {name: settings[name] for name in DECODING if settings.get(name) is not None}
        conditions = {name: found.get(name) for name in CONDITIONS}
        return conditions | ({"pair": pair} if pair else {}) | ({"decoding": decoding} if decoding else {})

    def check_head(self, head: Any, label: str, folder: str) -> None:
        """Refuse a head of other weights than those that were decoded under ``label``.

        Raises:
            InputError: the weights differ, or the outputs do not say which were decoded.
        """
        if self.record is None:
            raise InputError(
                f"outputs={self.folder} hold no {RUN}, which says what was decoded: nothing was stored; "
                f"decode {folder} with this release, or leave head out"
            )
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
    found = Evidence(root, rows, read_record(root / RUN), read_record(root / SUMMARY))
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
        and isinstance(row.get("tests"), str | None)
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
    _check_unchanged(found, batches)


def _check_unchanged(found: Evidence, batches: Sequence[Mapping[str, Any]]) -> None:
    """Refuse rows that no batch of this run wrote: altered, double, or of another run; and a summary of another run."""
    again = "decode again with --fresh"
    of = (found.summary or {}).get("run")
    if of is not None and (found.record is None or of != identity_of(found.record)):
        raise InputError(f"outputs={found.folder}: {SUMMARY} is of another run than {RUN}; {again}")
    rows = rows_by_batch(found.rows)
    keys = list(rows_by_batch(dict(batch) for batch in batches))
    if len(keys) < len(batches) or set(rows) - set(keys):
        raise InputError(f"outputs={found.folder} hold rows or batches of more than one run; {again}")
    for key, batch in zip(keys, batches):
        if not is_whole(batch, rows.get(key, [])) and batch.get("content") is not None:
            raise InputError(
                f"outputs={found.folder}: rows of {key[0]}, batch {key[2]}, are not as they were decoded: altered, "
                f"missing or double; {again}"
            )


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
