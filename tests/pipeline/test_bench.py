"""A public pair by one command: each of its configs end to end, on tiny random models and published files' forms."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pandas
import pytest
import yaml
from tiny_models import WORDS, save_tiny_pair

from benchmarks.pair_memory import PAIRS, meta_model
from deferral_train import cli
from deferral_train.pairs.load import make_pair
from deferral_train.pipeline.config import PARTS, read_config

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "bench"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
TASKS = ("gsm8k", "mbpp", "wmt")


def sentence(number: int, length: int = 6) -> str:
    return " ".join(random.Random(number).choices(WORDS, k=length))


def published_row(task: str, number: int) -> dict:
    """A row with the fields of the hub's data set."""
    if task == "gsm8k":
        return {
            "question": sentence(number),
            "answer": f"{sentence(number, 12)} <<1+{number}={number + 1}>>\n#### {number + 1}",
        }
    if task == "wmt":
        return {"translation": {"en": sentence(number), "de": sentence(number + 999, 12)}}
    return {
        "task_id": number,
        "text": f"Write {sentence(number)}.",
        "code": f"def add(x):\r\n    # {sentence(number, 12)}\r\n    return x + {number}",
        "test_list": [f"assert add(1) == {number + 1}", f"assert add(0) == {number}"],
        "test_setup_code": "import math" if number % 2 else "",
        "challenge_test_list": [],
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    return save_tiny_pair("qwen3", tmp_path_factory.mktemp("pair"), drafter="never")


def local_config(task: str, folder: Path, models: tuple[Path, Path]) -> Path:
    """The shipped config with tiny models, a local file a part, and fewer of everything; its formats stay."""
    config = yaml.safe_load((FOLDER / f"qwen3-0.6b-8b-{task}.yaml").read_text())
    for place, part in enumerate(PARTS):
        file = folder / f"{part}.parquet"
        rows = [published_row(task, 40 * place + number) for number in range(24)]
        pandas.DataFrame(rows).to_parquet(file)
        config["text"][part] |= {"path": str(file), "start": 0, "limit": 20}
        for name in ("subset", "split"):
            config["text"][part].pop(name, None)
    drafter, verifier = map(str, models)
    config["pair"] |= {"drafter": drafter, "verifier": verifier, "device": "cpu", "dtype": "float32"}
    config["traces"]["log_top_k"] = 8
    config["heads"]["candidates"] = {"gap": {"head": "gap", "hidden": [4], "epochs": 1}}
    config["point"] |= {"max_loss": 0.6, "shares": [0.5]}
    config["decode"] |= {"limit": 4, "max_new_tokens": 8, "timed": 2, "repetitions": 1}
    config |= {"rules": ["opt"], "decoded": ["opt"], "bootstrap": 20, "out": str(folder / "run")}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_there_is_a_config_for_every_task():
    assert {path.stem.rpartition("-")[2] for path in CONFIGS} == set(TASKS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_is_readable_names_the_pair_and_says_what_was_not_run(path):
    config, text = read_config(path), path.read_text(encoding="utf-8")
    assert (config.pair.drafter, config.pair.verifier) == PAIRS["qwen3-0.6b-8b"]
    assert "# Not run:" in text
    assert f"configs/bench/{path.name}" in text
    assert config.out == f"runs/bench/{path.stem}"
    assert ("--allow-code-execution" in text) == (config.point.metric == "python_tests")
    assert "allow_code_execution" not in text  # it is for the user to say
    spans = [
        (p.split, p.start, p.start + (p.limit or 10**9))
        for p in (getattr(config.text, part) for part in PARTS)
    ]
    for place, (split, start, end) in enumerate(spans):
        assert all(
            split != other or end <= first or start >= last for other, first, last in spans[place + 1 :]
        )


def test_the_shapes_of_its_models_make_a_pair():
    drafter, verifier = map(meta_model, PAIRS["qwen3-0.6b-8b"])

    class Tokenizer:
        eos_token_id, pad_token_id = 1, 0

        def __len__(self) -> int:
            return 151_669

    assert make_pair(drafter, verifier, Tokenizer()).vocab_size == 151_669


@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_read_decoded_and_scored(task, models, tmp_path, capsys):
    """Its prompts as the config reads them, on both models; the field's files beside the summary."""
    path = local_config(task, tmp_path, models)
    part = {
        name: value
        for name, value in yaml.safe_load(path.read_text())["text"]["test"].items()
        if name != "start"
    }
    metric = yaml.safe_load(path.read_text())["point"]["metric"]
    flags = {
        "drafter": models[0],
        "verifier": models[1],
        "prompts": part.pop("path"),
        "out": tmp_path / "out",
    }
    flags |= {
        "prompt_format": part.pop("format", "parquet"),
        "max_new_tokens": 8,
        "device": "cpu",
        **part,
        "limit": 4,
    }
    words = ["decode", *(f"--{name}={value}" for name, value in flags.items()), "--metrics", metric]
    words += ["--rules", "lossless", "opt:alpha=0.2", "verifier_only", "drafter_only"]
    if task == "mbpp":
        assert cli.main(words) == 2
        assert "--allow-code-execution" in capsys.readouterr().err
        words.append("--allow-code-execution")
    assert cli.main(words) == 0
    rules = json.loads((tmp_path / "out" / "summary.json").read_text())["rules"]
    row = json.loads((tmp_path / "out" / "outputs.jsonl").read_text().splitlines()[0])
    assert 0 <= rules["lossless"]["quality"][metric] <= 1
    if task == "mbpp":
        assert row["id"].startswith("mbpp/12")
        assert "assert add(1) == 12" in row["tests"]
        assert rules["lossless"]["wrong"] == {metric: {"syntax": 4}}  # random words are no program
    check_field_files(tmp_path / "out" / "specdec_bench", rules)


def check_field_files(folder: Path, rules: dict) -> None:
    names = ("configuration", "timing", "acceptance_rate", "speculation_profile")
    found = {file.parent.name.partition("-")[2]: {} for file in folder.glob("*/*.json")}
    for file in folder.glob("*/*.json"):
        found[file.parent.name.partition("-")[2]][file.stem] = json.loads(file.read_text())
    assert set(found["lossless"]) == set(names)
    assert set(found["drafter_only"]) == {"configuration", "timing"}  # nothing was verified
    assert set(found["verifier_only"]) == {"configuration", "timing", "acceptance_rate"}
    assert found["verifier_only"]["acceptance_rate"][0]["Average_AL"] == 1.0
    assert found["verifier_only"]["configuration"]["speculative_algorithm"] == "NONE"
    counts = rules["lossless"]["counts"]
    (rates,), profile = found["lossless"]["acceptance_rate"], found["lossless"]["speculation_profile"]
    histogram = {int(length): number for length, number in rates["Acceptance_Length_Histogram"].items()}
    assert sum(histogram.values()) <= counts["verifier_calls"]
    assert sum(length * number for length, number in histogram.items()) <= counts["emitted"]
    assert rates["Joint_Acceptance_Rate"][str(min(histogram))] == 1.0
    positions = rules["lossless"]["positions"]
    assert profile["conditional_accept_rates"][0] == round(
        positions["accepted"][0] / positions["decided"][0], 6
    )
    assert profile["mean_accept_length"] == round(counts["emitted"] / counts["verifier_calls"], 6)
    assert len(profile["marginal_accept_rates"]) == profile["num_speculative_tokens"] == 5


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_task_runs_end_to_end(task, models, tmp_path, capsys):
    path = local_config(task, tmp_path, models)
    allowed = ["--allow-code-execution"] if task == "mbpp" else []
    if allowed:
        assert cli.main(["run", "--config", str(path)]) == 2
        assert "--allow-code-execution" in capsys.readouterr().err
    assert cli.main(["run", "--config", str(path), *allowed]) == 0
    run = tmp_path / "run"
    prompt = json.loads((run / "data" / "test.jsonl").read_text().splitlines()[0])
    rules = json.loads((run / "decode" / "summary.json").read_text())["rules"]
    metric = yaml.safe_load(path.read_text())["point"]["metric"]
    assert all(0 <= rule["quality"][metric] <= 1 for rule in rules.values())
    if task == "mbpp":
        assert prompt["prompt"].startswith(
            "You are an expert Python programmer, and here is your task: Write "
        )
        assert prompt["prompt"].endswith("assert add(1) == 121\nassert add(0) == 120\n")
        assert prompt["reference"] == f"def add(x):\n    # {sentence(120, 12)}\n    return x + 120"
        assert prompt["tests"] == "assert add(1) == 121\nassert add(0) == 120\n"
        assert rules["lossless"]["wrong"] == {metric: {"syntax": 4}}  # random words are no program
    folders = sorted((run / "decode" / "specdec_bench").iterdir())
    assert len(folders) == len(rules)
    names = {file.name for file in folders[1].iterdir()}
    assert names == {
        f"{n}.json" for n in ("configuration", "timing", "acceptance_rate", "speculation_profile")
    }
