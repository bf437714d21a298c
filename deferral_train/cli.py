"""The `deferral-train` command: a table of commands, one way to parse them, one way to fail.

The table is plain data so that ``--help`` imports neither torch nor a command. A command module offers
``run(...)`` with typed keyword parameters, which become flags, YAML keys and defaults at once; a module
with ``RAW_ARGUMENTS = True`` gets the remaining words instead, because another parser owns them.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from deferral_train.errors import InputError, config_errors, missing_extra

PROGRAM = "deferral-train"
TERMINATED = 128 + 15  # what a shell makes of SIGTERM

COMMANDS: dict[str, str] = {
    "run": "every stage for a pair and prompts: pair, traces, head, evaluation, decoding, report, verdict",
    "quickstart": "`run` on a small pair that it trains itself to answer questions about Python's library",
    "train-pair": "train a drafter/verifier pair from scratch on text or parallel text",
    "collect": "run both models over prompts and log their token distributions as traces",
    "fit": "train a deferral head on traces with Lightning (LightningCLI conventions)",
    "evaluate": "score rules and heads from traces alone: curves and tables",
    "decode": "run the cascade on prompts with any rules: quality, wall clock, calls, origin of each token",
    "rounds": "label along the cascade's own text, refit, decode, N times; choose round, head and price",
    "choose": "pick the operating point that meets a constraint, with a certificate",
    "export": "turn a training checkpoint into a head folder (safetensors, JSON, card; --onnx)",
    "report": "write one self-contained HTML page about a run folder",
    "count-rejections": "count which drafted tokens were rejected for which, from traces: the table of rule csd",
    "rules": "print every rule with its dial: parameter, range, lossless end, drafter end",
    "doctor": "say what this machine, pair, trace folder or head can and cannot do",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 bad input, 130 interrupted, 143 terminated,
    1 a defect of ours.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if words[0] == "--version":
        print(_version())
        return 0
    name = words[0]
    if name not in COMMANDS:
        return _fail(PROGRAM, f"unknown command '{name}'; the commands are: {', '.join(COMMANDS)}")
    try:
        with _quiet_log_writers():
            return _dispatch(name, words[1:])
    except InputError as error:
        return _fail(f"{PROGRAM} {name}", str(error))
    except ModuleNotFoundError as error:
        return _fail(f"{PROGRAM} {name}", str(missing_extra(error)))
    except OSError as error:
        return _os_error(name, error)
    except KeyboardInterrupt:
        print(f"{PROGRAM} {name}: interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    except SystemExit as stop:
        if stop.code is not None:
            raise
        # Lightning's way out when it was sent SIGTERM: without a status, which would read as success.
        print(f"{PROGRAM} {name}: terminated; run the same command again to continue", file=sys.stderr)
        return TERMINATED


def _dispatch(name: str, words: list[str]) -> int:
    _quiet_libraries()
    module = importlib.import_module(f"deferral_train.commands.{name.replace('-', '_')}")
    if getattr(module, "RAW_ARGUMENTS", False):
        return int(module.run(words) or 0)
    settings = _parse(name, module, words)
    code = int(module.run(**_grouped(module, settings)) or 0)
    _record(name, settings)
    return code


def _parse(name: str, module: ModuleType, words: list[str]) -> dict[str, Any]:
    """Flags over ``--config`` YAML over defaults; unknown flags and keys are refused by name."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=f"{PROGRAM} {name}", exit_on_error=False, description=COMMANDS[name])
    parser.add_argument("--config", action="config", help="YAML file with any of the flags below as keys")
    skipped = _add_settings(parser, module)
    # Annotations that are still text make jsonargparse run the module's imports for type checkers, torch among them.
    module.run.__annotations__ = get_type_hints(module.run)
    parser.add_function_arguments(module.run, sub_configs=True, skip=skipped)
    for positional in getattr(module, "POSITIONAL", ()):
        words = _name_positional(words, positional)
    with config_errors():
        words = _switched([_underscored(word) for word in words], _flags(module, (bool,)))
        parsed = parser.parse_args(_gathered(words, _flags(module, (list, tuple))))
        settings = parser.instantiate(parsed).as_dict()
    settings.pop("config", None)
    return settings


def _add_settings(parser: Any, module: ModuleType) -> set[str | int]:
    """A module whose `run` takes one config object names its class: the fields become the flags."""
    if not hasattr(module, "SETTINGS"):
        return set()
    hints = get_type_hints(module.SETTINGS)  # resolved, as those of `run` are
    module.SETTINGS.__annotations__ = hints
    module.SETTINGS.__init__.__annotations__ = hints
    parser.add_class_arguments(module.SETTINGS, sub_configs=True)
    return {"config"}


def _grouped(module: ModuleType, settings: dict[str, Any]) -> dict[str, Any]:
    if not hasattr(module, "SETTINGS"):
        return settings
    own = {field.name for field in fields(module.SETTINGS)}
    config = module.SETTINGS(**{name: value for name, value in settings.items() if name in own})
    return {"config": config, **{name: value for name, value in settings.items() if name not in own}}


