"""Forks Python processes on request: ``server.py ADDRESS``; writes ``ready`` when it takes requests. See `Warm`."""

from __future__ import annotations

import array
import atexit
import gc
import json
import os
import random
import runpy
import selectors
import signal
import socket
import struct
import sys
import threading
import traceback
import types
import warnings
from pathlib import Path

# Everything heavy that our commands import sooner or later; nothing of ours, since each process brings its own copy.
import jsonargparse  # noqa: F401
import numpy  # noqa: F401
import pandas  # noqa: F401
import pytorch_lightning  # noqa: F401
import sacrebleu  # noqa: F401
import scipy.stats  # noqa: F401
import sklearn.linear_model  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
import torchmetrics  # noqa: F401
import transformers.models.llama.modeling_llama
import transformers.models.t5.modeling_t5
import transformers.pipelines  # noqa: F401

STARTED_PATH = sys.path[1:]


def become(words: list[str], environment: dict[str, str]) -> int:
    """Do in this process what ``python WORDS`` would; returns its exit status."""
    words = list(words)
    while words and words[0] == "-W":
        warnings.simplefilter(words[1])  # type: ignore[arg-type]
        del words[:2]
    given = environment.get("PYTHONPATH", "")
    rest = [*map(os.path.abspath, filter(None, given.split(os.pathsep))), *STARTED_PATH]
    try:
        if words[0] == "-c":
            sys.argv, sys.path = ["-c", *words[2:]], ["", *rest]
            main = types.ModuleType("__main__")
            sys.modules["__main__"] = main
            exec(compile(words[1], "<string>", "exec"), main.__dict__)
        elif words[0] == "-m":
            sys.argv, sys.path = words[1:], [os.getcwd(), *rest]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            assert not words[0].startswith("-"), f"a warm process does not know {words[0]}"
            sys.argv, sys.path = words, [os.path.dirname(os.path.abspath(words[0])), *rest]
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return (stop.code or 0) & 255
        print(stop.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def child(request: dict, streams: list[int]) -> None:
    """Take over the program's streams, folder and environment and run; never returns."""
    code = 1
    try:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        random.seed()
        code = become(request["words"], request["environment"])
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def received(connection: socket.socket) -> tuple[dict, list[int]]:
    """A program's request and its three streams."""
    size, ancillary, _, _ = connection.recvmsg(8, socket.CMSG_SPACE(3 * 4))
    streams = array.array("i")
    for _, _, data in ancillary:
        streams.frombytes(data)
    text = b""
    while len(text) < int.from_bytes(size, "big"):
        text += connection.recv(1 << 16)
    return json.loads(text), list(streams)


def serve(listener: socket.socket) -> None:
    """Fork for each program that connects, pass signals on, answer with the exit status."""
    ready = selectors.DefaultSelector()
    ready.register(listener, selectors.EVENT_READ, None)
    while True:
        for key, _ in ready.select():
            if key.data is None:
                connection, _ = listener.accept()
                request, streams = received(connection)
                asks = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[
                    0
                ]
                pid = os.fork()
                if pid == 0:
                    listener.close()
                    connection.close()
                    ready.close()
                    child(request, streams)
                for stream in streams:
                    os.close(stream)
                Path(f"{sys.argv[1]}.{asks}").write_text(str(pid))
                process = os.pidfd_open(pid)
                ready.register(connection, selectors.EVENT_READ, (pid, connection, process))
                ready.register(process, selectors.EVENT_READ, (pid, connection, process))
                continue
            pid, connection, process = key.data
            if key.fileobj is connection:
                for number in connection.recv(64) or [signal.SIGKILL]:
                    os.kill(pid, number)
                    if number == signal.SIGKILL:
                        ready.unregister(connection)  # the program is gone
                continue
            _, status = os.waitpid(pid, 0)
            ready.unregister(process)
            os.close(process)
            if connection in ready.get_map():
                ready.unregister(connection)
                connection.sendall(os.waitstatus_to_exitcode(status).to_bytes(4, "big", signed=True))
            connection.close()


if __name__ == "__main__":
    asked = socket.socket(socket.AF_UNIX)
    asked.bind(sys.argv[1])
    asked.listen(32)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    gc.freeze()
    print("ready", flush=True)
    serve(asked)
