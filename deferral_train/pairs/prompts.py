"""Prompts with optional references from what people have: jsonl, csv, parquet, lines, line pairs, data sets.

Every reader keeps each row of its file: an empty prompt or reference is not dropped here but reported by id
when prompts are encoded (``pairs/encode.py``), so that a data set is never silently short.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any

from deferral_train import provenance
from deferral_train.errors import InputError, MissingExtraError
from deferral_train.pairs.benchmarks import CONTAINED, shape_of

FORMATS = ("jsonl", "csv", "tsv", "parquet", "text", "mmlu", "dataset", *CONTAINED)
PROMPT_FIELDS = ("prompt", "question", "source", "input", "instruction", "text")
REFERENCE_FIELDS = ("reference", "answer", "target", "completion", "output", "response")
CHOICES = ("A", "B", "C", "D")
# Of several fields that could be the prompt or the reference, these settle it; otherwise one must be named.
PLAIN_NAMES = frozenset({"prompt", "question", "reference", "answer"})
LARGEST_CELL = 2**31 - 1  # characters of a csv cell; the csv module's own limit is 131,072
CONTAINERS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# By their first bytes, the longest first: that of UTF-32 begins as that of UTF-16.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}
_PACKED: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
# First bytes of files that hold no text, whatever they are called.
_NO_TEXT = {
    b"PK\x03\x04": "a zip archive",
    b"\x28\xb5\x2f\xfd": "zstd-compressed",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"%PDF": "a PDF file",
    b"SQLite format": "a SQLite database",
    **dict.fromkeys(_PACKED, "compressed twice"),
}
_MOST_MAGIC = 16
_SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}


@dataclass(frozen=True)
class Prompt:
    """A prompt as text.

    Attributes:
        id: unique in its set.
        reference: what should follow, None where there is no gold text.
        tests: Python that runs without error after a right answer, where the answer is a program.
    """

    id: str
    prompt: str
    reference: str | None = None
    tests: str | None = None


def filled(prompt: Prompt) -> tuple[str | None, ...]:
    """Its values, ``tests`` only where there are some: what identifies a prompt, as releases without them saw it."""
    return (prompt.id, prompt.prompt, prompt.reference, *(() if prompt.tests is None else (prompt.tests,)))


@dataclass(frozen=True)
class PromptSource:
    """Where prompts come from, and which of its fields and rows they are.

    Attributes:
        path: a file (also as ``.gz``, ``.bz2`` or ``.xz``), a folder with a data set, or a name for ``datasets``.
        format: one of ``FORMATS``; default by suffix, ``text`` (a prompt per line) for unknown ones. Those of
            ``CONTAINED`` say what a published benchmark's rows hold, see :mod:`deferral_train.pairs.benchmarks`.
        reference_path: second file of parallel text, line by line the reference of the prompt.
        prompt_field: field or column, ``a.b`` for a nested one and ``a.0`` for an entry of a list
            (``messages.0.content``). Default: the one of ``PROMPT_FIELDS`` that a row has, and of several the first
            if it is ``prompt`` or ``question``; other rows are refused until the field is named.
        reference_field: the same for references, among ``REFERENCE_FIELDS``, or none.
        id_field: the same for ids; default a field ``id``, else ``<name>:<row, from 1>``.
        template: text around every prompt, for example ``"translate English to German: {prompt}"``.
        subset: configuration of a named data set.
        split: split of a data set.
        start: rows to pass over first.
        limit: most rows to read, None for all.

    Raises:
        InputError: a template without ``{prompt}``, rows that cannot be meant.
    """

    path: str | Path
    format: str | None = None
    reference_path: str | Path | None = None
    prompt_field: str | None = None
    reference_field: str | None = None
    id_field: str | None = None
    template: str = "{prompt}"
    subset: str | None = None
    split: str = "train"
    start: int = 0
    limit: int | None = None

    def __post_init__(self) -> None:
        if "{prompt}" not in self.template:
            raise InputError(f"template={self.template!r} has no {{prompt}}; write it where the prompt goes")
        if self.start < 0 or (self.limit is not None and self.limit < 1):
            raise InputError(f"start={self.start}, limit={self.limit}: start must be >= 0 and limit >= 1")


def read_prompts(path: str | Path, format: str | None = None, **fields: Any) -> list[Prompt]:
    """Read prompts in file order.

    Args:
        path: a file, a folder with a data set, or a name for ``datasets``.
        format: one of ``FORMATS``; default by suffix.
        fields: any other of :class:`PromptSource`, by name.

    Raises:
        InputError: file or field missing, a row that cannot be read (named by number), unequal line counts,
            repeated ids, no rows.
    """
    source = PromptSource(path, format, **fields)
    shape = shape_of(source.format)
    place, kind = _resolve(source.path, None if source.format in CONTAINED else source.format)
    if source.reference_path is not None:
        rows: Iterable[Mapping[str, Any]] = _parallel_rows(place, source.reference_path, kind)
    elif kind == "dataset":
        rows = _dataset_rows(place, source.subset, source.split)
    else:
        rows = _ROWS[kind](place)
    stop = None if source.limit is None else source.start + source.limit
    reader = _RowReader(source, _stem(str(place)))
    numbered = islice(enumerate(rows, 1), source.start, stop)
    prompts = [reader.read(shape(row, f"{reader.name}, row {number}"), number) for number, row in numbered]
    if not prompts:
        raise InputError(
            f"{place}: no rows from row {source.start + 1} on; give a file with at least one prompt"
        )
    _refuse_repeated(prompts, place)
    return prompts


def write_prompts(path: str | Path, prompts: Iterable[Prompt]) -> None:
    """Write jsonl with ``id``, ``prompt``, ``reference`` and ``tests`` (absent where None), atomically; also
    compressed.
    """
    rows = []
    for prompt in prompts:
        row = {name: value for name, value in vars(prompt).items() if value is not None}
        rows.append(json.dumps(row, ensure_ascii=False))
    data = "".join(row + "\n" for row in rows).encode("utf-8")
    packed = {".gz": lambda: gzip.compress(data, mtime=0), ".bz2": lambda: bz2.compress(data)}
    packed[".xz"] = lambda: lzma.compress(data)
    data = packed.get(Path(path).suffix.lower(), lambda: data)()
    provenance.write_bytes(path, data)


@dataclass(frozen=True)
class _RowReader:
    """Makes a :class:`Prompt` of a row; ``name`` is the data set's name, for ids and messages."""

    source: PromptSource
    name: str

    def read(self, row: Mapping[str, Any], number: int) -> Prompt:
        where = f"{self.name}, row {number}"
        prompt = self._value(row, self.source.prompt_field, PROMPT_FIELDS, where, "prompt_field")
        if prompt is None:
            tried = self.source.prompt_field or ", ".join(PROMPT_FIELDS)
            raise InputError(f"{where}: no {tried} in {_names(row)}; name the field with prompt_field")
        reference = self._value(row, self.source.reference_field, REFERENCE_FIELDS, where, "reference_field")
        text = self.source.template.replace("{prompt}", prompt)
        tests = row.get("tests")
        tests = tests if isinstance(tests, str) else None
        if tests is not None:
            _refuse_surrogates(tests, where, "tests")
        return Prompt(self._identifier(row, number, where), text, reference, tests)

    def _identifier(self, row: Mapping[str, Any], number: int, where: str) -> str:
        field = self.source.id_field
        value = row.get("id") if field is None else _reach(row, field, where, "id_field")
        if value is None and field is not None:
            raise InputError(f"{where}: field {field!r} is null; give every row an id, or leave id_field out")
        identifier = f"{self.name}:{number}" if value is None else str(value)
        _refuse_surrogates(identifier, where, field or "id")
        return identifier

    @staticmethod
    def _value(
        row: Mapping[str, Any], field: str | None, defaults: tuple[str, ...], where: str, flag: str
    ) -> str | None:
        if field is None:
            field = _default_field(row, defaults, where, flag)
            if field is None:
                return None
        value = _reach(row, field, where, flag)
        if value is None:  # an empty prompt is left out by id when prompts are encoded
            return None if flag == "reference_field" else ""
        text = _as_text(value, numbers=flag == "reference_field")
        if text is None:
            entry = f", such as {field}.0" if _is_list(value) else ""
            raise InputError(
                f"{where}: field {field!r} is {type(value).__name__}, needs text; name another with {flag}{entry}"
            )
        if not text.isascii():
            _refuse_surrogates(text, where, field)
        return text


