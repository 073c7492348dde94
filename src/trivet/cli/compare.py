"""`trivet compare`: adapters against each other on the same rows."""

from __future__ import annotations

from typing import Annotated

import typer

from trivet.cli.app import verb
from trivet.cli.measuring import ALL_ROWS, BatchSize, MaxGenerateRows, MaxNewTokens, MaxRows, NoGenerate, Output
from trivet.cli.train import show
from trivet.errors import ConfigError
from trivet.garbage import uncollected


def register(app: typer.Typer) -> None:
    @app.command(epilog="Example: trivet compare runs/first runs/second base --data data/test.jsonl")
    @verb
    def compare(
        candidates: Annotated[
            list[str], typer.Argument(metavar="FIRST OTHER...", help="run or adapter folders, or the word base")
        ],
        data: Annotated[
            str, typer.Option(help="file or hub id; default: the first run's test or validation rows")
        ] = "",
        max_rows: MaxRows = ALL_ROWS,
        max_generate_rows: MaxGenerateRows = 200,
        max_new_tokens: MaxNewTokens = 128,
        batch_size: BatchSize = 16,
        no_generate: NoGenerate = False,
        base_model: Annotated[str, typer.Option(help="where an adapter does not say which it belongs to")] = "",
        output: Output = None,
    ) -> None:
        """Compare each with the first on the same rows: paired differences with 95% intervals, and a verdict."""
        if output is not None and output.is_dir():
            raise ConfigError(f"--output {output}: is a folder; name a file")
        with uncollected():
            from trivet.comparison import compare_adapters
            from trivet.evaluate.measure import Settings
            from trivet.runfolder import storage, write_json

        found = compare_adapters(
            candidates,
            data=data or None,
            max_rows=max_rows,
            settings=Settings(
                batch_size=batch_size,
                generate=not no_generate,
                max_generate_rows=max_generate_rows,
                max_new_tokens=max_new_tokens,
            ),
            base_model=base_model or None,
        )
        typer.echo(f"{found.rows:,} rows of {found.source}")
        for remark in found.remarks:
            typer.echo(f"  {remark}")
        for pair in found.pairs:
            typer.echo("")
            show(pair.evaluation, pair.first, pair.other)
            typer.echo(pair.verdict)
        if output is not None:
            with storage(f"--output {output}"):
                output.parent.mkdir(parents=True, exist_ok=True)
            write_json(output, found.to_dict())
            typer.echo(f"wrote {output}")
