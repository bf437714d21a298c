"""Scoring position rules and one head, 40 dial values each, on a million summary rows.

    python -m benchmarks.score_rules --rows 1000000 --out results.json

Writes synthetic traces to a temporary folder (not timed), opens them and times `score_rules` with its bootstrap.
Memory is the peak of a process of its own that does nothing else.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import flags, keep
from deferral_train.heads.gap import GapHead
from deferral_train.rules import make_rule
from deferral_train.traces import Chunk, Manifest, TraceWriter, open_traces, prepare_folder

RULES = ("chow", "chow_log", "diff", "diff_log", "opt", "opt_log", "opt_verifier", "bild", "fuzzy")
FEATURES = ("drafter_max", "verifier_max", "verifier_at_drafter_argmax", "drafter_entropy", "tv")
TOKENS_PER_PROMPT = 100
SHARD_ROWS = 100_000


def columns(rows: int, first_prompt: int, seed: int) -> dict[str, np.ndarray]:
    """Plausible summary rows: probabilities, entropies and distances in their ranges, tied to each other."""
    g = np.random.default_rng(seed)
    prompts = -(-rows // TOKENS_PER_PROMPT)
    values: dict[str, np.ndarray] = {}
    sure = g.beta(2, 1, size=rows)
    values["drafter_max"] = np.clip(sure + g.normal(0, 0.1, rows), 0.01, 1)
    values["verifier_max"] = np.clip(sure + g.normal(0.05, 0.1, rows), 0.01, 1)
    differ = g.random(rows) < 0.5 * (1 - sure)
    values["drafter_argmax"] = g.integers(0, 5000, rows)
    values["verifier_argmax"] = np.where(differ, values["drafter_argmax"] + 1, values["drafter_argmax"])
    values["verifier_at_drafter_argmax"] = np.where(differ, 0.4, 1.0) * values["verifier_max"]
    values["drafter_at_verifier_argmax"] = np.where(differ, 0.4, 1.0) * values["drafter_max"]
    values["tv"] = values["tv_unscaled"] = np.clip(
        np.abs(values["drafter_max"] - values["verifier_max"]) + 0.1 * differ, 0, 1
    )
    for model in ("drafter", "verifier"):
        values[f"{model}_entropy"] = -3 * np.log(values[f"{model}_max"])
        values[f"{model}_sum_squares"] = values[f"{model}_max"] ** 2
        values[f"{model}_logsumexp"] = g.normal(10, 1, rows)
        values[f"{model}_logprob"] = np.log(g.beta(1, 1, rows) + 1e-6)
    for name in ("kl", "reverse_kl", "js", "cross_entropy", "product_sum"):
        values[name] = values["tv"] * (0.6 if name == "js" else 1.0)
    right = g.random(rows) < values["verifier_max"]
    values["gold"] = np.where(right, values["verifier_argmax"], 5001)
    values["token"] = values["gold"]
    values["prompt"] = first_prompt + np.repeat(np.arange(prompts), TOKENS_PER_PROMPT)[:rows]
    values["position"] = np.tile(np.arange(TOKENS_PER_PROMPT), prompts)[:rows]
    return values


def write(folder: Path, rows: int) -> None:
    """Traces of `rows` rows in shards of 100,000."""
    per_shard = SHARD_ROWS // TOKENS_PER_PROMPT
    prompts = rows // TOKENS_PER_PROMPT
    chunks = [
        Chunk(number, number, (tuple(range(start, min(start + per_shard, prompts))),))
        for number, start in enumerate(range(0, prompts, per_shard))
    ]
    ids = tuple(f"p{number}" for number in range(prompts))
    manifest = Manifest(pair={}, prefixes="reference", prompt_ids=ids, chunks=tuple(chunks))
    writer = TraceWriter(str(folder), manifest)
    for chunk in prepare_folder(str(folder), manifest):
        count = len(chunk.prompts) * TOKENS_PER_PROMPT
        writer.write(chunk, columns(count, chunk.prompts[0], chunk.id))


def score(folder: Path, bootstrap: int) -> dict[str, float]:
    """Time and peak memory of scoring; run in a process of its own."""
    from deferral_train.evaluation import score_rules

    torch.manual_seed(0)
    head = GapHead(FEATURES, hidden=(64, 64)).eval()
    rules = {name: name for name in RULES} | {"head": make_rule("learned", head=head, alpha=0.0)}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, start_cpu = time.perf_counter(), time.process_time()
    table = score_rules(open_traces(folder), rules, bootstrap=bootstrap)
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    table.matched()
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "matched_seconds": time.perf_counter() - start,
        "peak_gib": peak / 2**20,
        "before_gib": before / 2**20,
        "settings": sum(len(scores.values) for scores in table.rules.values()),
        "rows": int(table.rows_per_prompt.sum()),
    }


def main() -> int:
    parser = flags(__doc__, ("cpu",), threads=None)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--bootstrap", type=int, default=1000)
    parser.add_argument("--folder", type=Path, help="score these traces; used by the process that measures")
    options = parser.parse_args()
    if options.folder is not None:
        print(json.dumps(score(options.folder, options.bootstrap)))
        return 0
    with tempfile.TemporaryDirectory() as place:
        write(Path(place) / "traces", options.rows)
        command = [sys.executable, "-m", "benchmarks.score_rules", "--folder", f"{place}/traces"]
        command += ["--bootstrap", str(options.bootstrap)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    result["limits"] = {"seconds": 20, "peak_gib": 2}
    print(
        f"{result['rows']} rows, {result['settings']} settings: {result['seconds']:.1f} s "
        f"(limit 20; {result['cpu_seconds']:.1f} s of processor time), "
        f"peak {result['peak_gib']:.2f} GiB (limit 2), of which {result['before_gib']:.2f} imports"
    )
    keep(options, result, {"seed": 0})
    return 0 if result["seconds"] < 20 and result["peak_gib"] < 2 else 1


if __name__ == "__main__":
    sys.exit(main())
