"""Random command lines and corrupted folders; nothing but one line may come out of a command.

    python -m fuzz.commands --seconds 120 [--only choose report] [--seed 0] [--out runs/fuzz-commands]

Every case is a good call of a command on small real folders (a tiny pair, prompts, traces, decoded outputs, a head, a
run), damaged in one to three places: words dropped, doubled, swapped or given odd values; files cut, altered, emptied,
removed or replaced by folders. A case that raises, prints more than a line of error, or returns anything but 0 or 2 is
a finding; it is kept as its seed, from which it is made again. Exit code 1 where there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from fuzz import mutate
from tiny_models import save_tiny_pair
from traces.conftest import make_manifest, write_folder

from deferral_train import cli
from deferral_train.heads import GapHead
from deferral_train.pairs.prompts import Prompt, write_prompts

SLOW = 30  # seconds that a case may take
WORDS = (
    "", "-1", "0", "1", "1.5", "nan", "inf", "1e9", "true", "null", "[]", "{}", "opt", "token_v3:alpha=0.2", "learned",
    "learned:head=nowhere", "learned:head=head,alpha=x", "opt:alpha=", "opt:alpha=9", ":", "=", "a:b:c=1", "os:system",
    "nowhere", "/dev/null", "/proc/none/x", "a" * 300, "é", "--", "-", "prompts.jsonl", "head", "traces", "decode", ".",
    "exact_match", "chrf", "bleu", "blue", "command:false", "[1, two]", "{a: 1}", "!!python", "${HOME}", "%s", "s3://b/x",
)  # fmt: skip
FLAGS = (
    "--help-me",
    "--config",
    "--out",
    "--head",
    "--traces",
    "--rules",
    "--seed",
    "--fresh",
    "--bootstrap",
    "--alpha",
)


def make_world(folder: Path) -> None:
    """Small real folders, made by the commands themselves where these write them."""
    torch.manual_seed(0)
    save_tiny_pair("llama", folder)
    prompts = [Prompt(f"p{i}", f"w{i} w{i + 1} w2", "w1 w2") for i in range(12)]
    write_prompts(folder / "prompts.jsonl", prompts)
    write_folder(folder / "traces", make_manifest())
    head = GapHead(["drafter_max", "verifier_max"], hidden=[4])
    head.metadata = {"alpha": 0.1}
    head.save_pretrained(folder / "head")
    code, text = call(words_of("decode", folder), folder)
    if code != 0:
        raise RuntimeError(f"the world cannot be made: {text}")
    run = folder / "run"
    shutil.copytree(folder / "decode", run / "decode")
    code, text = call([*words_of("evaluate", folder), "--out", str(run / "evaluation")], folder)
    if code != 0:
        raise RuntimeError(f"the world cannot be made: {text}")


def words_of(command: str, world: Path) -> list[str]:
    """A good call of a command, quick on the world's folders."""
    lines = {
        "decode": "--drafter drafter --verifier verifier --prompts prompts.jsonl --out decode --max-new-tokens 3 "
        "--batch-size 12 --device cpu --rules lossless opt:alpha=0.1 opt:alpha=0.4 learned:head=head",
        "choose": "--outputs decode --metric exact_match --max-loss 0.9 --rule opt --out choice",
        "export": "--checkpoint head --out exported --alpha 0.2",
        "evaluate": "--traces traces --rules opt --grid 3 --bootstrap 0 --figures false --prefixes 2",
        "report": "run",
        "doctor": "--head head --traces traces --folder .",
        "rules": "",
        "run": "--config run.yaml --out out",
    }
    return [command, *lines[command].split()]


COMMANDS = ("decode", "choose", "export", "evaluate", "report", "doctor", "rules", "run")
READS = {  # what of the world a case of the command may damage
    "decode": ("decode", "head", "prompts.jsonl", "drafter", "verifier"),
    "choose": ("decode", "head", "traces"),
    "export": ("head", "exported"),
    "evaluate": ("traces", "head", "decode"),
    "report": ("run",),
    "doctor": ("head", "traces"),
    "rules": (),
    "run": ("run.yaml", "prompts.jsonl"),
}
CONFIG = {
    "text": {part: {"path": "prompts.jsonl"} for part in ("fit", "validation", "calibration", "test")},
    "pair": {"drafter": "drafter", "verifier": "verifier", "device": "cpu"},
    "heads": {"candidates": {"gap": {"head": "gap", "hidden": [4], "epochs": 1}}},
    "decode": {"limit": 2, "max_new_tokens": 3},
}


def case(seed: int, world: Path, scratch: Path, only: tuple[str, ...] = COMMANDS) -> list[str]:
    """Prepare ``scratch`` and return the command line of a seed."""
    random = Random(seed)
    command = random.choice(only)
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(world, scratch)
    (scratch / "run.yaml").write_text(json.dumps(CONFIG))
    words = words_of(command, scratch)
    if command == "choose" and random.random() < 0.3:
        words = ["choose", "--traces", "traces", "--rule", "opt", "--max-token-risk", "0.5"]
    if command in ("evaluate",) and random.random() < 0.3:
        words += ["--decode", "decode"]
    if command in ("choose", "decode", "evaluate") and random.random() < 0.2:
        words += [
            "--head" if command == "choose" else "--rules",
            "head" if command == "choose" else "learned:head=head",
        ]
    for _ in range(random.choice((1, 1, 2, 3))):
        if READS[command] and random.random() < 0.6:
            damage(random, scratch / random.choice(READS[command]))
        else:
            words = [command, *damaged_words(random, words[1:])]
    return words


