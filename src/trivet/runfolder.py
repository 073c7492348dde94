"""The run folder: where things are, what may be replaced, and writing that leaves nothing half-done."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from trivet import lock
from trivet.errors import AdapterError, ConfigError, RunExistsError, StorageError


@dataclass(frozen=True)
class RunFolder:
    """Everything a run writes is in `path`."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def log(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def predictions(self) -> Path:
        return self.path / "predictions.jsonl"

    @property
    def rank_map(self) -> Path:
        return self.path / "ranks.png"

    @property
    def rank_path(self) -> Path:
        return self.path / "rank_path.png"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def check_free(self, *, resume: bool, overwrite: bool) -> None:
        """Refuse to touch what is there, unless asked to; looks only, changes nothing.

        Raises:
            RunExistsError: a run is there and neither flag was given.
            ConfigError: the folder holds something that is no run, can't be written, or there is nothing to resume.
        """
        if resume and overwrite:
            raise ConfigError("--resume goes on with a run and --overwrite begins it anew; give one of them")
        nearest = next(p for p in (self.path.absolute(), *self.path.absolute().parents) if p.exists())
        if not nearest.is_dir():
            raise ConfigError(f"output_dir {self.path}: {nearest} is a file; name a folder")
        if self.path.resolve() in (Path.cwd(), *Path.cwd().parents):
            raise ConfigError(f"output_dir {self.path}: is the working folder or holds it; name a folder inside")
        there = self.path.is_dir() and any(self.path.iterdir())
        if there and os.access(self.path, os.W_OK):
            lock.check(self.path)
            there = any(p.name != lock.NAME for p in self.path.iterdir())
        if there and not self.config.exists():
            raise ConfigError(f"output_dir {self.path}: holds files but no run; name another folder")
        if resume and not there:
            raise ConfigError(f"output_dir {self.path}: there is no run to resume; leave out --resume to start one")
        if resume and self.log.is_symlink():
            raise ConfigError(
                f"run {self.path}: {self.log.name} is a link, which would be written through; put a file there"
            )
        if resume and self.result.exists():
            raise ConfigError(f"run {self.path}: is already finished; --overwrite trains it anew")
        if there and not (resume or overwrite):
            state = "a finished run" if self.result.exists() else "an unfinished run"
            raise RunExistsError(
                f"output_dir {self.path}: holds {state}. Set another output_dir, or add --overwrite to replace it"
                + ("" if self.result.exists() else " or --resume to go on with it")
            )
        if not os.access(nearest, os.W_OK):
            raise ConfigError(f"output_dir {self.path}: {nearest} can't be written to; set another output_dir")

    def clear(self) -> None:
        """Remove what a run writes, and nothing that somebody put beside it or another process writes."""
        if not lock.held(self.path):
            return
        self._tidy()
        for folder in (self.adapter, self.checkpoints):
            if folder.exists():
                shutil.rmtree(folder)
        for file in self._files():
            file.unlink(missing_ok=True)
        if self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()

    def _files(self) -> tuple[Path, ...]:
        return (self.config, self.log, self.result, self.predictions, self.rank_map, self.rank_path, self.report)

    def _tidy(self) -> None:
        """Remove what a process that died while it wrote has left: `write_text`'s files, and `new_folder`'s."""
        for path in (each for made in (self.adapter, *self._files()) for each in self.path.glob(f".{made.name}.*")):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def begin(self, config_text: str, *, resume: bool) -> None:
        """Make the folder with its config.yaml; an earlier run in it is removed unless it is resumed.

        Raises `ConfigError` where another process writes there; `lock.releasing` ends the hold that is taken here.
        """
        with storage(f"run folder {self.path}"):
            self.path.mkdir(parents=True, exist_ok=True)
            lock.hold(self.path)
            if resume:
                self._tidy()
            else:
                self.clear()
            write_text(self.config, config_text)

    def read_result(self) -> dict[str, Any]:
        """result.json; `AdapterError` where it is missing or no JSON."""
        try:
            result = json.loads(self.result.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise AdapterError(f"{self.result}: can't be read: {error}") from error
        if not isinstance(result, dict):
            raise AdapterError(f"{self.result}: can't be read: it is no JSON object")
        return result


def adapter_folder(folder: Path) -> Path:
    """The adapter inside a run folder, or the folder itself.

    Raises:
        ConfigError: there is no such folder.
        AdapterError: it is a run's that did not finish.
    """
    run = RunFolder(folder)
    if not folder.is_dir():
        raise ConfigError(f"adapter {folder}: no such folder")
    if run.config.exists() and not run.adapter.is_dir():
        raise AdapterError(
            f"run {folder}: has no adapter yet: it did not finish; `trivet train --resume` goes on with it"
        )
    return run.adapter if run.adapter.is_dir() else folder


def run_folder(folder: Path) -> RunFolder:
    """A run's folder, finished or not. Raises `ConfigError` where it is none."""
    run = RunFolder(folder)
    if not run.config.is_file():
        raise ConfigError(f"run {folder}: {'has no config.yaml' if folder.is_dir() else 'no such folder'}")
    return run


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def storage(what: str) -> Iterator[None]:
    """File errors as one message that says what to do."""
    try:
        yield
    except StorageError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        known = _file_error(error)
        if known is None:
            raise
        full = known.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "the disk or quota is full; free some space" if full else "check the folder's permissions"
        raise StorageError(f"{what}: can't be written: {known.strerror or known}; {advice}") from error


def _file_error(error: Exception) -> OSError | None:
    """The file error behind what safetensors and torch raise in its place; None for any other error."""
    if isinstance(error, OSError):
        return error
    if found := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors
        return OSError(int(found[1]), os.strerror(int(found[1])))
    if re.search(r"iostream error|inline_container", str(error)):  # torch: it does not say why a write was cut short
        return OSError(errno.ENOSPC, "a file was cut short")
    return None


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: a reader sees the old text or the new one, never a part."""
    if path.exists() and not path.is_file():  # a device would be replaced by a file, where one may do that
        raise StorageError(f"{path}: is no ordinary file; name another")
    with storage(str(path)):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    """Indented JSON with a final newline; NaN and infinity are refused rather than written."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def new_folder(path: Path, what: str) -> Iterator[Path]:
    """A temporary sibling to fill, put in place of `path` when the block ends well, and removed when it does not."""
    with storage(f"{what} {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            yield temporary
            for made in (temporary, *temporary.rglob("*")):  # temporary folders and safetensors are for the owner only
                made.chmod(0o755 if made.is_dir() else 0o644)
            if path.exists():
                shutil.rmtree(path)
            temporary.replace(path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
