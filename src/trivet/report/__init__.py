"""report.html: what was trained and how it went, in one file that needs no network."""

from trivet.report.load import load_run
from trivet.report.page import comparison, report, write_report

__all__ = ["comparison", "load_run", "report", "write_report"]