def _default_field(row: Mapping[str, Any], names: tuple[str, ...], where: str, flag: str) -> str | None:
    """The one field of ``names`` that the row has; of several, the first if its name leaves no doubt.

    ``source`` beside ``text`` may be where a text comes from, ``input`` beside ``instruction`` half of a question.
    """
    found = [name for name in names if name in row]
    if len(found) > 1 and found[0] not in PLAIN_NAMES:
        raise InputError(
            f"{where}: {' and '.join(found)} could each be what is wanted; name one of them with {flag}"
        )
    return found[0] if found else None


def _reach(row: Mapping[str, Any], field: str, where: str, flag: str) -> Any:
    """The value at ``a.b`` or ``a.0``; null where something on the way is null, or the list there is empty."""
    value: Any = row
    for part in (field,) if field in row else field.split("."):
        if value is None or (_is_list(value) and len(value) == 0):
            return None
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif _is_list(value) and part.isascii() and part.isdigit() and int(part[:9]) < len(value):
            value = value[int(part[:9])]
        else:
            raise InputError(f"{where}: no field {field!r} in {_names(row)}; correct {flag}")
    return value


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _as_text(value: Any, numbers: bool) -> str | None:
    """A text as it is; with ``numbers`` one as JSON writes it, since answers are often numbers and prompts never."""
    if isinstance(value, str):
        return value
    if not numbers or isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return None
    if not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Decimal) else json.dumps(value)


