"""A short run of a tiny model, for tests of what happens in the middle of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from conftest import save_tiny, write_jsonl
from trivet.config import Config
from trivet.configio import load

SETTINGS: dict[str, Any] = {
    "model.dtype": "float32",
    "model.device": "cpu",
    "training.batch_size": 4,
    "training.learning_rate": 1e-2,
    "training.max_steps": 12,
    "training.eval_steps": 3,
    "training.keep_checkpoints": 9,
    "evaluation.generate": False,
    "evaluation.resamples": 10,
}

#: 22 rows for training, of different lengths, so that 12 steps of 4 rows go through them more than twice.
ROWS = [{"prompt": "the cat " * (1 + i % 7), "completion": "ran to the red house " * (1 + i % 5)} for i in range(24)]


def furnish(folder: Path) -> None:
    """A tiny model and its data."""
    save_tiny("gpt2", folder / "gpt2")
    write_jsonl(folder / "train.jsonl", ROWS)


def configured(place: Path, out: Path, **settings: Any) -> Config:
    """The run of a furnished folder into `out`."""
    values = {
        "model.name": str(place / "gpt2"),
        "data.train": str(place / "train.jsonl"),
        "data.validation": 0.1,
        "output_dir": str(out),
    }
    return load(values={**values, **SETTINGS, **settings})


def settings(model: Path, out: Path, **more: Any) -> dict[str, Any]:
    """The values of a run of two passes over rows that are handed over, without validation."""
    return {
        "model.name": str(model),
        "model.dtype": "float32",
        "model.device": "cpu",
        "data.validation": None,
        "training.batch_size": 4,
        "training.num_epochs": 2,
        "training.learning_rate": 1e-2,
        "evaluation.generate": False,
        "output_dir": str(out),
        **more,
    }


def losses(out: Path) -> list[float]:
    """The training loss of each step."""
    return [row["loss"] for row in logged(out) if "loss" in row]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def same(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(t, second[name]) for name, t in first.items())


def logged(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
