"""`trivet methods`: the named methods and the parts they are made of."""

from __future__ import annotations

import textwrap
from typing import Annotated

import typer

from trivet.cli.app import verb
from trivet.legs import LEGS, Part
from trivet.methods import METHODS, Method, find_method
from trivet.parts import PARTS


def register(app: typer.Typer) -> None:
    @app.command(epilog="Example: trivet train config.yaml 'method={rank: {name: squeeze, budget: r2-equivalent}}'")
    @verb
    def methods(
        name: Annotated[
            str | None, typer.Argument(help="a method or a part: what it is, its options, its limits")
        ] = None,
    ) -> None:
        """List the methods, and the decompositions, rank policies and update rules behind them."""
        if name is None:
            typer.echo("Methods (method: NAME, or one part for each leg)")
            for key, method in METHODS.items():
                typer.echo(f"  {key:<16} {method.summary} ({method})")
            for leg in LEGS:
                typer.echo(f"\n{leg.capitalize()} (method: {{{leg}: NAME}})")
                for key, part in PARTS[leg].items():
                    typer.echo(f"  {key:<16} {part.summary}")
            typer.echo("\n`trivet methods NAME` says where it comes from, what it costs, its options and its limits.")
            return
        found = [(leg, PARTS[leg][name]) for leg in LEGS if name in PARTS[leg]]
        if name in METHODS or not found:
            _show_method(name, find_method(name))
        for leg, part in found:
            _show_part(leg, name, part)


def _show_method(name: str, method: Method) -> None:
    typer.echo(f"method {name}: {method.summary}")
    for leg in LEGS:
        typer.echo(f"  {leg}: {getattr(method, leg).name}")


def _show_part(leg: str, name: str, part: Part) -> None:
    typer.echo(f"{leg} {name}: {part.summary}")
    typer.echo(f"  source: {part.source}")
    typer.echo(f"  costs: {part.cost}")
    for option in part.options:
        default = "" if option.default is None else f" (default {option.default})"
        text = f"  {option.name}: {option.help}{default}"
        typer.echo(textwrap.fill(text, 110, subsequent_indent="    "))
    for other in LEGS:
        for theirs, row in PARTS[other].items():
            reasons = [part.refuses[t] for t in row.traits if t in part.refuses]
            reasons += [row.refuses[t] for t in part.traits if t in row.refuses]
            for reason in reasons:
                typer.echo(textwrap.fill(f"  not with {other} {theirs}: {reason}", 110, subsequent_indent="    "))
