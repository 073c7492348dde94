"""Checkpoints: written so that a half one is never taken for a whole one, and which one to resume from.

A checkpoint is filled under a hidden name, gets the SHA-256 of all its files, is flushed to the disk, and only then
takes its name. Whatever moment a process dies at, the newest folder whose files have their sums is a state of the run.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trivet.errors import AdapterError
from trivet.runfolder import sha256, write_json

log = logging.getLogger("trivet")

#: The sums of a checkpoint's files, and what resuming must know of the run that wrote it.
MANIFEST = "manifest.json"
#: `training_args.bin` is transformers' pickle of its settings, which nothing reads.
_UNWANTED = ("training_args.bin",)


def unfinished(folder: Path) -> Path:
    """The hidden name that the checkpoint `folder` is filled under."""
    return folder.with_name(f".{folder.name}")


def start(temporary: Path) -> None:
    """An empty folder to fill."""
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def finish(temporary: Path, folder: Path, notes: Mapping[str, Any]) -> None:
    """Add sums and `notes`, flush everything to the disk, and give it its name; what was there before is replaced."""
    for name in _UNWANTED:
        (temporary / name).unlink(missing_ok=True)
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    sums = {path.relative_to(temporary).as_posix(): sha256(path) for path in files}
    write_json(temporary / MANIFEST, {"files": sums, "run": dict(notes)})
    for path in (*temporary.rglob("*"), temporary):
        _flush(path)
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.replace(old)
    temporary.replace(folder)
    _flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rotate(folder: Path, keep: int, best: int | None) -> None:
    """Remove the oldest checkpoints over `keep`; the newest and that of step `best` always stay."""
    found = _checkpoints(folder)
    spared = {path for path in found if path == found[0] or step_of(path) == best}
    surplus = len(found) - max(keep, len(spared))
    for path in [path for path in reversed(found) if path not in spared][: max(surplus, 0)]:
        hidden = path.with_name(f".{path.name}.old")  # one that is half removed must not look damaged
        path.replace(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def tidy(folder: Path) -> None:
    """Remove what a process that died while it wrote or removed a checkpoint has left."""
    for path in folder.glob(".checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`; damaged ones are named in the log and passed over."""
    for path in _checkpoints(folder):
        problem = damage(path)
        if problem is None:
            return path
        log.warning("checkpoint %s is damaged (%s): passed over", path, problem)
    return None


def _checkpoints(folder: Path) -> list[Path]:
    """Those in `folder`, the newest first, by their steps: clocks may be wrong."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The optimizer step that a checkpoint was written after."""
    return int(path.name.rpartition("-")[2])


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        for name, expected in _manifest(path)["files"].items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if sha256(path / name) != expected:
                return f"{name} is not what was written"
    except (AdapterError, OSError) as error:
        return str(error)
    return None


def notes_of(path: Path) -> dict[str, Any]:
    """What `finish` was given with a checkpoint."""
    return dict(_manifest(path)["run"])


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if not isinstance(manifest["files"], dict) or not isinstance(manifest["run"], dict):
            raise TypeError("not a manifest")
    except FileNotFoundError as error:
        raise AdapterError(f"{MANIFEST} is missing") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{MANIFEST} can't be read: {error}") from error
    return dict(manifest)


def processes_of(path: Path) -> int:
    """How many processes wrote a checkpoint: each leaves its random state."""
    return len(list(path.glob("rng_state*.pth")))
