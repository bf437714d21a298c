"""Coverage-guided fuzzing of the loaders with atheris; `make fuzz SECONDS=600` runs them all.

    python -m fuzz.run --seconds 600 [--only head_config shard] [--out runs/fuzz]

Each loader runs in a process of its own: a native crash, a hang of 20 s or 3 GB of memory ends it and counts as a
finding, like any exception that is no InputError. Inputs that show one are kept in OUT/LOADER/findings, one for each
place in the code; `summary.json` states executions, corpus size and findings. Exit code 1 where there is one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def fuzz_one(name: str, out: Path, seconds: int) -> None:
    """Fuzz one loader in this process; does not return."""
    import atheris

    with atheris.instrument_imports(include=["deferral_train"]):
        from fuzz.loaders import LOADERS

    loader = LOADERS[name]
    scratch = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-", dir=_memory()))
    corpus, findings = out / "corpus", out / "findings"
    for folder in (corpus, findings):
        folder.mkdir(parents=True, exist_ok=True)
    for seed in loader.seeds():
        (corpus / hashlib.sha1(seed).hexdigest()).write_bytes(seed)
    seen: set[str] = set()
    taken = [0, 0]

    def test(data: bytes) -> None:
        try:
            taken[loader(data, scratch)] += 1
        except Exception as error:
            place = where(error)
            if place not in seen:
                seen.add(place)
                print(f"FINDING {place}: {' '.join(str(error).split())[:200]}", flush=True)
                (findings / hashlib.sha1(place.encode()).hexdigest()[:16]).write_bytes(data)
        if sum(taken) % 50 == 0:
            (out / "taken.json").write_text(json.dumps({"refused": taken[0], "accepted": taken[1]}))

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        random = Random(seed)
        damaged = atheris.Mutate(data, max_size) if random.random() < 0.2 else loader.damage(random, data)
        return damaged[:max_size]

    options = [
        f"-max_total_time={seconds}",
        "-max_len=65536",
        "-timeout=20",
        "-rss_limit_mb=3072",
        "-print_final_stats=1",
        f"-artifact_prefix={findings}/native-",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], test, custom_mutator=mutate)
    atheris.Fuzz()


def where(error: Exception) -> str:
    """Type of an exception and the innermost line of ours that let it through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "deferral_train" in frame.filename] or frames
    return f"{type(error).__name__} at {Path(ours[-1].filename).name}:{ours[-1].lineno}"


def _memory() -> str | None:
    """A folder in memory where there is one: a run writes hundreds of thousands of files."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def supervise(name: str, out: Path, seconds: int) -> dict[str, Any]:
    """Fuzz one loader in a process of its own and say what came of it."""
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.txt"
    command = [
        sys.executable,
        "-m",
        "fuzz.run",
        "--child",
        name,
        "--seconds",
        str(seconds),
        "--out",
        str(out),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    with open(log, "wb") as file:
        code = subprocess.run(command, stdout=file, stderr=file, env=environment, cwd=ROOT).returncode
    text = log.read_text(errors="replace")
    executed = re.search(r"stat::number_of_executed_units: (\d+)", text)
    coverage = re.findall(r"cov: (\d+)", text)
    taken = json.loads((out / "taken.json").read_text()) if (out / "taken.json").exists() else {}
    summary = {
        "loader": name,
        "seconds": round(time.monotonic() - start),
        "executions": int(executed.group(1)) if executed else None,
        "corpus": len(list((out / "corpus").iterdir())) if (out / "corpus").is_dir() else 0,
        "coverage": int(coverage[-1]) if coverage else None,
        **taken,
        "exit_code": code,
        "findings": re.findall(r"^FINDING (.*)$", text, re.MULTILINE)
        + re.findall(r"^SUMMARY: (.*)$", text, re.MULTILINE),
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=int, default=600, help="for each loader")
    parser.add_argument("--only", nargs="+", help="loaders; default all")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "fuzz")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        fuzz_one(options.child, options.out, options.seconds)
        return 1  # atheris ends the process itself
    from fuzz.loaders import LOADERS

    failed = False
    for name in options.only or LOADERS:
        summary = supervise(name, options.out / name, options.seconds)
        print(json.dumps(summary), flush=True)
        failed |= bool(summary["findings"]) or summary["exit_code"] != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
