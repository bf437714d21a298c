"""What is fuzzed: every reader of files that may come from elsewhere, with good files to start from.

A `Loader` reads bytes as its users would, through the public surface, and uses what it got. Only `InputError`
may come out of it, in one line.
"""

from __future__ import annotations

import gzip
import io
import json
import shutil
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet
import torch
from fuzz import mutate
from heads.distributions import every_head
from safetensors.torch import save
from traces.conftest import make_manifest, write_folder

from deferral_train import cli
from deferral_train.commands import run as commands_run
from deferral_train.errors import InputError
from deferral_train.heads import DeferralHead
from deferral_train.heads.rules import learned_rule
from deferral_train.pairs.benchmarks import CONTAINED
from deferral_train.pairs.prompts import read_prompts
from deferral_train.pipeline.config import read_config
from deferral_train.traces import open_traces
from deferral_train.traces.candidates import read_candidates
from deferral_train.training.checkpoint import read_checkpoint


@dataclass(frozen=True)
class Loader:
    """One reader under test.

    Attributes:
        seeds: good files, and odd ones that reach far.
        read: loads the bytes from a scratch folder that is its own.
        damage: how a file of this kind is mutated.
    """

    seeds: Callable[[], list[bytes]]
    read: Callable[[bytes, Path], None]
    damage: Callable[[Random, bytes], bytes]

    def __call__(self, data: bytes, scratch: Path) -> bool:
        """Whether the file was taken; anything but an InputError of one line is a defect and passes through."""
        try:
            self.read(data, scratch)
        except InputError as error:
            text = str(error)
            assert text.isprintable(), f"not one line: {text!r}"
            assert 0 < len(text) < 1100, f"{len(text)} characters"
            return False
        return True


# Heads


@cache
def _head_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-head-"))
    for name, head in every_head().items():
        head.metadata = {
            "alpha": 0.25,
            "pair": {"tokenizer": "abc", "vocab_size": 9},
            "certificate": {"metric": "exact_match", "max_loss": 0.01, "prompts": 200},
            "evaluation": {"dataset": "validation traces", "metrics": {"regret": 0.125}},
        }
        head.save_pretrained(folder / name)
    return folder


def _configs() -> list[bytes]:
    first = _head_folder() / "gap"
    rest = sorted(path for path in _head_folder().iterdir() if path != first)
    return [(path / "config.json").read_bytes() for path in [first, *rest]]


def _read_head_config(data: bytes, scratch: Path) -> None:
    (scratch / "config.json").write_bytes(data)
    weights = scratch / "model.safetensors"
    if not weights.exists():
        shutil.copy(_head_folder() / "gap" / weights.name, weights)
    _use(DeferralHead.from_pretrained(scratch), scratch)


def _use(head: DeferralHead, scratch: Path) -> None:
    """A head that was taken can be served and saved again."""
    learned_rule(head, 0.1)
    head.save_pretrained(scratch / "again")


def _weights() -> list[bytes]:
    good = (_head_folder() / "gap" / "model.safetensors").read_bytes()
    odd = [{"mean": torch.zeros(2)}, {}, {"mean": torch.zeros(0, 3, dtype=torch.int8)}]
    return [good, *(save(tensors) for tensors in odd)]


def _read_weights(data: bytes, scratch: Path) -> None:
    config = scratch / "config.json"
    if not config.exists():
        config.write_bytes((_head_folder() / "gap" / "config.json").read_bytes())
    (scratch / "model.safetensors").write_bytes(data)
    _use(DeferralHead.from_pretrained(scratch), scratch)


