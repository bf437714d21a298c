"""Breakdowns against counts of decoding, plain searches, and as users call them."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import numpy as np
import pytest
from tiny_models import WORDS, save_tiny_pair, tiny_tokenizer

from deferral_train import cli, provenance
from deferral_train.collecting import CollectConfig, collect
from deferral_train.decoding.drafting.max_gram import MaxGram
from deferral_train.errors import InputError
from deferral_train.evaluation.bootstrap import Redraws
from deferral_train.evaluation.breakdowns import make_breakdowns, read_part
from deferral_train.evaluation.breakdowns.copies import (
    copy_rates,
    count_failures,
    logged_texts,
    quantile_bins,
)
from deferral_train.traces import Traces, open_traces

COUNT, TOKENS = 24, 10


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts of two domains, and traces of a Llama and a T5 pair along the verifier's greedy text."""
    root = tmp_path_factory.mktemp("breakdowns")
    draw = random.Random(0)
    rows = []
    for number in range(COUNT):
        words = draw.choices(WORDS[: 4 if number % 2 else 30], k=6)
        rows.append({"id": f"{'ab'[number % 2]}/{number}", "prompt": " ".join(words)})
        rows[-1] |= {
            "reference": " ".join(draw.choices(WORDS[:8], k=5)),
            "topic": ["far", "near"][number % 2],
        }
    write(root / "prompts.jsonl", rows)
    for kind in ("llama", "t5"):
        models = save_tiny_pair(kind, root / kind)
        settings = {"prompts": str(root / "prompts.jsonl"), "temperature": 0.0, "device": "cpu"}
        config = CollectConfig(*map(str, models), **settings, prefixes="verifier", max_new_tokens=TOKENS)
        collect(config, root / f"{kind}-traces", progress=False)
    return root


def write(path: Path, rows: list[dict]) -> None:
    provenance.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def part(place: Path, kind: str = "llama", domain: str = "folder"):
    traces = open_traces(place / f"{kind}-traces")
    return read_part(traces, kind, place / "prompts.jsonl", [tiny_tokenizer()], domain)


def arguments(place: Path, *more: str, kind: str = "llama") -> list[str]:
    base = [
        "evaluate",
        f"--traces={place / f'{kind}-traces'}",
        "--figures=false",
        "--bootstrap=50",
        "--grid=3",
    ]
    return [*base, "--rules=[opt]", "--truth=verifier", f"--out={place / 'out'}", *more]


def numbers(table) -> dict[tuple[str, str | None, str], float]:
    return {(row.group, row.rule, name): n.value for row in table.rows for name, n in row.numbers.items()}


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_places_are_what_decoding_counts(place: Path, kind: str) -> None:
    """Along the verifier's own greedy text every acceptance is 0 or 1, so that the expectation is the count."""
    out = place / f"decoded-{kind}"
    flags = {"prompts": place / "prompts.jsonl", "out": out, "num-draft-tokens": 3, "max-new-tokens": TOKENS}
    flags |= {role: place / kind / role for role in ("drafter", "verifier")}
    assert cli.main(["decode", *(f"--{name}={value}" for name, value in flags.items()), "--device=cpu"]) == 0
    summary = json.loads((out / "summary.json").read_text())
    counted = summary["rules"]["lossless"]
    made = make_breakdowns(
        [part(place, kind)], ["position", "architecture"], num_draft_tokens=3, redraws=Redraws(0)
    )
    positions, architecture = made.tables
    places = counted["positions"]
    for row, judged, rejected in zip(positions.rows, places["decided"], places["rejected"], strict=True):
        assert row.tokens == pytest.approx(judged, abs=1e-6)
        assert row.numbers["acceptance"].value == pytest.approx(1 - rejected / judged)
        assert row.numbers["deferral rate"].value == 1
    (row,) = architecture.rows
    assert row.group.startswith(kind)
    assert row.numbers["tokens per verifier call"].value == pytest.approx(counted["mean_acceptance_length"])
    assert summary["models"]["drafter"]["model_type"] == kind


