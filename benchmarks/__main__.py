"""Run every ratio benchmark for a device, each in a process of its own, and keep their JSON in benchmarks/results/.

python -m benchmarks --device cpu            # make bench
python -m benchmarks --device cuda           # make bench-gpu
python -m benchmarks --only verify decoding
"""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
# Name -> devices it has a part for. Order: quick first.
BENCHMARKS = {
    "verify": ("cpu", "cuda"),
    "head_latency": ("cpu",),
    "pair_memory": ("cpu",),
    "score_rules": ("cpu",),
    "read_traces": ("cpu",),
    "fit_speed": ("cpu", "cuda"),
    "collect": ("cpu", "cuda"),
    "decoding": ("cpu", "cuda"),
}
# Further runs on a device: name -> (suffix of the JSON, arguments).
BESIDES = {
    ("decoding", device): [("-smollm2", ["--shape", "smollm2", "--limit", "3"])] for device in ("cpu", "cuda")
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", choices=sorted(BENCHMARKS), default=list(BENCHMARKS))
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    if options.device == "cuda" and not _cuda():
        print("benchmarks: no CUDA device here; nothing was run", file=sys.stderr)
        return 2
    failed = []
    for name in options.only:
        if options.device not in BENCHMARKS[name]:
            continue
        for suffix, more in [("", []), *BESIDES.get((name, options.device), [])]:
            today = datetime.date.today().isoformat()
            out = options.out / f"{name}-{today}-{options.device}{suffix}.json"
            print(f"== {name}{suffix} ({options.device})", flush=True)
            command = [
                sys.executable,
                "-m",
                f"benchmarks.{name}",
                "--device",
                options.device,
                "--out",
                str(out),
            ]
            if subprocess.run([*command, *more], cwd=HERE.parent).returncode:
                failed.append(name + suffix)
    if failed:
        print(f"benchmarks: failed: {', '.join(failed)}", file=sys.stderr)
    print("The studies take minutes to hours each: `python -m benchmarks.studies` lists them.")
    return 1 if failed else 0


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
