"""`trivet validate`: everything that can be checked without training, and what the model will see."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from trivet.cli.app import split_arguments, verb
from trivet.garbage import uncollected

if TYPE_CHECKING:
    from trivet.data.encode import Encoded


def register(app: typer.Typer) -> None:
    @app.command(epilog="Example: trivet validate config.yaml data.max_length=512")
    @verb
    def validate(
        arguments: Annotated[list[str], typer.Argument(metavar="[CONFIG] [KEY=VALUE]...", help="config and overrides")],
        rows: Annotated[int, typer.Option(min=0, help="how many training rows to show")] = 2,
    ) -> None:
        """Check config, data and model without training; show the first rows with what is learned marked."""
        from trivet.configio import load
        from trivet.splits import load_splits

        path, overrides = split_arguments(arguments)
        config = load(path, overrides)
        splits = load_splits(config)
        with uncollected():
            from rich.console import Console

            from trivet.memory import gib
            from trivet.prepare import memory_needed, prepare  # imports torch: not before config and data are right
            from trivet.schedule import planned_steps

        ready = prepare(config, splits, Console(highlight=False))
        for index, row in enumerate(ready.train_rows[:rows]):
            typer.echo(f"\nrow {index + 1}, as the model sees it; what is learned stands between « and »:")
            typer.echo(marked(row, ready.session.tokenizer))
        needed = memory_needed(ready)
        typer.echo(
            f"\n{planned_steps(ready.config, ready.train_rows):,} steps; estimated memory at the longest rows: "
            f"{gib(needed.total)} ({needed}). Nothing was trained or written; the config is valid."
        )


def marked(row: Encoded, tokenizer: Any) -> str:
    """The row's text with its supervised part between « and »; a label or a target stands behind an arrow."""
    from trivet.data.marked import pieces

    return "".join(f"«{text}»" if learned else text for text, learned in pieces(row, tokenizer))