def _refuse_surrogates(text: str, where: str, field: str) -> None:
    """JSON can spell half a character (a lone surrogate), which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: field {field!r} holds a lone surrogate at character {error.start}; mend the text"
        ) from None


def _names(row: Mapping[str, Any]) -> str:
    return "{" + ", ".join(map(str, list(row)[:12])) + "}"


def _resolve(path: str | Path, format: str | None) -> tuple[Path | str, str]:
    """The path (or data set name) and its format."""
    if format is not None and format not in FORMATS:
        raise InputError(f"format={format!r}: use one of {', '.join(FORMATS)}")
    place = Path(path)
    if place.is_dir() or (format == "dataset" and not place.exists()):
        return str(path), "dataset"
    if place.is_file():
        return place, format or format_of(place)
    looks_like_file = (
        place.suffix in {*_SUFFIXES, *CONTAINERS, ".txt"} or place.is_absolute() or len(place.parts) > 2
    )
    if format is not None or looks_like_file:
        raise InputError(f"prompts: {path} does not exist; give a file, a folder or the name of a data set")
    return str(path), "dataset"


def format_of(path: str | Path) -> str:
    """Format of a file by its suffix, below that of a container; ``text`` for unknown ones."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes if suffix.lower() not in CONTAINERS]
    return _SUFFIXES.get(suffixes[-1], "text") if suffixes else "text"


def _stem(name: str) -> str:
    stem = Path(name).name
    for suffix in CONTAINERS:
        stem = stem.removesuffix(suffix)
    return stem.rsplit(".", 1)[0] if stem.endswith((*_SUFFIXES, ".txt")) else stem


def _refuse_repeated(prompts: list[Prompt], path: str | Path) -> None:
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise InputError(f"{path}: id {prompt.id!r} appears twice; ids must be unique, see id_field")
        seen.add(prompt.id)


