"""`trivet methods`: the named methods and the parts they are made of."""

from __future__ import annotations

import typer

from trivet.cli.app import verb
from trivet.methods import METHODS, PARTS


def register(app: typer.Typer) -> None:
    @app.command(epilog="Example: trivet train config.yaml method=lora")
    @verb
    def methods() -> None:
        """List the methods, and the decompositions, rank policies and update rules behind them."""
        typer.echo("Methods (method: NAME)")
        for name, method in METHODS.items():
            parts = f"{method.decompose} x {method.rank} x {method.update}"
            typer.echo(f"  {name:<12} {method.summary} ({parts})")
        for leg, table in PARTS.items():
            typer.echo(f"\n{leg.capitalize()}")
            for name, part in table.items():
                typer.echo(f"  {name:<12} {part.summary}. Costs {part.cost}. {part.source}")
