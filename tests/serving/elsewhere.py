"""An engine in a process of its own, for settings that spoil a process for later engines; prints what it said as JSON.

Arguments: the pair's folder, and JSON with `deferral`, `settings` (of `engines.start`) and `jobs` (of
`engines.generate`, over the first prompts).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def run_elsewhere(pair: Path, deferral: dict, settings: dict, jobs: list[dict]) -> dict[str, Any]:
    """`{"said": [tokens of each job], "counts": {label: {name: value}}}` of an engine in another process."""
    work = json.dumps({"deferral": deferral, "settings": settings, "jobs": jobs})
    run = subprocess.run(
        [sys.executable, __file__, str(pair), work],
        env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind"}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    line = next((line for line in run.stdout.splitlines() if line.startswith("SAID ")), None)
    assert line is not None, run.stdout[-2000:] + run.stderr[-2000:]
    return json.loads(line.removeprefix("SAID "))


def main() -> None:
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    from engines import generate, prompts, start

    from deferral_train.serving.counters import SCALARS, VARIABLE, read_folder

    pair, work = Path(sys.argv[1]), json.loads(sys.argv[2])
    llm = start(pair, work["deferral"], **work["settings"])
    said = [generate(llm, prompts(24), **job) for job in work["jobs"]]
    found = read_folder(os.environ[VARIABLE])
    counts = {label: {name: counters.get(name) for name in SCALARS} for label, counters in found.items()}
    print("\nSAID " + json.dumps({"said": said, "counts": counts}))


if __name__ == "__main__":
    main()
