"""`trivet inspect`: what an adapter holds, and how much of its ranks it uses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trivet.cli.app import verb
from trivet.errors import ConfigError
from trivet.garbage import uncollected

if TYPE_CHECKING:
    from trivet.inspection import Inspection, LayerReport

#: Columns of a terminal that every table fits into.
_WIDTH = 100


def register(app: typer.Typer) -> None:
    @app.command(epilog="Example: trivet inspect runs/first --image ranks.png")
    @verb
    def inspect(
        adapter: Annotated[Path, typer.Argument(help="run folder or adapter folder, also one made elsewhere")],
        layers: Annotated[bool, typer.Option("--layers", help="also a row for every layer")] = False,
        image: Annotated[Path | None, typer.Option(help="draw ranks and effective ranks to this PNG file")] = None,
        json: Annotated[Path | None, typer.Option(help="write all figures to this JSON file")] = None,
        base_model: Annotated[str, typer.Option(help="also check that the adapter fits this model")] = "",
    ) -> None:
        """Show each kind of layer's rank, how much of it is used, and the update's size. Loads no base model."""
        if image is not None and (image.suffix.lower() != ".png" or image.is_dir()):
            raise ConfigError(f"--image {image}: name a file that ends in .png")
        if json is not None and json.is_dir():
            raise ConfigError(f"--json {json}: is a folder; name a file")
        with uncollected():
            from trivet.inspection import inspect_adapter
            from trivet.pictures import heat_maps
            from trivet.runfolder import storage, write_json

        found = inspect_adapter(adapter, base_model=base_model or None)
        show(found, layers)
        if image is not None:
            ranks = {x.name: float(x.rank) for x in found.layers}
            heat_maps({"rank": ranks, "effective rank": {x.name: x.effective_rank for x in found.layers}}, image)
            typer.echo(f"wrote {image}")
        if json is not None:
            with storage(f"--json {json}"):
                json.parent.mkdir(parents=True, exist_ok=True)
            write_json(json, found.to_dict())
            typer.echo(f"wrote {json}")


def show(found: Inspection, layers: bool) -> None:
    """The tables."""
    typer.echo(f"adapter {found.adapter}" + (f", base model {found.base_model}" if found.base_model else ""))
    for remark in found.remarks:
        typer.echo(f"  {remark}")
    if layers:
        typer.echo("")
        first = ("layer", "out x in", "rank", "effective", "unused", "σ max", "σ min", "‖ΔW‖")
        table([first, *(_layer(x) for x in found.layers)])
    typer.echo("")
    head = ("module", "layers", "rank min", "mean", "max", "effective", "unused", "‖ΔW‖", "parameters")
    total = found.total
    rows = [
        (
            s.kind,
            str(s.layers),
            str(s.smallest_rank),
            f"{s.mean_rank:.1f}",
            str(s.largest_rank),
            f"{s.effective_rank:.1f}",
            f"{s.unused:.0%}",
            f"{s.norm:.3g}",
            f"{s.parameters:,}",
        )
        for s in [*found.by_kind(), total]
    ]
    table([head, *rows])
    if found.base_parameters:
        share = total.parameters / found.base_parameters
        typer.echo(f"{share:.3%} of the base model's {found.base_parameters:,} parameters")


def _layer(x: LayerReport) -> tuple[str, ...]:
    sizes = x.singular_values or [0.0]
    return (
        x.name,
        f"{x.shape[0]} x {x.shape[1]}",
        str(x.rank),
        f"{x.effective_rank:.1f}",
        f"{x.unused:.0%}",
        f"{sizes[0]:.3g}",
        f"{sizes[-1]:.3g}",
        f"{x.norm:.3g}",
    )


def table(rows: Sequence[Sequence[str]], width: int = _WIDTH) -> None:
    """Columns, the first to the left, the others to the right; a first cell that does not fit loses its beginning."""
    others = [max(len(row[i]) for row in rows) for i in range(1, len(rows[0]))]
    room = min(max(len(row[0]) for row in rows), width - sum(others) - 2 * len(others))
    for row in rows:
        first = row[0] if len(row[0]) <= room else f"…{row[0][1 - room :]}"
        cells = [first.ljust(room), *(cell.rjust(w) for cell, w in zip(row[1:], others, strict=True))]
        typer.echo("  ".join(cells).rstrip())