def longest_suffix(text: list[int]) -> tuple[int, int]:
    """Length of the longest suffix that occurs before, and what followed its first occurrence."""
    for length in range(len(text) - 1, 0, -1):
        for end in range(length, len(text)):
            if text[end - length : end] == text[-length:]:
                return length, text[end]
    return 0, -1


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_copies_against_plain_searches(place: Path, kind: str) -> None:
    parts = [part(place, kind)]
    texts = logged_texts(parts)
    assert [text.prompt for text in texts] == list(parts[0].traces.prompt_ids)
    found, rates = count_failures(parts, texts, MaxGram()), copy_rates(parts, texts)
    assert found.asked.sum() == len(parts[0].traces)
    assert (found.asked.sum(0) > 0).all()
    for number, text in enumerate(texts):
        prompt = parts[0].prompt_ids[text.prompt]
        asked, failed = np.zeros(3), np.zeros(3)
        for size, token in enumerate(text.tokens):
            before = [*prompt, *([-1] if kind == "t5" else []), *text.tokens[:size]]
            length, following = longest_suffix(before)
            asked[min(length, 2)] += 1
            failed[min(length, 2)] += not length or following != token
        np.testing.assert_array_equal(found.asked[number], asked)
        np.testing.assert_array_equal(found.failed[number], failed)
        own = [token for token in text.tokens if token > 3]
        assert rates[number] == pytest.approx(sum(t in prompt for t in own) / len(own) if own else 0.0)


def test_bins_are_of_equal_counts_and_survive_ties() -> None:
    rates = np.random.default_rng(0).permutation(np.linspace(0, 1, 40))
    bins = quantile_bins(rates)
    assert sorted(bins.count(name) for name in set(bins)) == [10, 10, 10, 10]
    low = sorted(set(bins))[0]
    assert all((rate < 0.25) == (name == low) for rate, name in zip(rates, bins))
    assert set(quantile_bins(np.zeros(7))) == {"0.00 to 0.00"}
    assert len(set(quantile_bins(np.array([0, 0, 0, 0, 0, 0.5])))) <= 2


def test_groups_add_up_and_intervals_hold_them(place: Path) -> None:
    parts = [part(place, kind, "topic") for kind in ("llama", "t5")]
    names = ["domain", "architecture", "copy_rate", "max_gram"]
    made = make_breakdowns(parts, names, ["opt:alpha=0.2", "chow"], redraws=Redraws(50))
    assert [table.name for table in made.tables] == [*names, "max_gram:copy_rate", "max_gram:domain"]
    domain, architecture, copies, failures, *_ = made.tables
    assert {row.rule for row in domain.rows} == {"lossless", "opt at alpha=0.2"}
    assert len(domain.rows) == 8
    assert {row.group.split(": ")[1] for row in domain.rows} == {"far", "near"}
    for table in (domain, architecture, copies):
        own = [row for row in table.rows if row.rule == "lossless"]
        assert sum(row.prompts for row in own) == 2 * COUNT
        assert sum(row.tokens for row in own) == sum(len(one.traces) for one in parts)
    for table in made.tables:
        for row in table.rows:
            for number in row.numbers.values():
                assert (number.low is None) == (row.prompts < 10) or number.low <= number.value <= number.high
    asked = numbers(failures)
    assert asked["no match", None, "failure rate"] == 1
    shares = [asked[row.group, None, "share of positions"] for row in failures.rows]
    assert sum(shares[:3]) == pytest.approx(shares[3]) == pytest.approx(1)
    by_id = make_breakdowns([part(place, "llama", "id")], ["domain"], redraws=Redraws(0)).tables[0]
    assert [row.group for row in by_id.rows] == ["a", "b"]


def test_few_prompts_have_no_limits_and_empty_groups_no_number() -> None:
    redraws = Redraws(50)
    assert redraws.ratio(np.ones(3), np.zeros(3)) is None
    few = redraws.ratio(np.ones(30), np.r_[np.ones(9), np.zeros(21)])
    assert (few.value, few.low) == (1.0, None)
    assert redraws.ratio(np.ones(30), np.ones(30)).low == 1.0


