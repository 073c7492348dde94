"""`trivet chat`: a conversation with the tuned model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from trivet.cli.app import verb
from trivet.errors import ModelError
from trivet.garbage import uncollected


def register(app: typer.Typer) -> None:
    @app.command(epilog="Example: trivet chat runs/first --temperature 0.7")
    @verb
    def chat(
        adapter: Annotated[Path, typer.Argument(help="run folder or adapter folder")],
        system: Annotated[str, typer.Option(help="system message")] = "",
        max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer, in tokens")] = 256,
        temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy")] = 0.0,
        base_model: Annotated[str, typer.Option(help="where the adapter does not say which it belongs to")] = "",
    ) -> None:
        """Talk with the model. An empty line or Ctrl-D ends, /reset starts anew."""
        with uncollected():
            from trivet.data.detect import Example
            from trivet.data.encode import TextEncoder
            from trivet.evaluate.generate import generate
            from trivet.session import reopen

        session = reopen(adapter, base_model=base_model or None)
        encoder = session.encoder
        if not isinstance(encoder, TextEncoder) or session.base.task != "causal-lm":
            raise ModelError(f"chat needs a causal language model, and {adapter} is for {session.base.task}")
        start: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        turns = list(start)
        while True:
            try:
                said = typer.prompt("you", default="", show_default=False)
            except typer.Abort:
                typer.echo()
                return
            if not said.strip():
                return
            if said.strip() == "/reset":
                turns = list(start)
                continue
            turns.append({"role": "user", "content": said})
            # `prompt_ids` asks for what precedes the last assistant turn.
            row = Example(messages=(*turns, {"role": "assistant", "content": ""}))
            answer = generate(
                session.model,
                session.tokenizer,
                [encoder.prompt_ids(row, max_new_tokens)],
                stop_ids=encoder.stop_ids(),
                max_new_tokens=max_new_tokens,
                temperature=temperature,
            )[0]
            typer.echo(f"model: {answer}")
            turns.append({"role": "assistant", "content": answer})
