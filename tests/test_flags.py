"""Every command's flags and their defaults, as ``flags.json`` keeps them: a rename or a new default is made on purpose.

``PYTHONPATH=. python tests/test_flags.py`` writes the file anew.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from pathlib import Path

import pytest

from deferral_train import cli

KEPT = Path(__file__).with_name("flags.json")
# Of `fit` Lightning owns these, and they change with its release; the last two every command has.
LIGHTNINGS = ("--trainer", "--optimizer", "--lr_scheduler", "--help", "--print_config")


def flags(command: str) -> dict[str, str | None]:
    """Flag to default (None where none is shown) as ``--help`` prints them."""
    printed, columns = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "10000"  # one line per flag
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            cli.main([command, "--help"])
    finally:
        os.environ.pop("COLUMNS") if columns is None else os.environ.update(COLUMNS=columns)
    found: dict[str, str | None] = {}
    for entry in re.split(r"\n(?=  -)", printed.getvalue()):
        flag = re.match(r"  (?:-\w(?: \w+)?, )?(--[\w.]+)", entry)
        default = re.search(r"\(.*?default: (.*)\)\n*", entry)
        if flag and not flag[1].startswith(LIGHTNINGS):
            found[flag[1]] = None if default is None else default[1].partition(", known subclasses")[0]
    return found


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_flags_and_defaults_are_those_on_record(command):
    kept, now = json.loads(KEPT.read_text(encoding="utf-8")), flags(command)
    assert now, f"{command} --help shows no flag"
    assert now == kept.get(command), (
        f"{command}: if this is meant, run `PYTHONPATH=. python {Path(__file__).name}`"
    )


def test_every_command_on_record_exists():
    assert set(json.loads(KEPT.read_text(encoding="utf-8"))) == set(cli.COMMANDS)


if __name__ == "__main__":
    table = {command: flags(command) for command in cli.COMMANDS}
    sys.exit(
        KEPT.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8") and None
    )
