"""`trivet train`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trivet import processes
from trivet.cli.app import split_arguments, verb
from trivet.garbage import uncollected

if TYPE_CHECKING:
    from trivet.evaluate.measure import Evaluation


def register(app: typer.Typer) -> None:
    @app.command(epilog="Example: trivet train config.yaml training.max_steps=20 output_dir=runs/short")
    @verb
    def train(
        arguments: Annotated[list[str], typer.Argument(metavar="[CONFIG] [KEY=VALUE]...", help="config and overrides")],
        resume: Annotated[bool, typer.Option("--resume", help="go on with the run in output_dir")] = False,
        overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the run in output_dir")] = False,
        force: Annotated[bool, typer.Option("--force", help="resume despite other data or settings")] = False,
    ) -> None:
        """Fine-tune, save the adapter (proved by reloading it), and evaluate base and tuned side by side."""
        from trivet.configio import load
        from trivet.runfolder import RunFolder
        from trivet.splits import load_splits

        path, overrides = split_arguments(arguments)
        config = load(path, overrides)
        if processes.first():  # as `run` does again, for those who call it from Python
            RunFolder(Path(config.output_dir)).check_free(resume=resume, overwrite=overwrite)
        splits = load_splits(config)
        with uncollected():
            from trivet.run import train as run  # imports torch: not before config, folder and data are right

        try:
            outcome = run(config, splits=splits, resume=resume, overwrite=overwrite, force=force)
        except KeyboardInterrupt:
            if Path(config.output_dir).exists():  # what has no checkpoint yet is removed
                typer.echo(f"run folder {config.output_dir} keeps its checkpoints; --resume goes on with it", err=True)
            raise
        if not processes.first():
            return
        if outcome.evaluation is not None:
            show(outcome.evaluation)
        result = outcome.result
        typer.echo(
            f"{result['steps']} steps in {result['wall_seconds']:.0f} s, {result['tokens_per_second']:,.0f} tokens/s, "
            f"{result['trainable_parameters']:,} trainable parameters, "
            f"peak memory {result['peak_memory_bytes'] / 2**30:.1f} GiB"
        )
        typer.echo(f"run folder {config.output_dir}; try: trivet generate {config.output_dir} --prompt '...'")


def show(evaluation: Evaluation, first: str = "base", other: str = "tuned") -> None:
    """The table first | other | difference with its 95% interval."""
    rows = [("metric", first, other, "difference [95% interval]", "n"), *evaluation.table()]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        typer.echo("  ".join(cells).rstrip())
