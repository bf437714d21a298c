"""The n-th change of a command to the disk finds it full, for every n: what was there stays readable, a rerun finishes.

    python -m fuzz.full_disk [--only collect fit] [--every 1] [--once]

The command runs in a fork of this process, under a small preloaded library (``full_disk.c``) that counts every write,
fsync, rename and new name below the case's folder, whoever makes it: Python, Arrow, safetensors, sqlite, TensorBoard.
From the n-th on the disk is full, or with ``--once`` only that one change fails.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_suffix(".c")
SLOW = 60  # seconds that one call may take


def compiler() -> str | None:
    """The C compiler of this machine; None where there is none."""
    return shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc")


def build(folder: Path) -> Path:
    """The library, compiled into ``folder``."""
    program, built = compiler(), folder / "full_disk.so"
    if program is None:
        raise RuntimeError("no C compiler (cc or gcc, or name one in CC)")
    subprocess.run([program, "-O1", "-shared", "-fPIC", "-o", str(built), str(SOURCE), "-ldl"], check=True)
    return built


@dataclass(frozen=True)
class Answer:
    """How a command that met a full disk answered.

    Attributes:
        code: exit code; None where it raised or did not end.
        said: standard error, or the traceback.
        place: what failed first: the kind of change and the file.
        changes: how many were made.
    """

    code: int | None
    said: str
    place: str
    changes: int


def answer_when_full(words: list[str], folder: Path, number: int, stays: bool = True) -> Answer:
    """Run a command line in ``folder`` in a fork, its ``number``-th change there finding the disk full."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _work(words, folder, number, stays, writing)
    os.close(writing)
    end, parts = time.monotonic() + SLOW, []
    os.set_blocking(reading, False)
    while time.monotonic() < end:
        try:
            part = os.read(reading, 1 << 16)
        except BlockingIOError:
            time.sleep(0.01)
            continue
        if not part:
            break
        parts.append(part)
    os.close(reading)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if not parts:
        return Answer(None, "it did not end", "", -1)
    return Answer(*json.loads(b"".join(parts)))


def _work(words: list[str], folder: Path, number: int, stays: bool, writing: int) -> None:
    """Never returns."""
    import traceback

    from fuzz.commands import call

    disk = ctypes.CDLL(None)
    disk.full_disk_first.restype = ctypes.c_char_p
    threads: list[str] = []
    threading.excepthook = lambda hook: threads.append(f"Traceback in a thread: {hook.exc_value!r}")
    sys.unraisablehook = lambda hook: threads.append(f"Exception ignored: {hook.exc_value!r}")
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    disk.full_disk_arm(str(folder).encode(), number, int(stays))
    code: int | None
    try:
        code, said = call(words, folder)
    except BaseException:
        code, said = None, traceback.format_exc()
    place, changes = disk.full_disk_first().decode(), disk.full_disk_counted()
    disk.full_disk_disarm()
    said = "\n".join([said, *threads])
    data = json.dumps([code, said, place, changes]).encode()
    while data:
        data = data[os.write(writing, data) :]
    os._exit(0)


@dataclass(frozen=True)
class Case:
    """A command on a world of small inputs.

    Attributes:
        words: the command line.
        result: a comparable value of what it makes; of what lay there before, too; raises where it cannot be read.
        prepare: a command that runs undisturbed before; None for none.
        kept: the result of ``prepare`` stays readable whatever fails (unless the new one has replaced it).
        silent: changes that may fail without the command failing, by a part of their place.
    """

    words: str
    result: Callable[[Path], Any]
    prepare: str | None = None
    kept: bool = True
    silent: tuple[str, ...] = ()


def problems(
    case: Case, world: Path, scratch: Path, every: int = 1, stays: bool = True, first: int = 1
) -> Iterator[tuple[int, str]]:
    """Changes that were not answered as they must be, with what is wrong; then (number of changes, "")."""
    from fuzz.commands import call

    def fresh(name: str, source: Path) -> Path:
        shutil.rmtree(scratch / name, ignore_errors=True)
        shutil.copytree(source, scratch / name, symlinks=True)
        return scratch / name

    start = fresh("start", world)
    if case.prepare is not None:
        code, said = call(case.prepare.split(), start)
        assert code == 0, said
    before = case.result(start) if case.prepare is not None else None
    now = fresh("now", start)
    code, said = call(case.words.split(), now)
    assert code == 0, said
    wanted = case.result(now)
    number = first
    while True:
        now = fresh("now", start)
        answer = answer_when_full(case.words.split(), now, number, stays)
        if answer.changes < number:
            yield (answer.changes, "" if answer.code == 0 else f"undisturbed: {answer.said[-3000:]}")
            return
        where = answer.place.replace(str(now), "")
        wrong = _wrong_answer(answer, case)
        if wrong:
            yield number, f"{where}: {wrong}"
        try:
            if answer.code == 0 and case.result(now) != wanted:
                yield number, f"{where}: said it was done, with another result"
            if (
                before is not None
                and case.kept
                and answer.code != 0
                and case.result(now) not in (before, wanted)
            ):
                yield number, f"{where}: what was there is another"
        except Exception as error:
            yield number, f"{where}: what was there cannot be read: {error!r}"
        code, said = call(case.words.split(), now)
        if code != 0:
            yield number, f"{where}: the rerun ended with {code}: {said[-300:]}"
        elif case.result(now) != wanted:
            yield number, f"{where}: the rerun gave another result"
        number += every


