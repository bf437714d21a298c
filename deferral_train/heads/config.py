"""config.json of a head as dictionaries: types, sizes and hashes are checked before anything is allocated."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from deferral_train.errors import InputError
from deferral_train.provenance import hash_of
from deferral_train.redaction import redacted

FORMAT_VERSION = 1
MAX_BYTES = 4 << 20
MAX_FEATURES = 4096
METADATA = ("alpha", "threshold", "certificate", "pair", "training", "cost", "evaluation")
ARGUMENTS = (
    "stage",
    "loss",
    "features",
    "schema",
    "schema_hash",
    "widths",
    "body",
    "hidden",
    "recalibration",
)
KNOWN = ("format_version", "lossy", "deferral_head_type", *ARGUMENTS, "memory_entries", *METADATA)
MAX_ALPHA = 1e6
MAX_PLACES, MAX_CURVE = 1024, 10_000


def read_config(path: Path) -> dict[str, Any]:
    """config.json as a dictionary; anything malformed is an InputError naming the file."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path} is larger than {MAX_BYTES} bytes; this is no head config")
        text = path.read_text(encoding="utf-8")
        config = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
        json.dumps(config, ensure_ascii=False).encode()  # lone surrogates could not be written again
    except FileNotFoundError:
        raise InputError(
            f"{path} does not exist; give a folder written by save_pretrained or export"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {str(error)[:200]}") from None
    if not isinstance(config, dict):
        raise InputError(f"{path} must hold a JSON object, found {type(config).__name__}")
    return config


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name[:20]} is no finite JSON number")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse_constant(text)


