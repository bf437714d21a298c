"""Tables of rejected pairs: counted from traces, written, read back, refused, and served to rule csd by name."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from safetensors.torch import save_file
from training.trace_maker import small_language, write_traces

from deferral_train import cli, open_traces
from deferral_train.decoding.compatibility import check_head, heads_of
from deferral_train.errors import InputError
from deferral_train.heads.rejected_pairs import count_rejections, read_rejected_pairs, write_rejected_pairs
from deferral_train.heads.rules import rule_from_spec
from deferral_train.pipeline.contents import spec_inputs
from deferral_train.rules.rejected_pairs import RejectedPairs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_traces(tmp_path_factory.mktemp("traces") / "fit", small_language())


def test_counts_are_those_of_a_plain_count(folder):
    traces = open_traces(folder)
    pairs = count_rejections([traces, traces])
    columns = (traces.column(name).tolist() for name in ("drafter_argmax", "verifier_argmax"))
    plain = Counter((x, v) for x, v in zip(*columns) if x != v)
    assert len(plain) > 3
    for (x, v), count in plain.items():
        assert int(pairs.times(torch.tensor(x), torch.tensor(v))) == 2 * count
        if (v, x) not in plain:
            assert int(pairs.times(torch.tensor(v), torch.tensor(x))) == 0
    assert pairs.metadata["rejections"] == 2 * sum(plain.values())
    assert pairs.metadata["positions"] == 2 * len(traces)
    whole = pairs.times(torch.arange(12), torch.tensor([[3], [4]]))
    assert whole.tolist() == [[2 * plain.get((x, v), 0) for x in range(12)] for v in (3, 4)]


def test_the_command_writes_a_table_that_the_rule_reads(folder, tmp_path, capsys):
    out = tmp_path / "tables" / "pairs.safetensors"
    assert cli.main(["count-rejections", "--traces", str(folder), "--out", str(out), "--shown", "2"]) == 0
    printed = capsys.readouterr().out
    counted = count_rejections([open_traces(folder)])
    assert f"{counted.metadata['rejections']} of {counted.metadata['positions']} drafted tokens" in printed
    spec = f"csd:table={out},ratio=0.2,least=3"
    rule = rule_from_spec(spec)
    assert (rule.ratio, rule.least, rule.is_lossless) == (0.2, 3, False)
    for name in ("keys", "counts"):
        assert torch.equal(getattr(rule.table, name), getattr(counted, name))
    assert rule.table.metadata == counted.metadata
    assert spec_inputs([spec]) == {spec: str(out)}
    (table,) = heads_of(rule)
    pair = dict(table.metadata["pair"])
    assert check_head(table, pair, pair) == []
    with pytest.raises(InputError, match="table: made for another vocabulary"):
        check_head(table, pair, pair | {"vocab_size": 5})


def test_evaluate_scores_the_rule_by_name(folder, tmp_path):
    table = tmp_path / "pairs.safetensors"
    write_rejected_pairs(count_rejections([open_traces(folder)]), table)
    words = [
        "--rules",
        f"csd:table={table},least=2",
        "opt",
        "--grid",
        "4",
        "--bootstrap",
        "0",
        "--figures",
        "false",
    ]
    assert cli.main(["evaluate", "--traces", str(folder), "--out", str(tmp_path / "scores"), *words]) == 0
    assert "csd:" in (tmp_path / "scores" / "scores.csv").read_text()
    refused = [
        "evaluate",
        "--traces",
        str(folder),
        "--out",
        str(tmp_path / "no"),
        "--rules",
        "fly",
        "--bootstrap",
        "0",
    ]
    assert cli.main(refused) == 2


def test_bad_tables_are_one_line(folder, tmp_path, capsys):
    with pytest.raises(InputError, match=r"table: .*none\.safetensors is no file"):
        read_rejected_pairs(tmp_path / "none.safetensors")
    text = tmp_path / "text.safetensors"
    text.write_text("no table")
    with pytest.raises(InputError, match="no readable safetensors file"):
        read_rejected_pairs(text)
    columns = {name: torch.tensor([1, 2]) for name in ("drafted", "verifier", "counts")}
    save_file(columns, text)
    with pytest.raises(InputError, match="holds no table of rejected pairs"):
        read_rejected_pairs(text)
    changes = [
        {"counts": torch.tensor([0, 1])},
        {"drafted": torch.tensor([-1, 2])},
        {"counts": torch.tensor([1.0, 2.0])},
    ]
    for change in [
        *changes,
        {name: torch.tensor([1, 1]) for name in columns},
        {"drafted": torch.tensor([1])},
    ]:
        save_file(columns | change, text, metadata={"rejected_pairs": "{}"})
        with pytest.raises(InputError, match="rejected pairs: "):
            read_rejected_pairs(text)
    for spec, message in [
        ("csd", "table is NoneType"),
        (f"csd:table={folder}", "is no file"),
        ("csd:ratio=0.1", "table"),
    ]:
        with pytest.raises(InputError, match=message):
            rule_from_spec(spec)
    good = tmp_path / "good.safetensors"
    write_rejected_pairs(RejectedPairs.counted(torch.tensor([1, 1]), torch.tensor([2, 1])), good)
    for spec, message in [
        ("least=0", "least is 0"),
        ("ratio=2", "ratio is 2"),
        ("lambda=2", "no parameter lambda"),
    ]:
        with pytest.raises(InputError, match=message):
            rule_from_spec(f"csd:table={good},{spec}")
    with pytest.raises(InputError, match="traces is empty"):
        count_rejections([])
    assert cli.main(["count-rejections", "--traces", str(tmp_path / "nowhere"), "--out", str(good)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert len(read_rejected_pairs(good).keys) == 1