def _wrong_answer(answer: Answer, case: Case) -> str | None:
    if answer.code == 0:
        silent = any(part in answer.place for part in case.silent)
        return None if silent and "Traceback" not in answer.said else f"ended with 0: {answer.said[-500:]}"
    lines = [line for line in answer.said.splitlines() if ": error:" in line]
    if (
        answer.code != 2
        or len(lines) != 1
        or "Traceback" in answer.said
        or "Exception ignored" in answer.said
    ):
        return f"ended with {answer.code}: {answer.said[-1500:]}"
    if "No space left on device: '" not in answer.said and "the disk is full at" not in answer.said:
        return f"does not say that the disk is full, and where: {lines[0]}"
    return None


# What commands make, as values that can be compared


def traces(name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        from deferral_train.traces import open_traces

        found = open_traces(folder / name, verify=True)
        return [[record.id, record.rows, record.sha256] for record in found.records], found.complete

    return read


def fitted(name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        from deferral_train.heads.fingerprint import weights_key
        from deferral_train.training.checkpoint import read_checkpoint

        head, scalars = read_checkpoint(folder / name / "checkpoints" / "best.ckpt")
        return weights_key(head), scalars.get("regret")

    return read


def head(name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        from deferral_train import DeferralHead
        from deferral_train.heads.fingerprint import weights_key

        found = DeferralHead.from_pretrained(folder / name)
        return weights_key(found), found.metadata.get("alpha")

    return read


def outputs(name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        from deferral_train.decoding.outputs import read_lines

        return sorted(
            (row["rule"], row["repetition"], str(row["id"]), tuple(row["tokens"]))
            for row in read_lines(folder / name / "outputs.jsonl")
        )

    return read


def files(*names: str) -> Callable[[Path], Any]:
    """JSON files by content, without times and provenance; of other files whether they are whole."""

    def read(folder: Path) -> Any:
        found = {}
        for name in names:
            text = (folder / name).read_text(encoding="utf-8")
            found[name] = json.loads(text) if name.endswith(".json") else text.rstrip().endswith("</html>")
        return found

    return read


def pair(name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        from deferral_train.pairs.fingerprint import checkpoint_fingerprint

        return [checkpoint_fingerprint(folder / name / role)["weights"] for role in ("drafter", "verifier")]

    return read


COLLECT = (
    "collect --drafter drafter --verifier verifier --out collected --log-top-k 4 --device cpu --progress false "
    "--chunk-prompts 3 --prompts prompts.jsonl"
)
FIT = (
    "fit --model.head.class_path GapHead --model.head.init_args.features [drafter_max:logit,tv] --data.train fit "
    "--data.val val --trainer.max_epochs 2 --trainer.enable_progress_bar false --model.figure_every 1 "
    "--data.batch_size 200 --out fitted"
)
DECODE = (
    "decode --drafter drafter --verifier verifier --prompts prompts.jsonl --out decoded --max-new-tokens 3 "
    "--batch-size 6 --device cpu --rules lossless opt:alpha=0.1 --metrics exact_match"
)
EVALUATE = "evaluate --traces traces --rules opt --grid 3 --bootstrap 0 --prefixes 2 --out evaluation"
CHOOSE = "choose --outputs decode --metric exact_match --max-loss 0.9 --rule learned:head=head --head head --out choice"
CASES = {
    "collect": Case(COLLECT, traces("collected")),
    "collect-resumed": Case(COLLECT, traces("collected"), f"{COLLECT} --max-bytes 9000", kept=False),
    "collect-cascade": Case(
        f"{COLLECT} --prefixes cascade --rule opt:alpha=0.2 --max-new-tokens 3 --hidden both", traces("collected")
    ),
    "fit": Case(FIT, fitted("fitted")),
    "fit-again": Case(f"{FIT} --model.lr 0.01", fitted("fitted"), FIT),
    "decode": Case(DECODE, outputs("decoded")),
    "choose": Case(CHOOSE, head("head"), f"{CHOOSE} --confidence 0.9"),
    "export": Case("export --checkpoint head --out exported --alpha 0.5", head("exported"),
                   "export --checkpoint head --out exported --alpha 0.2"),
    "evaluate": Case(EVALUATE, files("evaluation/scores.json"), f"{EVALUATE} --seed 1"),
    "report": Case("report run", files("run/report.html"), "report run", silent=("tfevents",)),
    "train-pair": Case("", pair("pair")),
}  # fmt: skip


def make_world(folder: Path) -> None:
    """The worlds of both fuzzers of commands in one folder."""
    from fuzz import commands, commands_training

    commands.make_world(folder)
    commands_training.make_world(folder)
    for name in ("collected", "fitted", "pair"):
        shutil.rmtree(folder / name, ignore_errors=True)


def cases() -> dict[str, Case]:
    from fuzz import commands_training

    line = f"train-pair {commands_training.LINES['train-pair']}"
    return CASES | {"train-pair": Case(line, pair("pair"))}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--once", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="full-disk-") as folder:
        root = Path(folder).resolve()
        if "full_disk.so" not in os.environ.get("LD_PRELOAD", ""):
            environment = os.environ | {"LD_PRELOAD": str(build(root))}
            return subprocess.run(
                [sys.executable, "-m", "fuzz.full_disk", *sys.argv[1:]], env=environment
            ).returncode
        world = root / "world"
        world.mkdir()
        make_world(world)
        found: dict[str, Any] = {}
        for name in options.only:
            asked, wrong_answers, changes = (options.every, not options.once, options.first), 0, 0
            for number, wrong in problems(cases()[name], world, root / "scratch", *asked):
                changes = max(changes, number)
                if wrong:
                    wrong_answers += 1
                    print(f"FINDING {name} change {number}: {wrong}", flush=True)
            found[name] = [changes, wrong_answers]
        print(json.dumps(found))
    return int(any(count for _, count in found.values()))


if __name__ == "__main__":
    sys.exit(main())
