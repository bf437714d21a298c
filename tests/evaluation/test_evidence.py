"""A certificate belongs to what was measured: whole outputs, of the head's own weights, and their conditions."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from decoding.helpers import pair_of

from deferral_train import DeferralHead, cli
from deferral_train.decoding import DecodeConfig, Pair, Settings
from deferral_train.decoding.decode import decode
from deferral_train.errors import InputError
from deferral_train.heads.artifact import certificate_problem
from deferral_train.heads.fingerprint import weights_key
from deferral_train.heads.gap import GapHead
from deferral_train.heads.rules import rule_from_spec
from deferral_train.pairs.load import make_pair
from deferral_train.pairs.prompts import Prompt

PROMPTS = [Prompt(f"p{i}", f"w{i % 30} w{(7 * i) % 30} w3", "w1 w2") for i in range(40)]
WISH = ["--metric", "exact_match", "--max-loss", "0.5"]


def head(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    made = GapHead(["drafter_max", "verifier_max"], hidden=[4])
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made.save_pretrained(folder)


def decoded(folder: Path, fail_after: int | None = None) -> Path:
    """A real decode run of lossless and a head at two alphas, broken off after some batches where asked."""
    pair = Pair(make_pair(*pair_of("llama")))
    if fail_after is not None:
        whole, calls = pair.decode_batch, []

        def breaking(*arguments, **named):
            calls.append(1)
            if len(calls) > fail_after:
                raise KeyboardInterrupt
            return whole(*arguments, **named)

        pair.decode_batch = breaking
    specs = ["lossless", *(f"learned:head={folder / 'head'},alpha={alpha}" for alpha in (0.0, 0.5))]
    config = DecodeConfig(Settings(batch_size=8, max_new_tokens=5))
    decode(pair, PROMPTS, {spec: rule_from_spec(spec) for spec in specs}, config, folder / "decode")
    return folder / "decode"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evidence")
    head(folder / "head", 0)
    decoded(folder)
    return folder


def test_a_killed_run_is_no_evidence(tmp_path, capsys):
    head(tmp_path / "head", 0)
    with pytest.raises(KeyboardInterrupt):
        decoded(tmp_path, fail_after=3 + 9)
    before = (tmp_path / "head" / "config.json").read_text()
    words = ["choose", "--outputs", str(tmp_path / "decode"), *WISH, "--head", str(tmp_path / "head")]
    assert cli.main(words) == 2
    assert "are not whole: decoding has not come to its end" in capsys.readouterr().err
    assert (tmp_path / "head" / "config.json").read_text() == before
    decoded(tmp_path)
    assert cli.main(words) == 0
    assert json.loads((tmp_path / "head" / "config.json").read_text())["certificate"]["prompts"] == len(
        PROMPTS
    )


def test_another_heads_weights_get_no_certificate(whole, tmp_path, capsys):
    other = head(tmp_path / "other", 1)
    before = {path.name: path.read_bytes() for path in other.iterdir()}
    words = ["choose", "--outputs", str(whole / "decode"), *WISH]
    assert cli.main([*words, "--head", str(other)]) == 2
    assert "has other weights than those decoded" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in other.iterdir()} == before
    assert cli.main([*words, "--head", str(whole / "head")]) == 0
    found = DeferralHead.from_pretrained(whole / "head")
    certificate = found.metadata["certificate"]
    assert certificate["weights"] == weights_key(found)
    assert certificate["engine"].startswith("transformers")
    assert certificate["decoding"]["num_draft_tokens"] == 5


def test_a_head_says_what_to_expect_of_it(whole, tmp_path, capsys):
    """Acceptance by place, quality over the dial and their conditions, as the decode folder has them."""
    own = head(tmp_path / "head", 0)
    assert cli.main(["choose", "--outputs", str(whole / "decode"), *WISH, "--head", str(own)]) == 0
    stored = json.loads((own / "config.json").read_text())
    expected, alpha = stored["evaluation"]["expected"], stored["alpha"]
    rules = json.loads((whole / "decode" / "summary.json").read_text())["rules"]
    label = next(name for name, rule in rules.items() if (rule["dial"] or {}).get("value") == alpha)
    positions = rules[label]["positions"]
    assert expected["setting"] == {"parameter": "alpha", "value": alpha}
    assert expected["acceptance_by_place"]["conditional"] == [
        a / d for a, d in zip(positions["accepted"], positions["decided"]) if d
    ]
    assert [point["value"] for point in expected["curve"]] == [None, 0.0, 0.5]
    assert [point["mean_acceptance_length"] for point in expected["curve"]] == [
        rule["mean_acceptance_length"] for rule in rules.values()
    ]
    assert expected["curve"][0]["loss"] == 0.0
    for point, rule in zip(expected["curve"], rules.values()):
        assert point["quality"] == pytest.approx(rule["quality"]["exact_match"])
    assert (expected["metric"], expected["prompts"]) == ("exact_match", len(PROMPTS))
    assert expected["conditions"]["decoding"]["num_draft_tokens"] == 5
    assert expected["conditions"]["engine"].startswith("transformers")
    card = (own / "README.md").read_text()
    assert "## What to expect" in card
    assert "| lossless |" in card
    capsys.readouterr()
    assert cli.main(["doctor", "--head", str(own)]) == 0
    assert (
        f"tokens a verifier call at alpha={alpha:g}, measured on {len(PROMPTS)} prompts"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("expected", "said"),
    [
        ("x", "'expected' must be a dict"),
        ({"acceptance_by_place": {"conditional": [0.5, 1.5]}}, "acceptance_by_place.conditional"),
        ({"acceptance_by_place": {"conditional": ["1"]}}, "acceptance_by_place.conditional"),
        ({"acceptance_by_place": {"marginal": 0.5}}, "acceptance_by_place.marginal"),
        ({"acceptance_by_place": {"marginal": [0.5] * 2000}}, "acceptance_by_place.marginal"),
        ({"acceptance_by_place": []}, "'acceptance_by_place' must be a dict"),
        ({"mean_acceptance_length": -1}, "mean_acceptance_length and prompts"),
        ({"prompts": "many"}, "mean_acceptance_length and prompts"),
        ({"curve": {}}, "'curve' must be a list"),
        ({"curve": [1]}, "evaluation.expected.curve"),
        ({"curve": [{"quality": "good"}]}, "evaluation.expected.curve"),
        ({"setting": 3}, "'setting' must be a dict"),
        ({"conditions": "none"}, "'conditions' must be a dict"),
    ],
)
def test_expectations_that_nobody_could_calculate_with_are_refused_on_load(expected, said, tmp_path):
    own = head(tmp_path / "head", 0)
    config = json.loads((own / "config.json").read_text())
    damaged = config | {"evaluation": {"metrics": {}, "expected": expected}}
    (own / "config.json").write_text(json.dumps(damaged))
    with pytest.raises(InputError, match=re.escape(said)):
        DeferralHead.from_pretrained(own)


def test_lines_that_are_gone_are_missed(whole, tmp_path, capsys):
    shutil.copytree(whole / "decode", tmp_path / "cut")
    path = tmp_path / "cut" / "outputs.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-3]))
    assert cli.main(["choose", "--outputs", str(tmp_path / "cut"), *WISH]) == 2
    assert "37 of 40 prompts" in capsys.readouterr().err


def test_outputs_of_an_earlier_release_certify_no_head(whole, tmp_path, capsys):
    shutil.copytree(whole / "decode", tmp_path / "old")
    path = tmp_path / "old" / "run.json"
    record = json.loads(path.read_text())
    record["rules"] = dict.fromkeys(record["rules"], "learned:0.5:abc")
    path.write_text(json.dumps(record))
    summary = json.loads((tmp_path / "old" / "summary.json").read_text())
    del summary["run"]
    (tmp_path / "old" / "summary.json").write_text(json.dumps(summary))
    words = ["choose", "--outputs", str(tmp_path / "old"), *WISH]
    assert cli.main([*words, "--head", str(whole / "head")]) == 2
    assert "do not say which head's weights" in capsys.readouterr().err
    assert cli.main(words) == 0


def test_rows_without_a_run_are_taken_with_a_word(whole, tmp_path, capsys):
    (tmp_path / "outputs.jsonl").write_bytes((whole / "decode" / "outputs.jsonl").read_bytes())
    assert cli.main(["choose", "--outputs", str(tmp_path), *WISH]) == 0
    assert "nothing says which models and weights" in capsys.readouterr().out


def test_from_traces_the_rule_and_the_head_must_be_one(whole, tmp_path, capsys):
    other = head(tmp_path / "other", 1)
    words = [
        "choose",
        "--traces",
        "nowhere",
        "--max-token-risk",
        "0.1",
        "--rule",
        f"learned:head={whole / 'head'}",
    ]
    assert cli.main([*words, "--head", str(other)]) == 2
    assert "has another head than" in capsys.readouterr().err


def altered(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "outputs.jsonl").read_text().splitlines()]
    rows[-1]["text"] = rows[-1]["reference"]
    (folder / "outputs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def doubled(folder: Path) -> None:
    path = folder / "outputs.jsonl"
    path.write_text(2 * path.read_text())


def merged(folder: Path) -> None:
    """A second run of the same rules, put behind the first."""
    for name in ("outputs.jsonl", "batches.jsonl"):
        path = folder / name
        path.write_text(path.read_text() + path.read_text().replace('"id": "p', '"id": "q'))


def other_summary(folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"run": "0" * 16}))


def altered_record(folder: Path) -> None:
    record = json.loads((folder / "run.json").read_text())
    record["conditions"]["temperature"] = 1.0
    (folder / "run.json").write_text(json.dumps(record))


def altered_counts(folder: Path) -> None:
    path = folder / "batches.jsonl"
    path.write_text(path.read_text().replace('"seconds": 0.', '"seconds": 9.', 1))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (altered, "altered, missing or double"),
        (doubled, "altered, missing or double"),
        (merged, "are not whole|more than one run"),
        (other_summary, "summary.json is of another run than run.json"),
        (altered_record, "summary.json is of another run than run.json"),
        (altered_counts, "altered, missing or double"),
        (lambda folder: (folder / "run.json").unlink(), "summary.json is of another run than run.json"),
    ],
)
def test_what_was_changed_after_decoding_certifies_nothing(change, said, whole, tmp_path, capsys):
    shutil.copytree(whole / "decode", tmp_path / "changed")
    change(tmp_path / "changed")
    own = head(tmp_path / "head", 0)
    words = ["choose", "--outputs", str(tmp_path / "changed"), *WISH, "--head", str(own)]
    assert cli.main(words) == 2
    assert re.search(said, capsys.readouterr().err)
    assert "certificate" not in DeferralHead.from_pretrained(own).metadata


def test_rows_without_a_run_certify_no_head(whole, tmp_path, capsys):
    (tmp_path / "outputs.jsonl").write_bytes((whole / "decode" / "outputs.jsonl").read_bytes())
    own = head(tmp_path / "head", 0)
    assert cli.main(["choose", "--outputs", str(tmp_path), *WISH, "--head", str(own)]) == 2
    assert "hold no run.json" in capsys.readouterr().err


def test_a_dial_moved_by_hand_loses_its_certificate(whole, tmp_path):
    own = head(tmp_path / "head", 0)
    assert cli.main(["choose", "--outputs", str(whole / "decode"), *WISH, "--head", str(own)]) == 0
    config = json.loads((own / "config.json").read_text())
    chosen = DeferralHead.from_pretrained(own)
    assert certificate_problem(chosen) is None
    assert chosen.metadata["alpha"] == chosen.metadata["certificate"]["value"]
    assert chosen.metadata["alpha"] in (0.0, 0.5)
    assert chosen.metadata["certificate"]["metric"] == "exact_match"
    (own / "config.json").write_text(json.dumps(config | {"alpha": config["alpha"] + 1}))
    moved = DeferralHead.from_pretrained(own)
    assert "the certified one" in str(certificate_problem(moved))
    with pytest.warns(UserWarning, match="its certificate is dropped"):
        moved.save_pretrained(tmp_path / "again")
    assert "certificate" not in DeferralHead.from_pretrained(tmp_path / "again").metadata