def _checkpoints() -> list[bytes]:
    head = every_head()["gap"]
    state = {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
    found = []
    for value in (
        {"deferral_head": head.config, "state_dict": state, "deferral_scalars": {"regret": 0.1}},
        {"deferral_head": [], "state_dict": state},
        {"deferral_head": head.config, "state_dict": {"head.mean": 3}, "deferral_scalars": None},
        [head.config],
    ):
        buffer = io.BytesIO()
        torch.save(value, buffer)
        found.append(buffer.getvalue())
    return found


def _read_checkpoint(data: bytes, scratch: Path) -> None:
    (scratch / "best.ckpt").write_bytes(data)
    read_checkpoint(scratch / "best.ckpt")


# Traces


@cache
def _trace_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-traces-")) / "traces"
    write_folder(folder, make_manifest())
    return folder


def _fresh_traces(scratch: Path) -> Path:
    folder = scratch / "traces"
    if not folder.exists():
        shutil.copytree(_trace_folder(), folder)
    return folder


def _use_traces(folder: Path) -> None:
    """Read all that a trace folder offers."""
    traces = open_traces(folder, partial=True)
    traces.summary()
    traces.summary(["drafter_hidden", "tv"], temperature=1)
    for name in traces.columns:
        traces.column(name)
    if traces.manifest.top_k and len(traces):
        read_candidates(traces)
    some = traces.prompt_ids[:2]
    len(traces.select_prompts(some).column("gold"))
    open_traces(folder, partial=True, verify=True)


def _manifests() -> list[bytes]:
    """First byte: which of the two files the rest replaces."""
    files = {b"m": "manifest.json", b"l": "chunks.jsonl"}
    return [mark + (_trace_folder() / name).read_bytes() for mark, name in files.items()]


def _read_manifest(data: bytes, scratch: Path) -> None:
    folder = _fresh_traces(scratch)
    for name in ("manifest.json", "chunks.jsonl"):
        shutil.copy(_trace_folder() / name, folder / name)
    name = "chunks.jsonl" if data[:1] == b"l" else "manifest.json"
    (folder / name).write_bytes(data[1:])
    _use_traces(folder)


def _damage_manifest(random: Random, data: bytes) -> bytes:
    damage = mutate.damage_json_lines if data[:1] == b"l" else mutate.damage_json
    return data[:1] + damage(random, data[1:])


def _shards() -> list[bytes]:
    """The good shard, and streams of other schemas, types, encodings, lengths and numbers of batches."""
    good = (_trace_folder() / "shard-00000.arrow").read_bytes()
    table = pa.ipc.open_stream(good).read_all()
    streams = [table.slice(0, 0), table.slice(0, 3), pa.concat_tables([table, table])]
    for name, values in (
        ("prompt", pa.array(["a"] * len(table))),
        ("prompt", pa.array([None] * len(table), pa.int32())),
        ("prompt", pa.array([10**6] * len(table), pa.int32())),
        ("gold", pa.array(["a"] * len(table)).dictionary_encode()),
        ("drafter_max", pa.array([[1.0]] * len(table))),
        ("drafter_top_ids", pa.array([[1, 2]] * len(table), pa.list_(pa.int32(), 2))),
    ):
        streams.append(table.set_column(table.schema.get_field_index(name), name, values))
    found = [good]
    for stream in streams:
        for options in (None, pa.ipc.IpcWriteOptions(compression="zstd")):
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, stream.schema, options=options) as writer:
                writer.write_table(stream, max_chunksize=2 if options else None)
            found.append(sink.getvalue().to_pybytes())
    return found


def _read_shard(data: bytes, scratch: Path) -> None:
    """The ledger is made to agree with the bytes, as whoever alters a shard on purpose would."""
    folder = _fresh_traces(scratch)
    (folder / "shard-00000.arrow").write_bytes(data)
    lines = (_trace_folder() / "chunks.jsonl").read_text().splitlines()
    record = json.loads(lines[0])
    record["bytes"] = len(data)
    record |= _claims(data)
    (folder / "chunks.jsonl").write_text("\n".join([json.dumps(record), *lines[1:], ""]))
    _use_traces(folder)


def _claims(data: bytes) -> dict[str, object]:
    """Row count and checksums that the altered bytes have, as far as they can be read without crashing."""
    try:
        batch = pa.ipc.open_stream(pa.py_buffer(data)).read_next_batch()
        batch.validate(full=True)
        columns = dict(zip(batch.schema.names, batch.columns))
    except (pa.ArrowException, StopIteration, OSError, MemoryError, ValueError, KeyError):
        return {}  # KeyError: pyarrow has no class for some types
    sums = {}
    for name, array in columns.items():
        try:
            flat = (array.flatten() if pa.types.is_fixed_size_list(array.type) else array).to_numpy()
            sums[name] = zlib.crc32(flat.data.cast("B")) if len(flat) else 0
        except (pa.ArrowException, TypeError, ValueError, NotImplementedError):
            continue
    return {"rows": batch.num_rows, "columns": sums}


# Prompts

_SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet", ".txt", ".jsonl.gz", ".csv.gz", ".parquet.gz")


def _benchmark_files() -> list[bytes]:
    """First byte: the published form, by its place among the formats."""
    mbpp = {"task_id": 1, "text": "add", "code": "x", "test_list": ["assert x"], "test_setup_code": ""}
    turns = {"question_id": 81, "category": "math", "turns": ["a", "b"], "reference": ["c"]}
    rows = [mbpp, turns, turns | {"question_id": "coding_1", "turns": ["FULL BENCHMARK DATA SHOULD BE"]}]
    rows += [
        mbpp | {"test_imports": ["import math"], "test_list": None},
        turns | {"turns": [["a"]], "reference": 1},
    ]
    lines = [json.dumps(row).encode() for row in rows]
    return [bytes([form]) + line for form in range(len(CONTAINED)) for line in (*lines, b"\n".join(lines))]


