"""How a verb ends: what each kind of error becomes, and what the words of a command line mean."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from trivet import errors
from trivet.cli.app import split_arguments, verb


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (errors.TrivetError("the loss is nan"), 1, "error: the loss is nan\n"),
        (errors.ConfigError("no such key"), 2, "error: no such key\n"),
        (errors.RunExistsError("a run is there"), 2, "error: a run is there\n"),
        (errors.DataError("a.jsonl:3: no"), 1, "error: a.jsonl:3: no\n"),
        (errors.StorageError("the disk is full"), 1, "error: the disk is full\n"),
        (MemoryError(), 1, "error: out of memory; lower training.batch_size or data.max_length\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (ZeroDivisionError("by 0"), 1, "error: unexpected ZeroDivisionError: by 0\nThis is not an error we foresaw; "),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_what_an_error_becomes(error: BaseException, code: int, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    @verb
    def fail() -> None:
        raise error

    with pytest.raises(typer.Exit) as end:
        fail()
    assert end.value.exit_code == code
    assert capsys.readouterr().err.startswith(says)


def test_a_verb_that_ends_by_itself_is_left_alone() -> None:
    @verb
    def end() -> None:
        raise typer.Exit(3)

    with pytest.raises(typer.Exit) as ended:
        end()
    assert ended.value.exit_code == 3


@pytest.mark.skipif(sys.platform == "win32", reason="closes a pipe as POSIX does")
def test_a_reader_that_goes_away_is_no_error() -> None:
    """`trivet methods | head -1`, with a pipe whose reader is gone before a word is written."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "trivet", "methods"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writing)
    assert done.returncode == 1
    assert done.stderr == ""


def test_words_of_a_command_line() -> None:
    assert split_arguments(["c.yaml", "a=1", "b=c=d"]) == (Path("c.yaml"), ["a=1", "b=c=d"])
    assert split_arguments(["a=1", "c.yaml"]) == (Path("c.yaml"), ["a=1"])
    assert split_arguments(["a=1"]) == (None, ["a=1"])
    with pytest.raises(errors.ConfigError, match="one config file at most, not a.yaml and b.yaml"):
        split_arguments(["a.yaml", "b.yaml"])


@pytest.mark.parametrize(
    "kind",
    [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, Exception)],
    ids=lambda k: k.__name__,
)
def test_errors_say_what_they_were_told_and_no_more(kind: type[errors.TrivetError]) -> None:
    """OSError would add an errno, KeyError quotes."""
    assert str(kind("runs/a: 'no'")) == "runs/a: 'no'"
    assert str(kind()) == ""
    assert issubclass(kind, errors.TrivetError)


def test_what_the_libraries_below_say_is_said_once() -> None:
    """huggingface_hub and datasets print their own notes; the root logger, which prints trivet's, must not as well."""
    code = """
import logging, sys
from trivet.cli import main
sys.argv = ["trivet", "--version"]
try:
    main()
except SystemExit:
    pass
import datasets, huggingface_hub
for name in ("huggingface_hub.utils._http", "datasets.load", "trivet", "another"):
    logging.getLogger(name).warning("from " + name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    said = [line for line in done.stderr.splitlines() if line.startswith("from ")]
    assert said == [f"from {name}" for name in ("huggingface_hub.utils._http", "datasets.load", "trivet", "another")]
