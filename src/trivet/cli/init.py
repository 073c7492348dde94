"""`trivet init`: write a commented config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trivet.cli.app import verb
from trivet.errors import ConfigError


def register(app: typer.Typer) -> None:
    @app.command(epilog="Example: trivet init config.yaml --model demo --train data/train.jsonl")
    @verb
    def init(
        path: Annotated[Path, typer.Argument(help="file to write")] = Path("config.yaml"),
        model: Annotated[str, typer.Option(help="hub id, local folder, GGUF file, or demo")] = "demo",
        train: Annotated[str, typer.Option(help="training data: file, hub id, or docstrings")] = "docstrings",
        output_dir: Annotated[str, typer.Option(help="the run folder")] = "runs/first",
        force: Annotated[bool, typer.Option("--force", help="replace an existing file")] = False,
    ) -> None:
        """Write a config file with every key, its default and what it means."""
        from trivet.configio import template
        from trivet.runfolder import storage, write_text

        if path.exists() and not force:
            raise ConfigError(f"{path}: exists already; name another file, or replace it with --force")
        if path.is_dir():
            raise ConfigError(f"{path}: is a folder; name a file, for example {path / 'config.yaml'}")
        with storage(str(path)):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, template(model__name=model, data__train=train, output_dir=output_dir))
        typer.echo(f"wrote {path}; look at it, then: trivet validate {path} && trivet train {path}")
