"""The command line: light help, one clear line and exit code 2 on bad input, interrupted and missing extras."""

from __future__ import annotations

import subprocess
import sys

import pytest

from deferral_train import cli
from deferral_train.errors import InputError


def call(*words: str, code: str | None = None) -> subprocess.CompletedProcess:
    program = code or "import sys; from deferral_train.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=120
    )


def test_help_names_every_command_and_imports_nothing_heavy():
    done = call(
        code="import sys; from deferral_train.cli import main; main(['--help']);"
        "print(sorted({'torch', 'transformers', 'jsonargparse', 'numpy'} & set(sys.modules)))"
    )
    lines = done.stdout.splitlines()
    assert lines[-1] == "[]"
    assert all(any(line.split()[:1] == [name] for line in lines) for name in cli.COMMANDS)


def test_importing_the_package_pulls_in_nothing_heavy():
    done = call(
        code="import sys, deferral_train; from deferral_train import InputError;"
        "print(sorted({'torch', 'transformers', 'pytorch_lightning', 'pyarrow'} & set(sys.modules)))"
    )
    assert done.stdout.strip() == "[]"


def test_every_command_has_a_module_with_a_run_function():
    import importlib

    for name in cli.COMMANDS:
        module = importlib.import_module(f"deferral_train.commands.{name.replace('-', '_')}")
        assert callable(module.run), name


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["colect"], "unknown command 'colect'"),
        (["doctor", "--bogus", "3"], "--bogus"),
        (["doctor", "--traces", "no/such/folder"], None),
        (["collect", "--config", "no/such.yaml"], "no/such.yaml"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words, said):
    done = call(*words)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    if said is not None:
        assert len(done.stderr.strip().splitlines()) == 1
        assert said in done.stderr


def test_unknown_yaml_key_is_refused_by_name(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("tracess: here\n")
    done = call("doctor", "--config", str(config))
    assert done.returncode == 2
    assert "tracess" in done.stderr


def test_flag_wins_over_file_wins_over_default(tmp_path, monkeypatch):
    import types

    seen = {}

    def run(alpha: float = 0.0, beta: int = 1) -> None:
        """Say hello."""
        seen.update(alpha=alpha, beta=beta)

    config = tmp_path / "c.yaml"
    config.write_text("alpha: 0.25\n")
    module = types.SimpleNamespace(run=run)
    run(**cli._parse("rules", module, ["--config", str(config), "--beta", "3"]))
    assert seen == {"alpha": 0.25, "beta": 3}
    run(**cli._parse("rules", module, ["--config", str(config), "--alpha", "0.5"]))
    assert seen == {"alpha": 0.5, "beta": 1}


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InputError("alpha: 3 is out of range; choose from [-1, 1]"), 2, "alpha: 3"),
        (PermissionError(13, "Permission denied", "runs/x"), 2, "runs/x"),
        (OSError(28, "No space left on device"), 2, "free some disk space"),
        (
            ModuleNotFoundError("No module named 'transformers'", name="transformers"),
            2,
            "deferral-train[train]",
        ),
        (KeyboardInterrupt(), 130, "run the same command again"),
    ],
)
def test_failures_are_told_in_one_line(monkeypatch, capsys, error, code, said):
    def fail(_name, _words):
        raise error

    monkeypatch.setattr(cli, "_dispatch", fail)
    assert cli.main(["doctor"]) == code
    told = capsys.readouterr().err
    assert said in told
    assert len(told.strip().splitlines()) == 1


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch):
    def fail(_name, _words):
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli, "_dispatch", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["doctor"])


def test_several_values_after_a_flag_are_a_list():
    import types

    def run(*, rules: list[str] = (), alpha: float = 0.0) -> None:
        """Take a list."""

    module = types.SimpleNamespace(run=run)
    spoken = cli._parse("rules", module, ["--rules", "opt:alpha=0.2", "token_v3", "--alpha", "-0.5"])
    assert spoken == {"rules": ["opt:alpha=0.2", "token_v3"], "alpha": -0.5}
    assert cli._parse("rules", module, ["--rules", "[opt,chow]"])["rules"] == ["opt", "chow"]
    assert cli._parse("rules", module, ["--rules", "opt"])["rules"] == ["opt"]
    assert cli._parse("rules", module, ["--rules=opt:alpha=0.2", "chow"])["rules"] == [
        "opt:alpha=0.2",
        "chow",
    ]
    assert cli._parse("rules", module, ["--rules=[opt,chow]"])["rules"] == ["opt", "chow"]


def test_a_switch_may_stand_alone_or_carry_a_value():
    assert cli._switched(["--fresh", "--out", "x"], {"--fresh"}) == ["--fresh=true", "--out", "x"]
    assert cli._switched(["--out", "x", "--fresh"], {"--fresh"}) == ["--out", "x", "--fresh=true"]
    assert cli._switched(["--fresh", "false"], {"--fresh"}) == ["--fresh", "false"]
    assert cli._switched(["--fresh=false"], {"--fresh"}) == ["--fresh=false"]


def test_lightnings_way_out_of_sigterm_is_no_success(monkeypatch, capsys):
    """`fit` inside of `run` and `collect` end by it; it carries no status."""
    from pytorch_lightning.utilities.exceptions import SIGTERMException

    def terminated(_name, _words):
        raise SIGTERMException

    monkeypatch.setattr(cli, "_dispatch", terminated)
    assert cli.main(["run"]) == 143
    assert (
        capsys.readouterr().err == "deferral-train run: terminated; run the same command again to continue\n"
    )


def test_other_exits_keep_their_status(monkeypatch):
    def leave(_name, _words):
        raise SystemExit(0)

    monkeypatch.setattr(cli, "_dispatch", leave)
    with pytest.raises(SystemExit) as stop:
        cli.main(["run"])
    assert stop.value.code == 0
