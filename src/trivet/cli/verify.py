"""`trivet verify`: is an artefact whole, and does it compute what another one computes?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trivet.cli.app import verb
from trivet.garbage import uncollected


def register(app: typer.Typer) -> None:
    @app.command(epilog="Example: trivet verify exported/ --against runs/first")
    @verb
    def verify(
        artefact: Annotated[Path, typer.Argument(help="run folder, adapter folder, or folder of a full model")],
        against: Annotated[Path | None, typer.Option(help="another one, which must compute the same")] = None,
        base_model: Annotated[str, typer.Option(help="where an adapter does not say which it belongs to")] = "",
    ) -> None:
        """Check that an adapter or merged model is whole and loads; with --against, that both give the same logits."""
        with uncollected():
            from trivet.verification import verify as run

        done = run(artefact, against, base_model=base_model or None)
        for found in done.artefacts:
            typer.echo(f"{found}; whole, loads and computes")
        if done.proof is not None:
            typer.echo(f"both compute the same; {done.proof.figures}, in float32 on two rows of random tokens")