def test_evaluate_writes_prints_and_the_report_shows(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--prompts", str(place / "prompts.jsonl"), "--tokenizer", str(place / "llama" / "drafter")]
    command = arguments(place, "--breakdown", "position", "copy_rate", "max_gram", *more)
    out = place / "run" / "evaluation"
    assert cli.main([*command, f"--out={out}"]) == 0
    printed = capsys.readouterr().out
    assert "Acceptance by place in the block" in printed
    assert "Max-Gram's failures" in printed
    stored = json.loads((out / "breakdowns.json").read_text())
    assert [table["name"] for table in stored["tables"]][:2] == ["position", "copy_rate"]
    lines = list(csv.DictReader((out / "breakdowns.csv").open()))
    assert len(lines) == sum(len(row["numbers"]) for table in stored["tables"] for row in table["rows"])
    assert cli.main(["report", str(place / "run")]) == 0
    page = (place / "run" / "report.html").read_text()
    assert "matched 2 or more" in page
    stored["tables"][0]["rows"][0]["numbers"]["acceptance"]["value"] = 1.5
    provenance.write_json(out / "breakdowns.json", stored)
    assert cli.main(["report", str(place / "run")]) == 2
    assert "0 <= acceptance <= 1" in capsys.readouterr().err


def test_pairs_and_decode_runs_side_by_side(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Traces of two pairs cannot be scored together, and are broken down all the same."""
    command = [
        "evaluate",
        "--bootstrap=0",
        f"--out={place / 'pairs'}",
        "--breakdown",
        "architecture",
        "drafting",
    ]
    both = [str(place / f"{kind}-traces") for kind in ("llama", "t5")]
    decoded = []
    for lenience in (1, 3):
        flags = {"prompts": place / "prompts.jsonl", "out": place / f"lenience-{lenience}", "limit": 12}
        flags |= {role: place / "llama" / role for role in ("drafter", "verifier")}
        flags |= {"drafting": f"vertical:tokens=2,copies=4,lenience={lenience}", "max-new-tokens": 6}
        assert cli.main(["decode", *(f"--{name}={value}" for name, value in flags.items())]) == 0
        decoded.append(str(flags["out"]))
    assert cli.main([*command, "--traces", *both, "--decoded", *decoded]) == 0
    printed = capsys.readouterr().out
    assert "no rules were scored: traces differ in pair" in printed
    assert "lenience 3" in printed
    tables = json.loads((place / "pairs" / "breakdowns.json").read_text())["tables"]
    rows = {table["name"]: table["rows"] for table in tables}
    assert [row["group"].split()[0] for row in rows["architecture"]] == ["llama", "t5"]
    lengths = []
    for row, folder in zip(rows["drafting"], decoded, strict=True):
        rule = json.loads((Path(folder) / "summary.json").read_text())["rules"]["lossless"]
        lengths.append(row["numbers"]["tokens per verifier call"]["value"])
        assert lengths[-1] == pytest.approx(rule["mean_acceptance_length"])
        assert {"chrf", "ms per token"} <= set(row["numbers"])
        passes = rule["counts"]["drafter_calls"] / rule["counts"]["emitted"]
        assert row["numbers"]["drafter passes per token"]["value"] == pytest.approx(passes)


BAD = {
    "an unknown breakdown": (["--breakdown", "places"], "breakdown 'places' is unknown; known: position, "),
    "no prompts": (
        ["--breakdown", "copy_rate"],
        "breakdown copy_rate reads the prompts, which traces do not hold",
    ),
    "no decode runs": (
        ["--breakdown", "drafting"],
        "breakdown drafting sets decode runs side by side; give decoded",
    ),
    "a field without prompts": (
        ["--breakdown", "domain", "--domain", "topic"],
        "domain='topic' is a field of the prompts; give prompts",
    ),
    "no decode run": (
        ["--breakdown", "drafting", "--decoded", "{place}"],
        "holds no summary.json; give the --out of a finished decode run",
    ),
    "prompts for another number of folders": (
        ["--breakdown", "domain", "--prompts", "a.jsonl", "b.jsonl"],
        "prompts names 2 files for 1 trace folders",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line(place: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    more, message = BAD[what]
    assert cli.main(arguments(place, *(word.format(place=place) for word in more))) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_other_prompts_and_other_tokenizers_are_refused(place: Path, tmp_path: Path) -> None:
    traces: Traces = open_traces(place / "llama-traces")
    rows = [json.loads(line) for line in (place / "prompts.jsonl").read_text().splitlines()]
    write(tmp_path / "short.jsonl", rows[:-1])
    with pytest.raises(InputError, match=r"has no prompt 'b/23', which the traces x have \(1 of 24"):
        read_part(traces, "x", tmp_path / "short.jsonl", [tiny_tokenizer()])
    rows[3]["prompt"] += " w1"
    write(tmp_path / "other.jsonl", rows)
    with pytest.raises(InputError, match="holds other texts than the traces x were collected from"):
        read_part(traces, "x", tmp_path / "other.jsonl", [tiny_tokenizer()])
    with pytest.raises(InputError, match="tokenizer: the traces x were made with tokenizer"):
        read_part(traces, "x", place / "prompts.jsonl", [tiny_tokenizer("other")])
    with pytest.raises(InputError, match="no field 'subject'"):
        read_part(traces, "x", place / "prompts.jsonl", [tiny_tokenizer()], "subject")


def test_references_are_checked_through_the_rows(place: Path, tmp_path: Path) -> None:
    """Teacher-forced traces hash their references too, which the rows hold."""
    models = [str(place / "llama" / role) for role in ("drafter", "verifier")]
    config = CollectConfig(*models, prompts=str(place / "prompts.jsonl"), device="cpu", max_new_tokens=4)
    collect(config, tmp_path / "traces", progress=False)
    traces = open_traces(tmp_path / "traces")
    found = read_part(traces, "x", place / "prompts.jsonl", [tiny_tokenizer()])
    assert found.prompt_ids.keys() == set(traces.prompt_ids)
