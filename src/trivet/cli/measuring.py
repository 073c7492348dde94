"""Options of the verbs that measure adapters on rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MaxRows = Annotated[int, typer.Option(min=1, help="at most so many rows", show_default="all")]
MaxGenerateRows = Annotated[int, typer.Option(min=1, help="write answers for at most so many rows")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="longest answer, in tokens")]
BatchSize = Annotated[int, typer.Option(min=1, help="rows per forward pass")]
NoGenerate = Annotated[bool, typer.Option("--no-generate", help="only what needs no written answer")]
InFourBit = Annotated[
    bool | None,
    typer.Option(help="the base model's weights in 4 bits, or whole; default: as in training", show_default=False),
]
Output = Annotated[Path | None, typer.Option(help="also write the figures to this JSON file")]
#: All there are.
ALL_ROWS = 1_000_000_000
