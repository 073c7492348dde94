"""`trivet export`: the adapter in the form that another tool reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trivet.cli.app import verb
from trivet.cli.merge import free_target
from trivet.garbage import uncollected


def register(app: typer.Typer) -> None:
    @app.command(epilog="Example: trivet export runs/first exported/ --format portable")
    @verb
    def export(
        adapter: Annotated[Path, typer.Argument(help="run folder or adapter folder")],
        output: Annotated[Path, typer.Argument(help="folder for the exported adapter")],
        format: Annotated[str, typer.Option(help="native (PEFT) or portable (vLLM, TGI, llama.cpp)")] = "portable",
        base_model: Annotated[str, typer.Option(help="where the adapter does not say which it belongs to")] = "",
        overwrite: Annotated[bool, typer.Option("--overwrite", help="replace what is in OUTPUT")] = False,
    ) -> None:
        """Write the adapter as native (true ranks) or portable (one rank and alpha for all layers, zero-padded)."""
        free_target(output, overwrite)
        with uncollected():
            from trivet.adapter.save import check_form
            from trivet.adapter.save import export as write_export
            from trivet.session import reopen

        check_form(format)
        session = reopen(adapter, base_model=base_model or None)
        proof = write_export(session.model, output, format, session.probe(), tokenizer=session.tokenizer)
        typer.echo(f"wrote {output} ({format}); {proof}")
