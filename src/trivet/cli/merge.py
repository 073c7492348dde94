"""`trivet merge`: a full model that needs no adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trivet.cli.app import verb
from trivet.cli.measuring import InFourBit
from trivet.errors import ConfigError
from trivet.garbage import uncollected


def free_target(path: Path, overwrite: bool) -> Path:
    """The folder to write to; `ConfigError` where something is there and may not be replaced."""
    if path.is_file():
        raise ConfigError(f"{path}: is a file; name a folder")
    if path.exists() and any(path.iterdir()) and not overwrite:
        raise ConfigError(f"{path}: exists already; name another folder, or replace it with --overwrite")
    return path


def register(app: typer.Typer) -> None:
    @app.command(epilog="Example: trivet merge runs/first merged/ && ls merged/")
    @verb
    def merge(
        adapter: Annotated[Path, typer.Argument(help="run folder or adapter folder")],
        output: Annotated[Path, typer.Argument(help="folder for the full model")],
        dtype: Annotated[str, typer.Option(help="auto (as trained), float32, bfloat16 or float16")] = "auto",
        base_model: Annotated[str, typer.Option(help="where the adapter does not say which it belongs to")] = "",
        load_in_4bit: InFourBit = None,
        overwrite: Annotated[bool, typer.Option("--overwrite", help="replace what is in OUTPUT")] = False,
    ) -> None:
        """Add the update to the base model's weights and write a model that transformers loads by itself."""
        if dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ConfigError(f"--dtype {dtype}: choices are auto, float32, bfloat16, float16")
        free_target(output, overwrite)
        with uncollected():
            from trivet.adapter.save import merge as write_merged
            from trivet.session import reopen

        session = reopen(adapter, base_model=base_model or None, dtype=dtype, load_in_4bit=load_in_4bit)
        _, proof = write_merged(session.model, output, session.probe(), tokenizer=session.tokenizer)
        typer.echo(f"wrote {output}; {proof}")
