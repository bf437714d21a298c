"""One self-contained HTML page about a run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from markupsafe import Markup

from deferral_train import provenance
from deferral_train.report.answer import answer
from deferral_train.report.board import write_board
from deferral_train.report.breakdowns import breakdowns
from deferral_train.report.engine import engine
from deferral_train.report.first import first_screen
from deferral_train.report.frontier import frontier
from deferral_train.report.load import RunFolder, load_run, readable
from deferral_train.report.rounds import rounds
from deferral_train.report.sections import calibration, curves, length, online, skew, training
from deferral_train.report.shadow import shadow as shadow_section
from deferral_train.report.tokens import Texts, slider_data, token_data

HERE = Path(__file__).parent


def write_report(
    run_dir: str | Path, out: str | Path | None = None, shadow: str | Path | None = None
) -> Path:
    """Check a run folder and write its page, and its curves for TensorBoard in ``tensorboard/`` of the run folder.

    Args:
        run_dir: folder of a run, see :class:`deferral_train.report.load.RunFolder` for what is read.
        out: where to write; default ``report.html`` inside the run folder.
        shadow: file or folder of a serving engine's shadow mode, beside what the folder holds itself.

    Returns:
        path of the page.

    Raises:
        InputError: as :func:`deferral_train.report.load.load_run`.
    """
    run = load_run(run_dir, shadow)
    path = Path(out) if out is not None else run.folder / "report.html"
    with readable(run.folder):
        write_board(run)
        page = render(run)
    provenance.write_text(path, page)
    return path


def render(run: RunFolder) -> str:
    """The page as text. Everything from outside is escaped by the template; data for scripts by
    :func:`embed`.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    texts = Texts.of(run)
    template = environment.get_template("page.html.jinja")
    return template.render(
        name=run.folder.resolve().name,
        style=Markup((HERE / "style.css").read_text(encoding="utf-8")),
        script=Markup((HERE / "script.js").read_text(encoding="utf-8")),
        answer=answer(run),
        first=first_screen(run, texts),
        curves=curves(run),
        online=online(run),
        engine=engine(run),
        frontier=frontier(run),
        breakdowns=breakdowns(run),
        rounds=rounds(run),
        shadow=shadow_section(run.shadow),
        training=training(run),
        calibration=calibration(run),
        skew=skew(run),
        length=length(run),
        tokens=_embedded(token_data(run, texts)),
        slider=_embedded(slider_data(run, texts)),
        provenance=_provenance(run),
    )


def embed(value: Any) -> Markup:
    """JSON that cannot leave its script element, whatever text it holds."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _embedded(value: Any) -> Markup | None:
    return None if value is None else embed(value)


def _provenance(run: RunFolder) -> str | None:
    return None if run.provenance is None else json.dumps(run.provenance, indent=1, ensure_ascii=False)
