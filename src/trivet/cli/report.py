"""`trivet report`: a run, or several side by side, as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trivet.cli.app import verb
from trivet.errors import ConfigError


def register(app: typer.Typer) -> None:
    @app.command(epilog="Example: trivet report runs/first runs/second --output both.html")
    @verb
    def report(
        runs: Annotated[list[Path], typer.Argument(help="run folders, finished or not; two to six are compared")],
        output: Annotated[
            Path | None, typer.Option(help="the file; default: report.html in the run folder, or in the working folder")
        ] = None,
    ) -> None:
        """Write what was trained and how it went, as one HTML file that needs no network."""
        if output is not None and output.is_dir():
            raise ConfigError(f"--output {output}: is a folder; name a file")
        from trivet.runfolder import run_folder, storage, write_text

        for folder in runs:
            run_folder(folder)
        from trivet.report import comparison, load_run
        from trivet.report import report as page

        found = [load_run(folder) for folder in runs]
        text = page(found[0]) if len(found) == 1 else comparison(found)
        goal = output or (found[0].folder.report if len(found) == 1 else Path("report.html"))
        with storage(f"report {goal}"):
            goal.parent.mkdir(parents=True, exist_ok=True)
        write_text(goal, text)
        typer.echo(f"wrote {goal}")
