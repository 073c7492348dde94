"""`trivet evaluate`: base and tuned side by side, on any data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trivet.cli.app import verb
from trivet.cli.measuring import (
    ALL_ROWS,
    BatchSize,
    InFourBit,
    MaxGenerateRows,
    MaxNewTokens,
    MaxRows,
    NoGenerate,
    Output,
)
from trivet.cli.train import show
from trivet.garbage import uncollected


def register(app: typer.Typer) -> None:
    @app.command(epilog="Example: trivet evaluate runs/first --data data/test.jsonl --max-rows 100")
    @verb
    def evaluate(
        adapter: Annotated[Path, typer.Argument(help="run folder or adapter folder")],
        data: Annotated[str, typer.Option(help="file or hub id; default: the run's own test or validation rows")] = "",
        max_rows: MaxRows = ALL_ROWS,
        max_generate_rows: MaxGenerateRows = 200,
        max_new_tokens: MaxNewTokens = 128,
        batch_size: BatchSize = 16,
        no_generate: NoGenerate = False,
        base_model: Annotated[str, typer.Option(help="where the adapter does not say which it belongs to")] = "",
        load_in_4bit: InFourBit = None,
        output: Output = None,
    ) -> None:
        """Measure base and tuned on the same rows, with 95% intervals; a run folder's result.json is updated."""
        with uncollected():
            from trivet.evaluate.measure import Settings
            from trivet.evaluation import evaluate_adapter

        settings = Settings(
            batch_size=batch_size,
            generate=not no_generate,
            max_generate_rows=max_generate_rows,
            max_new_tokens=max_new_tokens,
        )
        evaluation, written = evaluate_adapter(
            adapter,
            data=data or None,
            max_rows=max_rows,
            settings=settings,
            base_model=base_model or None,
            load_in_4bit=load_in_4bit,
            output=output,
        )
        show(evaluation)
        for path in written:
            typer.echo(f"wrote {path}")
