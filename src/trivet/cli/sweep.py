"""`trivet sweep`: a grid of settings with several seeds."""

from __future__ import annotations

from typing import Annotated

import typer

from trivet.cli.app import split_arguments, verb
from trivet.cli.inspect import table
from trivet.errors import TrivetError


def register(app: typer.Typer) -> None:
    @app.command(epilog="Example: trivet sweep config.yaml training.learning_rate=1e-4,3e-4 --seeds 3")
    @verb
    def sweep(
        arguments: Annotated[
            list[str], typer.Argument(metavar="[CONFIG] [KEY=VALUE,VALUE]...", help="config, and values to choose from")
        ],
        seeds: Annotated[int, typer.Option(min=1, help="runs of each setting, from training.seed on")] = 1,
        jobs: Annotated[int, typer.Option(min=1, help="runs at a time on this machine")] = 1,
    ) -> None:
        """Train every combination of the values, compare them on the validation rows; begun anew, it goes on."""
        from trivet.sweep.sweep import SUMMARY, TABLE
        from trivet.sweep.sweep import sweep as run

        path, overrides = split_arguments(arguments)
        outcome = run(path, overrides, seeds=seeds, jobs=jobs, say=lambda line: typer.echo(line, err=True))
        table(outcome.table)
        if outcome.summary["chosen"]:
            typer.echo(f"best on the validation rows: {outcome.summary['chosen']}")
        typer.echo(f"wrote {outcome.folder / SUMMARY} and {TABLE}")
        if outcome.failed:
            names = "; ".join(map(str, outcome.failed))
            raise TrivetError(
                f"{len(outcome.failed)} runs failed: {names}. Why stands above; the same command tries them again"
            )
