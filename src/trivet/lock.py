"""One run a folder: two that wrote into the same one would mix their checkpoints."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import portalocker

from trivet.errors import ConfigError

log = logging.getLogger("trivet")

NAME = ".lock"
#: Folders that this process holds. The system lets go of them when the process ends, also when it is killed.
_held: dict[Path, IO[str] | None] = {}


def hold(folder: Path) -> None:
    """Take hold of a folder until `let_go`. Raises `ConfigError` where another process holds it."""
    if held(folder):
        return
    file = _locked(folder)
    if file is not None:
        with contextlib.suppress(OSError):  # a full disk; the lock holds all the same
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
    _held[folder.resolve()] = file


def held(folder: Path) -> bool:
    """Whether this process holds the folder."""
    return folder.resolve() in _held


def check(folder: Path) -> None:
    """Raise `ConfigError` where another process holds the folder; changes nothing."""
    if (folder / NAME).exists() and not held(folder) and (file := _locked(folder)) is not None:
        file.close()


def _locked(folder: Path) -> IO[str] | None:
    """The locked file; None where the file system has no locks."""
    file = (folder / NAME).open("a+", encoding="utf-8")
    try:
        portalocker.lock(file, portalocker.LockFlags.EXCLUSIVE | portalocker.LockFlags.NON_BLOCKING)
    except portalocker.AlreadyLocked as error:
        with file, contextlib.suppress(OSError):  # Windows lets nobody read a locked file
            file.seek(0)
            who = file.read(200).strip()
        raise ConfigError(
            f"run {folder}: another run is writing there ({who or 'a process'}); wait until it has ended, stop it, or "
            "set another output_dir"
        ) from error
    except (portalocker.LockException, OSError) as error:
        file.close()
        log.warning("run %s: can't be locked here (%s); start no second run in it", folder, error)
        return None
    return file


def let_go() -> None:
    """Let go of all folders, and of those that are left empty."""
    while _held:
        folder, file = _held.popitem()
        with contextlib.suppress(OSError):
            (folder / NAME).unlink(missing_ok=True)
            if not any(folder.iterdir()):
                folder.rmdir()
        if file is not None:
            file.close()


@contextlib.contextmanager
def releasing() -> Iterator[None]:
    """Lets go of the folders that were taken hold of in it, however it ends."""
    try:
        yield
    finally:
        let_go()
