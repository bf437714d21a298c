"""`deferral-train report`: one self-contained HTML page about a run folder."""

from __future__ import annotations

POSITIONAL = ("run_dir",)


def run(run_dir: str, out: str | None = None, shadow: str | None = None) -> int:
    """Check a run folder's numbers against their identities and write its page.

    Args:
        run_dir: folder of a run: verdict.json, evaluation/, decode/, fit/, each as far as it is there.
        out: where to write the page; default report.html in the run folder.
        shadow: JSON file of a serving engine's shadow mode (deferral.shadow_file), or a folder of such files.
    """
    from deferral_train.report import write_report

    print(write_report(run_dir, out, shadow))
    return 0
