"""The `trivet` command: its verbs, and how errors end it (1: the run failed, 2: bad config or usage)."""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from trivet import __version__, processes
from trivet.errors import ConfigError, TrivetError, masked

#: In the order in which `trivet --help` lists them; each is a file of this folder.
VERBS = (
    "init", "validate", "plan", "train", "sweep", "evaluate", "compare", "report", "inspect", "compress", "generate",
    "chat", "merge", "export", "verify", "methods",
)  # fmt: skip

app = typer.Typer(
    name="trivet",
    help="Parameter-efficient fine-tuning of language models: LoRA that finds its own rank.",
    epilog="Start with: trivet init config.yaml && trivet validate config.yaml && trivet train config.yaml",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class _State:
    debug = False


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """Errors as one clear line and an exit code; the traceback only with --debug.

    The folder of a verb's `adapter` is looked for first: what the verb imports takes seconds.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            if "adapter" in kwargs:
                from trivet.runfolder import adapter_folder

                adapter_folder(kwargs["adapter"])
            function(*args, **kwargs)
        except (typer.Exit, BrokenPipeError):  # Click ends quietly where the reader of a pipe is gone
            raise
        except KeyboardInterrupt:
            _fail("interrupted", 130)
        except TrivetError as error:
            _fail(str(error), error.exit_code, error)
        except MemoryError as error:
            _fail("out of memory; lower training.batch_size or data.max_length", 1, error)
        except Exception as error:  # noqa: BLE001 - the last stop before the person
            what = f"{type(error).__name__}: {error}"
            _fail(f"unexpected {what}\nThis is not an error we foresaw; --debug shows where it comes from", 1, error)

    return run


def _fail(message: str, code: int, error: BaseException | None = None) -> None:
    if _State.debug and error is not None:
        raise error
    processes.say_once(lambda: typer.echo(f"error: {masked(message)}", err=True))
    raise typer.Exit(code)


def split_arguments(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """(config file or None, key=value overrides) from the words of a command line."""
    files = [a for a in arguments if "=" not in a]
    if len(files) > 1:
        raise ConfigError(f"one config file at most, not {' and '.join(files)}; overrides are written key=value")
    return (Path(files[0]) if files else None), [a for a in arguments if "=" in a]


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Parameter-efficient fine-tuning of language models: LoRA that finds its own rank."""
    if version:
        typer.echo(f"trivet {__version__}")
        raise typer.Exit


def build() -> typer.Typer:
    """The command with all its verbs."""
    if not app.registered_commands:
        for name in VERBS:
            import_module(f"trivet.cli.{name}").register(app)
    return app


def main() -> None:
    """Entry point of the console script."""
    _State.debug = "--debug" in sys.argv
    if _State.debug:
        sys.argv.remove("--debug")
    else:  # what the libraries below say to their own developers
        warnings.filterwarnings("ignore", category=FutureWarning)
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("trivet").setLevel(logging.INFO)
    for name in ("huggingface_hub", "datasets"):  # they have handlers of their own, and would say everything twice
        logging.getLogger(name).propagate = False
    build()()