def _read_benchmark_file(data: bytes, scratch: Path) -> None:
    path = scratch / "rows.jsonl"
    path.write_bytes(data[1:])
    for prompt in read_prompts(path, list(CONTAINED)[data[0] % len(CONTAINED)] if data else "mbpp"):
        prompt.prompt.encode()
        "".join(filter(None, (prompt.reference, prompt.tests))).encode()


def _damage_benchmark_file(random: Random, data: bytes) -> bytes:
    return data[:1] + mutate.damage_json_lines(random, data[1:])


def _prompt_files() -> list[bytes]:
    """First byte: the kind of file, by its place among the suffixes."""
    rows = [{"id": f"p{n}", "prompt": f"say {n}", "reference": "é\n"} for n in range(4)]
    lines = "\n".join(json.dumps(row) for row in rows).encode()
    nested = json.dumps({"prompt": {"a": "x"}, "text": "y"}).encode()
    table = b'id,prompt,reference\n1,a,b\n2,"c,\n",d\n'
    texts = [lines, table, table.replace(b",", b"\t"), b"", b"first\nsecond\r\nthird"]
    kinds = [bytes([i]) + text for i, text in enumerate(texts) if text]
    kinds += [
        b"\x00" + nested,
        b"\x05" + gzip.compress(lines, mtime=0),
        b"\x06" + gzip.compress(table, mtime=0),
    ]
    for frame in (
        pa.table({"prompt": ["a", "b"], "reference": ["c", None]}),
        pa.table({"prompt": [1, 2]}),
        pa.table({"prompt": [["a"], ["b"]], "id": [1, None]}),
        pa.table({"prompt": pa.array(["a", "a"]).dictionary_encode()}),
    ):
        sink = io.BytesIO()
        pa.parquet.write_table(frame, sink)
        kinds += [b"\x03" + sink.getvalue(), b"\x07" + gzip.compress(sink.getvalue(), mtime=0)]
    return kinds


def _read_prompt_file(data: bytes, scratch: Path) -> None:
    suffix = _SUFFIXES[data[0] % len(_SUFFIXES)] if data else ".txt"
    path = scratch / f"prompts{suffix}"
    path.write_bytes(data[1:])
    for prompt in read_prompts(path):
        prompt.prompt.encode()
        (prompt.reference or "").encode()


def _damage_prompt_file(random: Random, data: bytes) -> bytes:
    if random.random() < 0.05:
        return bytes([random.randrange(len(_SUFFIXES))]) + data[1:]
    damage = mutate.damage_json_lines if data[:1] == b"\x00" else mutate.damage_bytes
    return data[:1] + damage(random, data[1:])


# YAML


def _yaml_files() -> list[bytes]:
    """JSON is YAML, so that values can be damaged in place; one real file as it is."""
    import yaml

    root = Path(__file__).resolve().parents[2]
    files = [root / "deferral_train" / "pipeline" / "quickstart.yaml", root / "configs" / "multi30k.yaml"]
    texts = [path.read_bytes() for path in files]
    odd = [b"a: &a [*a]", b"!!python/object/apply:os.system [true]", b"text: !!set {a, b}", b"? [a]\n: b"]
    return [*texts, *(mutate.dump(yaml.safe_load(text)) for text in texts), *odd]


def _read_yaml(data: bytes, scratch: Path) -> None:
    """As the command line reads it, or as the pipeline does."""
    path = scratch / "run.yaml"
    path.write_bytes(data)
    if zlib.crc32(data) % 2:
        read_config(path)
    else:
        cli._parse("run", commands_run, [f"--config={path}"])


LOADERS: dict[str, Loader] = {
    "head_config": Loader(_configs, _read_head_config, mutate.damage_json),
    "safetensors": Loader(_weights, _read_weights, mutate.damage_safetensors),
    "manifest": Loader(_manifests, _read_manifest, _damage_manifest),
    "shard": Loader(_shards, _read_shard, mutate.damage_bytes),
    "benchmarks": Loader(_benchmark_files, _read_benchmark_file, _damage_benchmark_file),
    "prompts": Loader(_prompt_files, _read_prompt_file, _damage_prompt_file),
    "yaml": Loader(_yaml_files, _read_yaml, mutate.damage_json),
    "checkpoint": Loader(_checkpoints, _read_checkpoint, mutate.damage_bytes),
}
