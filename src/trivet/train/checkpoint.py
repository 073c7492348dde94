"""Checkpoints: which one to resume from, and whether it is whole."""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Sequence
from pathlib import Path

from trivet.errors import AdapterError

log = logging.getLogger("trivet")

#: What `transformers.Trainer` writes for a PEFT model, and resuming needs.
_NEEDED = ("trainer_state.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt")


def newest_checkpoint(folder: Path, also: Sequence[str] = ()) -> Path | None:
    """The newest whole checkpoint in `folder`; damaged ones are named in the log and passed over.

    `also` names further files that it must hold.
    """
    found = [p for p in folder.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()]
    for path in sorted(found, key=lambda p: -int(p.name.rpartition("-")[2])):
        problem = damage(path, also)
        if problem is None:
            return path
        log.warning("checkpoint %s is damaged (%s): passed over", path, problem)
    return None


def damage(path: Path, also: Sequence[str] = ()) -> str | None:
    """What is wrong with a checkpoint, or None."""
    from safetensors import SafetensorError, safe_open

    for name in (*_NEEDED, *also):
        if not (path / name).is_file() or not (path / name).stat().st_size:
            return f"{name} is missing or empty"
    if not any(path.glob("rng_state*.pth")):  # one for each process
        return "rng_state.pth is missing"
    try:
        json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        for file in path.glob("*.safetensors"):
            with safe_open(file, framework="np") as tensors:
                tensors.keys()
        for archive in (*path.glob("*.pt"), *path.glob("*.pth")):
            if not zipfile.is_zipfile(archive):  # a zip's directory stands at its end
                return f"{archive.name} is cut short"
    except (ValueError, SafetensorError, OSError) as error:
        return str(error)
    return None


def step_of(path: Path) -> int:
    """The optimizer step that a checkpoint was written after."""
    try:
        return int(json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, KeyError) as error:
        raise AdapterError(f"checkpoint {path}: trainer_state.json can't be read: {error}") from error


def processes_of(path: Path) -> int:
    """How many processes wrote a checkpoint: each leaves its random state."""
    return len(list(path.glob("rng_state*.pth")))
