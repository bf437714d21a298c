"""Writes the generated table of docs/catalogue.md: `python tests/rules/make_catalogue.py`.

Every row is what `check_rule` found on the rule's instances, never what anybody typed.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from instances import PARAMETERS, build, reports

from deferral_train.rules import RULES, BlockRule, Rule
from deferral_train.testing import RuleReport

CATALOGUE = Path(__file__).resolve().parents[2] / "docs" / "catalogue.md"
BEGIN, END = "<!-- generated: rules -->", "<!-- end of generated: rules -->"
HEAD = (
    "| rule | kind | dial | range | lossless at | drafter at | reads | needs the drafter's distribution | "
    "draft + accept + residual = target |\n|---|---|---|---|---|---|---|---|---|"
)


def table() -> str:
    """One row per rule."""
    return "\n".join([HEAD, *(row(name) for name in RULES)])


def row(name: str) -> str:
    """A rule's declared dial and what the check found over its instances."""
    rule = build(name, PARAMETERS[name][0])
    found = reports(name)
    cells = (f"`{name}`", found[0].kind, *dial_cells(rule, found[0]), reads(rule))
    distribution = "yes" if rule.reads_drafter_confidence else "no"
    return f"| {' | '.join(cells)} | {distribution} | {exactness(found)} |"


def dial_cells(rule: Rule, report: RuleReport) -> tuple[str, str, str, str]:
    """Dial, range, and the ends that were verified."""
    dial = rule.dial
    if dial is None:
        return (
            "none",
            "",
            "always" if rule.is_lossless else "never",
            "always" if rule.name == "drafter_only" else "",
        )
    span = f"{dial.low:g} to {dial.high:g}" + (" (any finite)" if dial.unbounded else "")
    lossless = "none" if report.lossless_end == "none" else f"{dial.lossless:g}"
    drafter = "none" if report.drafter_end == "none" else f"{dial.drafter:g}"
    return dial.parameter, span, lossless, drafter


def reads(rule: Rule) -> str:
    """What the decision reads."""
    if rule.name in ("learned", "judge", "token_gap"):
        return "its head's features"
    if isinstance(rule, BlockRule):
        return "all checks of the block, verifier's distributions"
    return ", ".join(sorted(rule.needs)) or "nothing"


def exactness(found: tuple[RuleReport, ...]) -> str:
    """The worst case over instances, as a bound that does not change from machine to machine."""
    worst = max(max(report.worst, report.rejection) for report in found)
    assert worst <= 1e-12, "check_rule lets nothing else pass"
    if found[0].kind == "block":
        return f"no target; at its lossless end within 1e-12 over {sum(r.positions for r in found):,} drafted blocks"
    return f"within 1e-12 on {sum(report.positions for report in found):,} positions"


def main() -> None:
    text = CATALOGUE.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    CATALOGUE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}")


if __name__ == "__main__":
    main()