def _typed(config: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    value = config.get(key, default)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise InputError(f"head config field {key!r} must be a {kind.__name__}, got {str(value)[:80]!r}")
    return value


def _list_of(config: Mapping[str, Any], key: str, kind: type, limit: int) -> list:
    values = _typed(config, key, list)
    if len(values) > limit or not all(isinstance(v, kind) and not isinstance(v, bool) for v in values):
        raise InputError(
            f"head config field {key!r} must be a list of at most {limit} {kind.__name__} values"
        )
    return values


def stored_config(config: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Content of config.json: a head's config, the format version, ``"lossy": true`` and the redacted metadata.

    Raises:
        InputError: metadata of an unknown name, or out of the range that a reader takes.
    """
    unknown = sorted(set(metadata) - set(METADATA))
    if unknown:
        raise InputError(f"head metadata {', '.join(unknown)} is unknown; known: {', '.join(METADATA)}")
    check_metadata(metadata)
    return {"format_version": FORMAT_VERSION, "lossy": True, **config, **redacted(metadata)}


def stored_metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    """The checked metadata among the fields of a stored config."""
    metadata = {key: config[key] for key in METADATA if config.get(key) is not None}
    check_metadata(metadata)
    return metadata


def constructor_arguments(config: Mapping[str, Any]) -> tuple[str, list[str], dict[str, Any]]:
    """Head type, features and keyword arguments of the constructor that a stored config describes.

    Raises:
        InputError: an unknown version or field, or a field of another type or size.
    """
    version = config.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise InputError(
            f"head format_version {version!r} is not readable here (known: {FORMAT_VERSION}); upgrade"
        )
    unknown = sorted(set(config) - set(KNOWN))
    if unknown:
        raise InputError(f"head config field {unknown[0]!r} is unknown; use the release that wrote it")
    widths = _typed(config, "widths", dict, {})
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in widths.values()):
        raise InputError("head config field 'widths' must map names to integers")
    arguments = {
        "stage": _typed(config, "stage", str),
        "loss": _typed(config, "loss", str),
        "body": _typed(config, "body", str),
        "hidden": _list_of(config, "hidden", int, 16),
        "widths": widths,
        "recalibration": _typed(config, "recalibration", str, "none"),
    }
    if "memory_entries" in config:  # only where a feature needs it, so that heads of others need not know it
        arguments["memory_entries"] = _typed(config, "memory_entries", int)
    features = _list_of(config, "features", str, MAX_FEATURES)
    return _typed(config, "deferral_head_type", str), features, arguments


def check_schema(config: Mapping[str, Any], schemas: Sequence[Mapping[str, Any]]) -> None:
    """Refuse features that are not those the weights were trained on, and say which differ.

    Args:
        config: as stored.
        schemas: of the head built from it, in the words of every readable version, newest first.

    Raises:
        InputError: the recorded schema or its hash is none of these.
    """
    recorded = config.get("schema_hash")
    written = _typed(config, "schema", dict, {})
    # What an earlier version recorded is compared in that version's words.
    own = next((one for one in schemas if one["version"] == written.get("version")), schemas[0])
    different = list(_schema_differences(written, own))
    if recorded in ([hash_of(own)] if "version" in written else map(hash_of, schemas)) and not different:
        return
    named = "; ".join(different[:4]) or f"hash {str(recorded)[:32]!r}, here {hash_of(schemas[0])!r}"
    more = f" (and {len(different) - 4} more)" if len(different) > 4 else ""
    raise InputError(
        f"the head was trained under another feature schema: {named}{more}; use the config and the release that "
        "wrote it"
    )


def _schema_differences(recorded: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    """Texts that name each difference of two schemas; none where the config records only a hash."""
    for key in ("version", "stage"):
        if key in recorded and recorded[key] != here[key]:
            yield f"{key} {str(recorded[key])[:40]!r}, here {here[key]!r}"
    rows = recorded.get("features", here["features"])
    if not isinstance(rows, list):
        yield f"features {str(rows)[:40]!r} are no list"
        return
    for place, (theirs, ours) in enumerate(itertools.zip_longest(rows, here["features"], fillvalue=None), 1):
        if theirs != ours:
            yield f"feature {place} is {_feature_text(theirs)} there, {_feature_text(ours)} here"


def _feature_text(row: Any) -> str:
    """A schema row as text for messages, such as ``'drafter_max:logit'``; ``none`` where a list has ended."""
    if row is None:
        return "none"
    if not isinstance(row, list) or len(row) != 3:
        return repr(str(row)[:40])
    name, transform, width = row
    text = f"{name}:{transform}" if transform != "identity" else str(name)
    return repr(text[:80]) + (f" of width {str(width)[:20]}" if width != 1 else "")


def check_metadata(metadata: Mapping[str, Any]) -> None:
    """Refuse metadata that a reader would not take; writers ask first, so that every head written can be loaded.

    Raises:
        InputError: alpha or threshold out of range, or a part of another type.
    """
    alpha = metadata.get("alpha", 0)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= MAX_ALPHA:
        raise InputError(
            f"head config field 'alpha' must be a number up to {MAX_ALPHA:g} in size, got {str(alpha)[:80]!r}"
        )
    threshold = metadata.get("threshold", 0)
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise InputError(
            f"head config field 'threshold' must be a number from 0 to 1, got {str(threshold)[:80]!r}"
        )
    for key in METADATA[2:]:
        _typed(metadata, key, dict, {})
    evaluation = metadata.get("evaluation", {})
    _typed(evaluation, "metrics", dict, {})
    if "expected" in evaluation:
        _check_expected(_typed(evaluation, "expected", dict))


def _check_expected(expected: Mapping[str, Any]) -> None:
    """Refuse expectations that a planner could not calculate with: shares outside of 0 to 1, no numbers, no lists."""
    for name in ("setting", "acceptance_by_place", "conditions"):
        _typed(expected, name, dict, {})
    for name, shares in expected.get("acceptance_by_place", {}).items():
        if not isinstance(shares, list) or len(shares) > MAX_PLACES or not all(map(_is_share, shares)):
            raise InputError(
                f"head config field 'evaluation.expected.acceptance_by_place.{str(name)[:40]}' must be a list of at "
                f"most {MAX_PLACES} numbers from 0 to 1"
            )
    if not _is_amount(expected.get("mean_acceptance_length")) or not _is_amount(expected.get("prompts")):
        raise InputError(
            "head config field 'evaluation.expected': mean_acceptance_length and prompts must be numbers from 0 on"
        )
    curve = _typed(expected, "curve", list, [])
    whole = len(curve) <= MAX_CURVE and all(isinstance(point, dict) for point in curve)
    if not whole or not all(_is_number(value) for point in curve for value in point.values()):
        raise InputError(
            f"head config field 'evaluation.expected.curve' must be a list of at most {MAX_CURVE} points with numbers"
        )


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _is_amount(value: Any) -> bool:
    return _is_number(value) and (value is None or value >= 0)


def _is_share(value: Any) -> bool:
    return value is not None and _is_number(value) and 0 <= value <= 1
