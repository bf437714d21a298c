"""The page as text: self-contained, escaped, complete, and plain about what was not measured."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report.conftest import HOSTILE

from deferral_train.errors import InputError
from deferral_train.provenance import write_json
from deferral_train.report import write_report
from deferral_train.report.svg import Axis, Series, line_chart


class Scripts(HTMLParser):
    """Collects script elements as a browser would see them, and everything that points outside of the
    page.
    """

    def __init__(self) -> None:
        super().__init__()
        self.types: list[str | None] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        if tag == "script":
            self.types.append(named.get("type"))
        self.outside += [
            v for k, v in attrs if k in ("src", "href", "action") and v and not v.startswith("#")
        ]


@pytest.fixture(scope="module")
def page(run_folder: Path) -> str:
    return write_report(run_folder).read_text(encoding="utf-8")


def test_hostile_text_is_text(page: str) -> None:
    """Every word, id, reference and headline of this run is a script element; none becomes one."""
    scripts = Scripts()
    scripts.feed(page)
    assert scripts.types == ["application/json", "application/json", None]
    assert HOSTILE.format("headline") not in page
    assert "&lt;script&gt;document.title=&#39;ownedheadline&#39;" in page
    assert "\\u003cscript\\u003e" in page


def test_nothing_is_loaded_and_the_page_is_small(page: str) -> None:
    scripts = Scripts()
    scripts.feed(page)
    assert scripts.outside == []
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org)", page)
    assert len(page.encode()) < 3_000_000


def test_first_screen_holds_the_answer(page: str) -> None:
    head = page[page.index("<body>") : page.index("<main>")]
    for expected in ("1.4x as fast", "1.40×", "60%", "−1.00", "OPT", "Can these numbers be trusted?"):
        assert expected in head


def test_sections_without_input_say_so(run_folder: Path, page: str, tmp_path: Path) -> None:
    # no training log, no skew, no rounds, no frontier, no shadow mode, no serving engine
    assert page.count("Not measured in this run") == 6
    (tmp_path / "evaluation").mkdir()
    shutil.copy(run_folder / "evaluation" / "scores.json", tmp_path / "evaluation")
    bare = write_report(tmp_path).read_text(encoding="utf-8")
    assert bare.count("Not measured in this run") == 11
    assert "no verdict" in bare


def test_the_engine_stands_beside_the_loop_and_differing_texts_are_listed(
    run_folder: Path, tmp_path: Path
) -> None:
    for part in ("decode", "engine"):
        shutil.copytree(run_folder / "decode", tmp_path / part)
    same = _engine_section(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "engine" / "outputs.jsonl").read_text().splitlines()]
    prompts = len({row["id"] for row in rows})
    rules = {row["rule"] for row in rows}
    assert same.count(f"<td>{prompts} of {prompts}</td><td>0</td>") == len(rules)
    assert "Texts that differ" not in same

    rows[0]["tokens"][-1] += 1
    (tmp_path / "engine" / "outputs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = _engine_section(tmp_path)
    assert other.count(f"<td>{prompts - 1} of {prompts}</td>") == 1
    assert "Texts that differ" in other
    assert f"<td>{len(rows[0]['tokens']) - 1}</td>" in other


def _engine_section(folder: Path) -> str:
    text = write_report(folder).read_text(encoding="utf-8")
    return text[text.index('<section id="engine">') : text.index('<section id="tokens">')]


def test_training_log_becomes_a_curve(run_folder: Path, tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    shutil.copytree(run_folder / "evaluation", tmp_path / "evaluation")
    with SummaryWriter(str(tmp_path / "fit" / "log")) as writer:
        for step in range(5):
            writer.add_scalar("val/regret", 0.5 / 2**step, step)
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert 'data-series="val/regret"' in text
    assert "val/regret: 4, 0.0312" in text


def test_chart_puts_points_where_they_belong() -> None:
    svg = str(line_chart("t", [Series("<a>", [0.0, 1.0], [0.0, 2.0])], "x", "y"))
    assert "<a>" not in svg
    dots = [tuple(map(float, found)) for found in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg)]
    assert dots[0][0] < dots[1][0]
    assert dots[0][1] > dots[1][1]  # larger y is higher up
    assert Axis("", 0.0, 1.0).ticks() == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])


def test_constant_series_and_empty_charts_are_drawn() -> None:
    assert "circle" in line_chart("t", [Series("a", [1.0], [3.0])], "x", "y")
    assert line_chart("t", [Series("a", [], [])], "x", "y") == ""


def frontier_of(verifier: float = 20.0) -> dict:
    """Two temperatures of a verifier, lossless and OPT at two settings, under a name that is a script."""
    from deferral_train.evaluation.frontier import frontier_of as entry_of

    def rule(quality: float, seconds: float, rate: float) -> dict:
        costs = {
            "seconds": seconds,
            "rejection_rate": rate,
            "deferral_rate": rate,
            "verifier_calls_per_token": rate,
        }
        return {"quality": {"bleu": quality}, "prompts": 12, **costs}

    rules = {"verifier_only": rule(verifier, 10.0, 1.0), "lossless": rule(verifier, 8.0, 0.5)}
    rules |= {"opt:alpha=0.1": rule(21.0, 7.0, 0.4), "opt:alpha=0.3": rule(18.0, 4.0, 0.2)}
    rules[HOSTILE.format("rule")] = rule(5.0, 3.0, 0.1)
    return {
        "entries": [entry_of({"rules": rules, "settings": {"temperature": t}}, "bleu") for t in (0.0, 1.0)]
    }


def test_frontier_becomes_charts_and_table_2(run_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(run_folder / "evaluation", tmp_path / "evaluation")
    write_json(tmp_path / "evaluation" / "frontier.json", frontier_of())
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert text.count('data-charts="frontier-') == 2
    assert text.count("bleu against time relative to the verifier alone (Figures 4, 5), T = 1") >= 1
    # 20 lies between 18 at 0.4 and 21 at 0.7: two thirds of the way, 1 / 0.6.
    assert "<td>opt</td><td>2</td><td>1.67×</td><td>0.333</td><td>21.0</td>" in text
    scripts = Scripts()
    scripts.feed(text)
    assert "ownedrule" not in "".join(kind or "" for kind in scripts.types)
    assert HOSTILE.format("rule") not in text


@pytest.mark.parametrize(
    ("identity", "change"),
    [
        ("latency of verifier_only = 1", lambda e: e["points"]["verifier_only"][0].update(latency=0.9)),
        ("0 <= rejection_rate <= 1", lambda e: e["points"]["opt"][0].update(rejection_rate=1.5)),
        ("Table 2 follows from the points", lambda e: e["table2"][0].update(speedup_at_quality=3.0)),
    ],
)
def test_a_frontier_that_contradicts_itself_is_refused(tmp_path: Path, identity: str, change) -> None:
    found = frontier_of()
    change(found["entries"][1])
    write_json(tmp_path / "evaluation" / "frontier.json", found)
    with pytest.raises(InputError, match=f"frontier.json: temperature 1.*{identity}"):
        write_report(tmp_path)


def test_tensorboard_gets_the_curves_of_the_page(run_folder: Path, tmp_path: Path) -> None:
    """Event files read back: every setting is a scalar at its cost in thousandths, every chart a figure."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shutil.copytree(run_folder / "evaluation", tmp_path / "evaluation")
    write_json(tmp_path / "evaluation" / "frontier.json", frontier_of())
    for _ in range(2):  # a second report replaces the first
        write_report(tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    found = [(e.step, e.value) for e in events.Scalars("bleu_against_latency_t1/opt")]
    assert found == [(400, 18.0), (700, 21.0)]
    scores = json.loads((tmp_path / "evaluation" / "scores.json").read_text())
    for name in ("opt", "chow", "lossless"):
        wanted = sorted(
            (round(p["rejection_rate"]["value"] * 1000), p["risk"]["value"])
            for p in scores["points"]
            if p["rule"] == name
        )
        shown = sorted((e.step, e.value) for e in events.Scalars(f"risk_against_rejection_rate/{name}"))
        assert [step for step, _ in shown] == [step for step, _ in wanted]
        assert [value for _, value in shown] == pytest.approx([value for _, value in wanted], abs=1e-6)
    images = events.Tags()["images"]
    assert {"figures/bleu_against_latency_t0", "figures/emitted_risk_against_rejection_rate"} <= set(images)
    assert len(events.Images("figures/bleu_against_latency_t0")) == 1


def token_view(page: str) -> dict:
    """The data of the token view and of the slider, as the page's script reads them."""
    found = re.findall(r'<script type="application/json"[^>]*id="([\w-]+)"[^>]*>(.*?)</script>', page, re.S)
    return {name: json.loads(data) for name, data in found}


def test_a_pair_of_ones_own_gives_text_and_the_page_says_how_it_was_made(
    run_folder: Path, tmp_path: Path
) -> None:
    """`run` leaves no pair folder where the config names a pair: its tokenizer comes from there, else ids are shown."""
    run = tmp_path / "run"
    shutil.copytree(run_folder, run)
    shutil.move(run / "pair", tmp_path / "own")
    named = {role: str(tmp_path / "own" / role) for role in ("drafter", "verifier")}
    write_json(run / "run.json", {"config": {"pair": named, "seed": 17}})
    with_text = write_report(run).read_text(encoding="utf-8")
    assert "How these numbers were made" in with_text
    assert "&#34;seed&#34;: 17" in with_text
    write_json(run / "run.json", {"config": {"pair": dict.fromkeys(named, "nobody/absent")}})
    with_ids = write_report(run).read_text(encoding="utf-8")
    texts = [
        "".join(
            token["t"] for token in next(iter(token_view(page)["token-data"]["prompts"]))["texts"]["lossless"]
        )
        for page in (with_text, with_ids)
    ]
    assert "document.title" in texts[0]
    assert re.fullmatch(r"(\d+ )+", texts[1])


def test_the_slider_starts_at_the_chosen_alpha(run_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_folder, run)
    verdict = json.loads((run / "verdict.json").read_text())
    name = json.loads((run / "evaluation" / "prefixes.json").read_text())["estimators"][-1]
    verdict["chosen"] |= {"label": name, "value": 0.125}
    write_json(run / "verdict.json", verdict)
    slider = token_view(write_report(run).read_text(encoding="utf-8"))["slider-data"]
    assert slider["alpha"]["start"] == 0.125
    assert slider["estimators"][0] == name
