"""`trivet compress`: a smaller copy of any LoRA adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trivet.cli.app import verb
from trivet.cli.inspect import table
from trivet.garbage import uncollected

if TYPE_CHECKING:
    from trivet.compression import Compression


def register(app: typer.Typer) -> None:
    @app.command(epilog="Example: trivet compress runs/first --budget r4-equivalent --data data/train.jsonl")
    @verb
    def compress(
        adapter: Annotated[Path, typer.Argument(help="run folder or adapter folder, also one made elsewhere")],
        budget: Annotated[str, typer.Option(help="what is kept: 500k, 0.5%, r4-equivalent, or a number")],
        output: Annotated[Path | None, typer.Option(help="folder to write; default: ADAPTER-compressed")] = None,
        data: Annotated[str, typer.Option(help="rows as in training, to price by the loss: a file or hub id")] = "",
        base_model: Annotated[str, typer.Option(help="where the adapter does not say which it belongs to")] = "",
        max_rows: Annotated[int, typer.Option(min=2, help="at most so many rows of --data")] = 256,
    ) -> None:
        """Keep an adapter's most valuable directions within a parameter budget, and show what other budgets would."""
        with uncollected():
            from trivet.compression import compress_adapter

        done = compress_adapter(
            adapter, budget, output=output, data=data or None, base_model=base_model or None, max_rows=max_rows
        )
        show(done.compression, budget)
        typer.echo(f"wrote {done.folder}; {done.proof}")


def show(outcome: Compression, budget: str) -> None:
    """The table of budgets."""
    whole, measured = outcome.choices[0], outcome.choices[0].loss
    if measured is None:
        typer.echo("directions priced by singular values; --data prices them by the loss, and measures it")
    else:
        priced = f"directions priced by the loss on {outcome.probed:,} rows of --data"
        typer.echo(f"{priced}; losses are of the {outcome.measured:,} others")
    head = ("budget", "parameters", "layers", *(("kept of ‖ΔW‖²",) if measured is None else ("loss", "difference")))
    rows = []
    for choice in outcome.choices:
        name = {"asked": f"asked: {budget}", "none": "none (base)"}.get(choice.label, choice.label)
        figures = [name, f"{choice.parameters:,}", str(choice.layers)]
        if measured is None or choice.loss is None:
            figures.append(f"{choice.kept:.2%}")
        else:
            figures += [f"{choice.loss:.4f}", "" if choice is whole else f"{choice.loss - measured:+.4f}"]
        rows.append(figures)
    table([head, *rows])
