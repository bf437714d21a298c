"""An OpenAI-compatible vLLM server of a pair on loopback, for the benchmark over HTTP and the tests of the plug-in."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def serve(
    pair: Path,
    output: Path,
    *,
    context: int,
    sequences: int,
    drafts: int,
    deferral: Mapping[str, Any] | None,
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> tuple[str, subprocess.Popen]:
    """A server that is being started; its address and process.

    Args:
        pair: folder with ``drafter`` and ``verifier``.
        output: file that takes what the server prints.
        context: most tokens of a request. sequences: requests at once. drafts: tokens of a block.
        deferral: the plug-in's settings; None serves the verifier alone.
        options, environment: added to the command line and to this process's environment.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(pair / "verifier"),
        "--served-model-name", "pair", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager",
        "--dtype", "float32", "--max-model-len", str(context), "--max-num-seqs", str(sequences), *options,
    ]  # fmt: skip
    if deferral is not None:
        speculative = {
            "model": str(pair / "drafter"),
            "method": "draft_model",
            "num_speculative_tokens": drafts,
            "draft_sample_method": "probabilistic",
        }
        command += ["--speculative-config", json.dumps(speculative)]
        command += ["--additional-config", json.dumps({"deferral": deferral})]
    variables = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **(environment or {})}
    with open(output, "wb") as file:
        process = subprocess.Popen(command, env=variables, stdout=file, stderr=subprocess.STDOUT)
    return f"http://127.0.0.1:{port}", process
