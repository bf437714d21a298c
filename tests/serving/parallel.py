"""Run by test_starts.py in a process of its own: an engine of two tensor-parallel ranks; prints what it said."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    from engines import generate, prompts, start

    from deferral_train.serving.counters import VARIABLE, read_folder

    pair, spec = Path(sys.argv[1]), sys.argv[2]
    llm = start(
        pair,
        {"rule": spec},
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        speculative={"draft_tensor_parallel_size": 2},
    )
    said = [generate(llm, prompts(12), temperature=temperature) for temperature in (0.0, 1.0)]
    labels = {name: counters.get("requests") for name, counters in read_folder(os.environ[VARIABLE]).items()}
    print("\nSAID " + json.dumps({"said": said, "requests": labels}))
