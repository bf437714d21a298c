"""`deferral-train train-pair` as it is typed."""

import pytest
import yaml

from deferral_train.cli import main

SHAPES = {
    "drafter": {"layers": 1, "width": 16, "heads": 2, "feed_forward": 32},
    "verifier": {"layers": 2, "width": 32, "heads": 2, "feed_forward": 64},
    "drafter_schedule": {"steps": 3, "batch": 2},
    "verifier_schedule": {"steps": 3, "batch": 2},
    "vocab_size": 320,
    "context": 16,
}


@pytest.fixture
def config(tmp_path):
    (tmp_path / "book.txt").write_text("".join(f"a line of text, number {i}\n" for i in range(6000)))
    settings = {
        "out": str(tmp_path / "pair"),
        "pair": {**SHAPES, "text": {"files": [str(tmp_path / "book.txt")]}},
    }
    path = tmp_path / "pair.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_config_flags_reuse_and_refusal(config, tmp_path, capsys):
    easy = ["--min_nats=-100", "--min_cost_ratio=0"]
    words = ["train-pair", "--config", str(config), "--pair.verifier.layers=1", *easy]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "verifier: step 3/3" in said
    assert "trained" in said
    assert "held-out nats a token" in said
    settings = yaml.safe_load((tmp_path / "pair" / "verifier" / "config.json").read_text())
    assert settings["num_hidden_layers"] == 1
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("reused")
    assert main([*words[:-2]]) == 2
    assert "the verifier is better by" in capsys.readouterr().err
    assert main([*words, "--pair.seed=5"]) == 2
    assert "another configuration" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--pair.kind=t5", "text.targets is empty"),
        ("--pair.colour=red", "colour"),
        ("--pair.vocab_size=9", "vocab_size=9"),
    ],
)
def test_bad_flags_exit_with_2_and_one_line(config, flag, message, capsys):
    assert main(["train-pair", "--config", str(config), flag]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
