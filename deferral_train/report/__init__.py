"""The report: one page that a person can read who was not there."""

from deferral_train.report.load import RunFolder, load_run
from deferral_train.report.page import write_report

__all__ = ["RunFolder", "load_run", "write_report"]
