"""A working folder to do wrong things in, and the command line in this process; process.py has it in one of its own."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from trivet.cli.app import main

#: Lines 1 to 16. `{model}` is a tiny GPT-2; runs of it take about a second after the imports.
CONFIG = """\
model:
  name: {model}
  lora_rank: 2
  dtype: float32
data:
  train: train.jsonl
training:
  max_steps: 4
  batch_size: 4
  eval_steps: 2
evaluation:
  max_new_tokens: 4
  max_generate_rows: 2
  resamples: 10
output_dir: runs/a
"""


@dataclass
class World:
    """A working folder with a valid config, its data, and models and a trained run to point at."""

    cwd: Path
    tiny: Callable[[str], Path]
    run: Path  # a finished run of CONFIG; copy it before damaging it

    def config(self, old: str = "", new: str = "") -> None:
        """config.yaml, with one part of it replaced."""
        text = CONFIG.format(model=self.tiny("gpt2"))
        assert old in text
        self.write("config.yaml", text.replace(old, new, 1) if old else text)

    def write(self, name: str, text: str) -> None:
        (self.cwd / name).write_text(text, encoding="utf-8")

    def adapter(self) -> Path:
        """A copy of the trained adapter as adapter/."""
        return Path(shutil.copytree(self.run / "adapter", self.cwd / "adapter"))

    def copy_model(self, kind: str) -> Path:
        """A copy of a tiny model as model/, and a config that uses it."""
        self.config(str(self.tiny("gpt2")), "model")
        return Path(shutil.copytree(self.tiny(kind), self.cwd / "model"))

    def state(self) -> dict[str, str]:
        """Every file and folder in the working folder, with what is in it."""
        return {
            str(path.relative_to(self.cwd)): "" if not path.is_file() else hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(self.cwd.rglob("*"))
        }


def here(cwd: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of `trivet` in this process."""
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", ["trivet", *arguments])
    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        with pytest.raises(SystemExit) as end:
            main()
    return int(end.value.code or 0)


def check(code: int, stderr: str, expected_code: int, says: tuple[str, ...]) -> None:
    """The promise that every refusal keeps."""
    assert code == expected_code, stderr
    assert stderr.lower().count("error: ") == 1, stderr
    message = stderr[stderr.lower().index("error: ") :]
    for part in says:
        assert part in message, f"{part!r} is not in {message!r}"
    assert "Traceback" not in stderr
    assert "unexpected" not in message


@dataclass(frozen=True)
class Case:
    """A command line (RUN is a finished run, LLAMA another model), what is wrong around it, and the answer."""

    name: str
    command: str
    code: int
    says: tuple[str, ...]
    arrange: Callable[[World], object] = lambda world: None
    process: bool = False  # as a process of its own, not in this one


def damage(name: str, keep: int) -> Callable[[World], object]:
    """Cut a file of the adapter after `keep` bytes."""

    def arrange(world: World) -> None:
        path = world.adapter() / name
        path.write_bytes(path.read_bytes()[:keep])

    return arrange


def rows(*lines: str, file: str = "train.jsonl") -> Callable[[World], object]:
    return lambda world: world.write(file, "".join(line + "\n" for line in lines))


def labelled(labels: list[Any]) -> list[str]:
    return [json.dumps({"text": f"the number {i}", "label": label}) for i, label in enumerate(labels)]


def both(*arrange: Callable[[World], object]) -> Callable[[World], object]:
    return lambda world: [step(world) for step in arrange]


def change(old: str, new: str) -> Callable[[World], object]:
    return lambda world: world.config(old, new)