def damaged_words(random: Random, words: list[str]) -> list[str]:
    """One word dropped, doubled, swapped, altered, or an odd flag or value put in."""
    words = list(words)
    at = random.randrange(len(words) + 1)
    kind = random.randrange(6)
    if kind == 0 and words:
        del words[min(at, len(words) - 1)]
    elif kind == 1 and words:
        words.insert(at, random.choice(words))
    elif kind == 2:
        words.insert(at, random.choice(WORDS))
    elif kind == 3:
        words[at:at] = [random.choice(FLAGS), random.choice(WORDS)]
    elif kind == 4 and words:
        values = [i for i, word in enumerate(words) if not word.startswith("--")] or [0]
        words[random.choice(values)] = random.choice(WORDS)
    elif words:
        place = random.randrange(len(words))
        words[place] = words[place][:-1] or "-"
    return words


def damage(random: Random, path: Path) -> None:
    """One file at or below ``path`` altered, cut, emptied, removed, or replaced by a folder."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    if not files or not files[0].exists():
        return
    file = random.choice(files)
    kind = random.randrange(8)
    if kind == 0:
        file.unlink()
    elif kind == 1:
        file.write_bytes(b"")
    elif kind == 2:
        file.unlink()
        file.mkdir()
    else:
        data = file.read_bytes()
        if file.suffix in (".json", ".yaml"):
            data = mutate.damage_json(random, data)
        elif file.suffix == ".jsonl":
            data = mutate.damage_json_lines(random, data)
        elif file.suffix == ".safetensors":
            data = mutate.damage_safetensors(random, data)
        else:
            data = mutate.damage_bytes(random, data)
        file.write_bytes(data)


class TooSlow(BaseException):
    """A case that took longer than SLOW; no Exception, so that no handler takes it for one of a file."""


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def call(words: list[str], folder: Path) -> tuple[int | None, str]:
    """Run a command line in ``folder``; its exit code and what it wrote to standard error."""
    said, errors, before = io.StringIO(), io.StringIO(), Path.cwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                code: int | None = cli.main(words)
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 0
    finally:
        os.chdir(before)
    return code, errors.getvalue()


def problem(
    seed: int, world: Path, scratch: Path, only: tuple[str, ...] = COMMANDS
) -> tuple[list[str], str | None]:
    """The command line of a seed, and what is wrong with how it was answered; None where nothing is."""
    words = case(seed, world, scratch, only)
    # A run whose damage did not hurt works on: that is no answer to bad input, and no finding.
    return words, fault(words, scratch, SLOW, slow=words[0] != "run", one_line=words[0] != "doctor")


def fault(
    words: list[str], scratch: Path, seconds: int, slow: bool = True, one_line: bool = True
) -> str | None:
    """The fault of an answer to a command line, in a few words; None where there is none.

    Args:
        seconds: that the command may take; ``slow``: taking longer is a fault.
        one_line: bad input must be answered by exactly one line of error.
    """
    try:
        with limited(seconds):
            code, text = call(words, scratch)
    except TooSlow:
        return "slow" if slow else None
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "deferral_train" in f.filename]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "elsewhere"
        return f"{type(error).__name__} at {place}: {' '.join(str(error).split())[:160]}"
    if code not in (0, 2):
        return f"exit code {code}"
    lines = [line for line in text.splitlines() if ": error:" in line]
    return (
        f"{len(lines)} lines of error: {text[:160]!r}" if code == 2 and one_line and len(lines) != 1 else None
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=list(COMMANDS), choices=COMMANDS)
    parser.add_argument("--out", type=Path, help="where findings are kept; default nowhere")
    options = parser.parse_args()
    found: dict[str, tuple[int, list[str]]] = {}
    tried: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="fuzz-commands-") as folder:
        world, scratch = Path(folder) / "world", Path(folder) / "scratch"
        world.mkdir()
        make_world(world)
        end, seed = time.monotonic() + options.seconds, options.seed
        while time.monotonic() < end:
            words, wrong = problem(seed, world, scratch, tuple(options.only))
            tried[words[0]] += 1
            if wrong is not None and wrong.partition(":")[0] not in {
                known.partition(":")[0] for known in found
            }:
                found[wrong] = (seed, words)
                print(f"FINDING seed {seed}: {wrong}\n    {' '.join(words)[:300]}", flush=True)
            seed += 1
    summary = {
        "cases": dict(tried),
        "findings": {wrong: [seed, words] for wrong, (seed, words) in found.items()},
    }
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps({"cases": summary["cases"], "findings": len(found)}))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