def read_lines(path: str | Path) -> list[str]:
    """Lines of a text file, also compressed, without line ends, which are ``\\n`` or ``\\r\\n``.

    UTF-8, or UTF-16 with a byte order mark; the mark is no part of the first line.
    """
    with _open(path) as file:
        lines = [line.rstrip("\r\n") for line in _guard(file, path)]
    if len(lines) == 1 and "\r" in lines[0]:
        raise InputError(f"{path}: its lines end in a carriage return alone; convert it: tr '\\r' '\\n'")
    return lines


def _open(path: str | Path) -> io.TextIOBase:
    if not Path(path).is_file():
        raise InputError(f"text file {path} does not exist; check the path")
    opened = _opener(path)
    with opened(path, "rb") as file:
        try:
            start = file.read(_MOST_MAGIC)
        except _DAMAGED as error:
            raise _damaged(path, error) from error
    kind = next((kind for magic, kind in _NO_TEXT.items() if start.startswith(magic)), None)
    if kind is not None:
        raise InputError(f"{path} is {kind}, no text; unpack it, or give its kind by suffix or format")
    encoding = next((name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8")
    return opened(path, "rt", encoding=encoding, newline="\n")


def _opener(path: str | Path) -> Any:
    """The function that opens a file: by its suffix, else by its first bytes, since people rename their files."""
    suffix = Path(path).suffix.lower()
    if suffix in CONTAINERS:
        return CONTAINERS[suffix]
    with open(path, "rb") as file:
        start = file.read(_MOST_MAGIC)
    return next((opened for magic, opened in _PACKED.items() if start.startswith(magic)), open)


_DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError)


def _damaged(path: str | Path, error: Exception) -> InputError:
    return InputError(f"{path}: cannot be read ({error}); the file is damaged or cut short")


def _guard(lines: Iterable[Any], path: str | Path) -> Iterator[Any]:
    """Pass lines on; what a damaged file raises becomes one line that names it."""
    try:
        yield from lines
    except UnicodeError as error:
        where = f"{error.reason} at byte {error.start}" if isinstance(error, UnicodeDecodeError) else error
        raise InputError(
            f"{path}: not UTF-8 text ({where}); convert it: iconv -f ENCODING -t UTF-8"
        ) from error
    except _DAMAGED as error:
        raise _damaged(path, error) from error
    except csv.Error as error:
        raise InputError(f"{path}: not a readable table ({error}); check quotes and separators") from error


def _json_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    lines = read_lines(path)
    if next((line for line in lines if line.strip()), "").lstrip("\ufeff \t").startswith("["):
        yield from _rows_of_a_list(path, "\n".join(lines))
        return
    for number, line in enumerate(lines, 1):
        line = line.lstrip("\ufeff")  # of a file that another was appended to
        if line.strip():
            yield _row(_parsed(line, f"{path}, line {number}"), f"{path}, line {number}")


def _rows_of_a_list(path: Path, text: str) -> Iterator[Mapping[str, Any]]:
    """Objects of one JSON list, as ``.json`` files often hold them."""
    for number, row in enumerate(_parsed(text.lstrip("\ufeff"), f"{path}"), 1):
        yield _row(row, f"{path}, entry {number}")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({str(error)[:80]}); one object a line") from error


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; of a field that is there twice, nobody knows which is meant."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"field {next(name for name in names if names.count(name) > 1)!r} appears twice")
    return found


def _row(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where}: a {type(value).__name__}, needs an object with fields")
    return value


def _table_rows(path: Path, separator: str = ",") -> Iterator[Mapping[str, Any]]:
    csv.field_size_limit(LARGEST_CELL)
    with _open(path) as file:
        # Strict: a quote that is never closed would swallow the rows after it, and one in a cell be dropped.
        reader = csv.DictReader(file, delimiter=separator, strict=True)
        reader.fieldnames = [name.strip() for name in next(_guard(_header(reader), path), ())]
        _refuse_repeated_columns(reader.fieldnames, path)
        for number, row in enumerate(_guard(reader, path), 1):
            if None in row or None in row.values():
                raise InputError(
                    f"{path}, row {number}: number of cells differs from the header; mend the row"
                )
            yield row


def _header(reader: csv.DictReader[str]) -> Iterator[Sequence[str]]:
    """The names of the columns, where the file has any."""
    if reader.fieldnames is not None:
        yield reader.fieldnames


def _refuse_repeated_columns(names: Sequence[str], path: Path) -> None:
    twice = [name for place, name in enumerate(names) if name in names[:place]]
    if twice:
        raise InputError(f"{path}: column {twice[0]!r} appears twice in the header; rename one")


def _choice_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """MMLU's tables: no header; question, four choices, the letter of the right one."""
    csv.field_size_limit(LARGEST_CELL)
    with _open(path) as file:
        for number, cells in enumerate(_guard(csv.reader(file, strict=True), path), 1):
            if len(cells) != 6 or cells[5].strip() not in CHOICES:
                raise InputError(
                    f"{path}, row {number}: {len(cells)} cells; an MMLU row is question, four choices and one of "
                    f"{', '.join(CHOICES)}"
                )
            choices = "".join(f"\n{letter}. {choice}" for letter, choice in zip(CHOICES, cells[1:5]))
            yield {"prompt": f"{cells[0]}{choices}\nAnswer:", "reference": cells[5].strip()}


def _text_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    for line in read_lines(path):
        yield {"prompt": line}


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        import pandas
    except ImportError as error:
        raise MissingExtraError("pandas", "train") from error
    try:
        opened = CONTAINERS.get(path.suffix.lower(), open)
        with opened(path, "rb") as file:
            # Arrow's own types keep null apart from a number, and a whole number beside null what it is.
            frame = pandas.read_parquet(io.BytesIO(file.read()), dtype_backend="pyarrow")
    except Exception as error:  # what a Parquet reader raises on damaged bytes is not ours to list
        raise InputError(f"{path}: not a readable Parquet file ({str(error)[:100]})") from error
    for row in frame.to_dict("records"):
        yield {str(name).lstrip("\ufeff"): _plain(value) for name, value in row.items()}


def _plain(value: Any) -> Any:
    """A cell of a table as JSON would hold it: lists for arrays, None for what is missing."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if _is_list(value):
        return [_plain(item) for item in value]
    missing = value is None or type(value).__name__ in ("NAType", "NaTType") or value != value
    return None if missing else value


def _parallel_rows(path: Path | str, reference_path: str | Path, kind: str) -> Iterator[Mapping[str, Any]]:
    if kind != "text":
        raise InputError(
            f"reference_path: parallel text is two text files, {path} is {kind}; use reference_field"
        )
    prompts, references = read_lines(path), read_lines(reference_path)
    if len(prompts) != len(references):
        raise InputError(
            f"parallel text: {path} has {len(prompts)} lines, {reference_path} has {len(references)}; "
            "they must match line by line"
        )
    for prompt, reference in zip(prompts, references):
        yield {"prompt": prompt, "reference": reference}


def _dataset_rows(name: Path | str, subset: str | None, split: str) -> Iterator[Mapping[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "train") from error
    try:
        if (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            data = datasets.load_from_disk(str(name))
            data = data[split] if isinstance(data, datasets.DatasetDict) else data
        else:
            data = datasets.load_dataset(str(name), subset, split=split)
    except Exception as error:  # what a loader, a parser or the network raises is not ours to list
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"data set {name!r} (split {split!r}) cannot be loaded: {reason}") from error
    yield from data


_ROWS = {
    "jsonl": _json_rows,
    "csv": _table_rows,
    "tsv": lambda path: _table_rows(path, "\t"),
    "parquet": _parquet_rows,
    "text": _text_rows,
    "mmlu": _choice_rows,
}