def _underscored(word: str) -> str:
    """``--log-top-k=0`` as the parameter is called: ``--log_top_k=0``; values stay as they are."""
    flag, equals, value = word.partition("=")
    return flag.replace("-", "_").replace("__", "--", 1) + equals + value if word.startswith("--") else word


def _flags(module: ModuleType, kinds: tuple[type, ...]) -> set[str]:
    """Flags of parameters or fields whose type is one of ``kinds``, or one of these and None."""
    annotated = get_type_hints(module.run)
    if hasattr(module, "SETTINGS"):
        annotated |= get_type_hints(module.SETTINGS)
    return {f"--{name}" for name, hint in annotated.items() if _kind(hint) in kinds}


def _kind(hint: Any) -> Any:
    """The plain type of a type hint, of the first where there are several: ``list`` of ``list[str] | None``."""
    if get_origin(hint) in (Union, UnionType):
        hint = get_args(hint)[0]
    return get_origin(hint) or hint


def _switched(words: list[str], switches: set[str]) -> list[str]:
    """``--fresh`` alone as ``--fresh=true``; a value that follows stays its value."""
    following = [*words[1:], ""]
    return [
        f"{word}=true" if word in switches and after.lower() not in ("true", "false") else word
        for word, after in zip(words, following)
    ]


def _gathered(words: list[str], lists: set[str]) -> list[str]:
    """``--rules opt token_v3`` as one value, ``--rules=["opt", "token_v3"]``, and so ``--rules=opt``; a written-out
    list stays as it is.
    """
    gathered: list[str] = []
    at = 0
    while at < len(words):
        (flag, equals, first), end = words[at].partition("="), at + 1
        while flag in lists and end < len(words) and not words[end].startswith("--"):
            end += 1
        values = [*([first] if equals and flag in lists else []), *words[at + 1 : end]]
        written_out = len(values) == 1 and values[0].startswith("[")
        gathered += [f"{flag}={json.dumps(values)}"] if values and not written_out else words[at:end]
        at = end
    return gathered


def _name_positional(words: list[str], name: str) -> list[str]:
    """Let `report runs/x` mean `report --run runs/x`: the first word becomes the named flag."""
    if words and not words[0].startswith("-"):
        return [f"--{name}={words[0]}", *words[1:]]
    return words


def _record(name: str, settings: dict[str, Any]) -> None:
    """Keep the resolved settings and their provenance beside what a command wrote."""
    out = settings.get("out")
    if out is None or "://" in str(out) or not Path(out).is_dir():
        return
    from deferral_train import provenance

    seeds = {key: value for key, value in settings.items() if key.endswith("seed") and isinstance(value, int)}
    record = {"command": name, "config": provenance.record_of(settings), **provenance.collect(seeds)}
    provenance.write_json(Path(out) / f"{name}.provenance.json", record)


def _quiet_libraries() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Notes of Lightning's about itself that no user of this tool can act on.
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
    warnings.filterwarnings("ignore", message=r".*is smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=r".*could not find the monitored key in the returned metrics.*")
    warnings.filterwarnings("ignore", message=r"Checkpoint directory .* exists and is not empty.*")


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND [--config FILE.yaml] [flags]",
            "",
            "Learned deferral between a small drafter and a large verifier language model.",
            "",
            *lines,
            "",
            f"`{PROGRAM} COMMAND --help` lists a command's flags.",
        ]
    )


def _version() -> str:
    from deferral_train import __version__

    return f"{PROGRAM} {__version__}"


def _os_error(name: str, error: OSError) -> int:
    remedies = {
        errno.ENOENT: "check the path",
        errno.EACCES: "check the permissions or choose another folder",
        errno.EROFS: "choose a folder on a writable disk",
        errno.ENOSPC: "free some disk space and run the same command again",
        errno.EDQUOT: "free some of your share of the disk and run the same command again",
        errno.EFBIG: "raise the limit on the size of files and run the same command again",
        errno.EIO: "the disk failed; name a folder on another one",
        errno.ENAMETOOLONG: "name a shorter path",
        errno.ELOOP: "the links at that path go in circles; name another",
        errno.EINVAL: "check the path",
        errno.EPERM: "check the permissions or choose another folder",
        errno.EEXIST: "choose another path",
        errno.ENOTDIR: "a folder was expected",
        errno.EISDIR: "a file was expected",
    }
    if error.errno not in remedies:
        raise error
    where = f": {error.filename!r}" if error.filename else ""
    return _fail(f"{PROGRAM} {name}", f"{error.strerror}{where}; {remedies[error.errno]}")


@contextmanager
def _quiet_log_writers() -> Iterator[None]:
    """Keep TensorBoard's writing thread from printing a traceback: it hands its error to the next call of its log."""
    before = threading.excepthook

    def hook(raised: threading.ExceptHookArgs) -> None:
        if not type(raised.thread).__module__.startswith("tensorboard."):
            before(raised)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _fail(who: str, message: str) -> int:
    print(f"{who}: error: {_one_line(message)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
