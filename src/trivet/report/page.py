"""Puts a run's figures, or several runs', into the page."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from trivet.memory import gib
from trivet.report import charts
from trivet.report.figures import parts
from trivet.report.load import Run
from trivet.report.together import parts_together
from trivet.report.words import clip, clock
from trivet.runfolder import write_text


def write_report(run: Run) -> Path:
    """Write report.html into the folder of a run, finished or not; `StorageError` where it can't be written."""
    write_text(run.folder.report, report(run))
    return run.folder.report


def report(run: Run) -> str:
    """One run's page."""
    return _templates().get_template("run.html.j2").render(run=run, **parts(run))


def comparison(runs: Sequence[Run]) -> str:
    """The page of two to six runs side by side; `ConfigError` for another number."""
    return _templates().get_template("compare.html.j2").render(**parts_together(runs))


@cache
def _templates() -> Environment:
    loader = PackageLoader("trivet.report")
    found = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    found.filters |= {"short": charts.short, "clock": clock, "gib": gib, "clip": clip}
    found.globals["version"] = version("trivet")
    return found
