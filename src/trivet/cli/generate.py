"""`trivet generate`: answers to prompts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from trivet.cli.app import verb
from trivet.errors import ConfigError
from trivet.garbage import uncollected


def register(app: typer.Typer) -> None:
    @app.command(epilog="Example: trivet generate runs/first --prompt 'name : The Vaults | Type : pub'")
    @verb
    def generate(
        adapter: Annotated[Path, typer.Argument(help="run folder or adapter folder")],
        prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="may be given several times")] = None,
        system: Annotated[str, typer.Option(help="system message, for chat models")] = "",
        max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer, in tokens")] = 128,
        temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy")] = 0.0,
        top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="sample from so much probability")] = 1.0,
        base: Annotated[bool, typer.Option("--base", help="answer with the base model, for comparison")] = False,
        base_model: Annotated[str, typer.Option(help="where the adapter does not say which it belongs to")] = "",
    ) -> None:
        """Answer each --prompt, or each line of standard input; a classifier prints the class."""
        prompts = list(prompt or [])
        if not prompts and not sys.stdin.isatty():
            prompts = [line.rstrip("\n") for line in sys.stdin if line.strip()]
        if not prompts:
            raise ConfigError("nothing to answer: give --prompt, or lines on standard input")
        with uncollected():
            from trivet.api import LoRAModel
            from trivet.session import LABELLED

        model = LoRAModel.load(adapter, base_model=base_model or None)
        if model.session.base.task in LABELLED:
            answers = [str(answer) for answer in model.predict(prompts)]
        else:
            answers = model.generate(
                prompts,
                system=system,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                adapter=not base,
            )
        for answer in answers:
            typer.echo(answer)
