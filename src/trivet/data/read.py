"""Files and hub data sets as raw rows, each with the place it came from.

Formats of files: .jsonl .json .csv .tsv .parquet .txt, and each of these gzipped (.gz). What the columns mean is
`detect`'s business.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from trivet.errors import ConfigError, DataError

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")

#: Longest line (and table cell), in characters: a longer one is no row, and an endless one would fill the memory.
LONGEST_LINE = 64 << 20
#: What a packed file may unpack to: so many times its size, or so many bytes. Text rarely packs to a fiftieth.
MOST_TIMES, LEAST_LIMIT = 200, 1 << 30
_MOST_ROWS = 100_000_000  # of a parquet file, where some bytes can stand for any number of rows

#: Columns that hold lists of objects themselves, so that one row of them is no wrapping of rows.
_LISTS = ("messages", "conversations", "tools", "prompt", "completion")


@dataclass(frozen=True)
class Row:
    """One raw row: column -> value, and where it stands ("train.jsonl:17")."""

    values: dict[str, Any]
    origin: str


@dataclass(frozen=True)
class BadRow:
    """A row that could not be read: where, and why not."""

    origin: str
    reason: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason}"


def read(source: str | Path, split: str = "train") -> Iterator[Row | BadRow]:
    """Rows of a local file, or of `split` of a hub data set ("owner/name", "owner/name:config").

    Raises `ConfigError` where there is no such file and `DataError` where a file cannot be read at all; single rows
    that are wrong come out as `BadRow`, so that the caller decides between refusing and skipping.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        raise ConfigError(f"data {source}: is a folder; name its files ({', '.join(SUFFIXES)})")
    if not path.exists():
        if _looks_like_file(str(source), path):
            raise ConfigError(f"data file {source}: no such file (looked in {path.absolute().parent})")
        yield from _hub(str(source), split)
        return
    if not path.is_file():
        raise ConfigError(f"data {source}: is no ordinary file; a pipe or device has to be saved to one first")
    kind = file_kind(path)
    try:
        yield from _READERS[kind](path)
    except UnicodeDecodeError as error:
        raise DataError(f"{_undecodable(path)} ({error.reason}); save the file as UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{source}: cannot be read as {kind[1:]}: {error}") from error


def file_kind(path: Path) -> str:
    """The suffix that tells how a file is written, `.gz` aside; `ConfigError` for one we can't read."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    if not suffixes or suffixes[-1] not in SUFFIXES:
        raise ConfigError(f"data file {path}: unknown kind of file; trivet reads {', '.join(SUFFIXES)} (also .gz)")
    return suffixes[-1]


def _looks_like_file(source: str, path: Path) -> bool:
    return path.is_absolute() or source.startswith((".", "~")) or path.suffix.lower() in (*SUFFIXES, ".gz")


class _Unpacked(io.RawIOBase):
    """A gzipped file, up to what it may unpack to."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, gzip.GzipFile(path)
        self.left = max(LEAST_LIMIT, MOST_TIMES * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self.file.read(len(buffer))
        self.left -= len(content)
        if self.left < 0:
            raise DataError(f"{self.path}: unpacks to more than {MOST_TIMES} times its size; unpack it and look at it")
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self.file.close()
        super().close()


def _bytes(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return io.BufferedReader(_Unpacked(path), 1 << 16)
    return path.open("rb")


def _open(path: Path) -> IO[str]:
    return io.TextIOWrapper(_bytes(path), encoding="utf-8-sig", newline="")


def _lines(path: Path, file: IO[str]) -> Iterator[str]:
    """The lines of a text, none of them endless."""
    number = 0
    while line := file.readline(LONGEST_LINE):
        number += 1
        if len(line) == LONGEST_LINE and line[-1] not in "\r\n":
            raise DataError(f"{path}:{number}: a line of more than {LONGEST_LINE:,} characters; a row is one line")
        yield line


def _undecodable(path: Path) -> str:
    """Where a file is not UTF-8: the decoder's own position counts from the start of its buffer."""
    with _bytes(path) as file, contextlib.suppress(OSError, EOFError, zlib.error):  # also damaged further on
        for number, line in enumerate(file, start=1):
            if number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
                return f"{path}:1: not UTF-8 text but UTF-16"
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return f"{path}:{number}: not UTF-8 text"
    return f"{path}: not UTF-8 text"


def _jsonl(path: Path) -> Iterator[Row | BadRow]:
    with _open(path) as file:
        for number, line in enumerate(_lines(path, file), start=1):
            if not line.strip():
                continue
            origin = f"{path}:{number}"
            try:
                value = json.loads(line.rstrip("\r\n"), object_pairs_hook=_once)
            except json.JSONDecodeError as error:
                yield BadRow(origin, _json_fault(error))
                continue
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, endless nesting
                yield BadRow(origin, f"not usable JSON: {error}")
                continue
            yield _object(value, origin)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; the second of two equal keys would win without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
        raise ValueError(f"key {twice[:60]!r} is given twice")
    return found


def _json(path: Path) -> Iterator[Row | BadRow]:
    with _open(path) as file:
        text = file.read()
    try:
        value = json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON lines under the name .json are common
            yield from _jsonl(path)
            return
        raise DataError(f"{path}:{error.lineno}: {_json_fault(error)}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not usable JSON: {error}") from error
    if isinstance(value, dict):
        lists = [
            v for k, v in value.items() if k not in _LISTS and isinstance(v, list) and v and isinstance(v[0], dict)
        ]
        value = lists[0] if len(lists) == 1 else [value]  # {"data": [...]} is a common wrapping
    if not isinstance(value, list):
        raise DataError(f"{path}:1: expected a list of rows, found {type(value).__name__}")
    for index, item in enumerate(value):
        yield _object(item, f"{path}:row {index + 1}")


def _json_fault(error: json.JSONDecodeError) -> str:
    return f"not valid JSON: {error.msg.removesuffix(' at')} at column {error.colno}"


def _object(value: Any, origin: str) -> Row | BadRow:
    if not isinstance(value, dict):
        return BadRow(origin, f"a row is a JSON object {{…}}, not {type(value).__name__}")
    return Row(value, origin)


def _table(delimiter: str) -> Callable[[Path], Iterator[Row | BadRow]]:
    def rows(path: Path) -> Iterator[Row | BadRow]:
        csv.field_size_limit(LONGEST_LINE)
        with _open(path) as file:
            reader = csv.DictReader(_lines(path, file), delimiter=delimiter, strict=True)
            try:
                names = reader.fieldnames or ()
                if twice := next((name for name in names if list(names).count(name) > 1), None):
                    raise DataError(f"{path}:1: two columns are called {twice[:60]!r}; give each its own name")
                for values in reader:
                    origin = f"{path}:{reader.line_num}"
                    if None in values:
                        yield BadRow(origin, f"more cells than the header's {len(reader.fieldnames or ())} columns")
                    elif None in values.values():
                        yield BadRow(origin, f"fewer cells than the header's {len(reader.fieldnames or ())} columns")
                    else:
                        yield Row(dict(values), origin)
            except csv.Error as error:
                # line_num is where the last good row ends, so this one starts on the next
                why = "a quote is never closed" if "unexpected end" in str(error) else error
                raise DataError(f"{path}:{reader.line_num + 1}: not a valid table: {why}") from error

    return rows


def _parquet(path: Path) -> Iterator[Row | BadRow]:
    import pyarrow
    import pyarrow.parquet

    with _bytes(path) as file:
        content = file.read()
    try:
        opened = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content))
        if opened.metadata.num_rows > _MOST_ROWS:
            raise DataError(f"{path}: says that it holds {opened.metadata.num_rows:,} rows, more than {_MOST_ROWS:,}")
        number = 0
        for batch in opened.iter_batches(batch_size=1000):
            for values in batch.to_pylist():
                number += 1
                yield Row(values, f"{path}:row {number}")
    except DataError:
        raise
    except (pyarrow.ArrowException, ValueError, OverflowError, LookupError, TypeError) as error:
        raise DataError(f"{path}: not a valid parquet file: {error}") from error


def _text(path: Path) -> Iterator[Row | BadRow]:
    with _open(path) as file:
        for number, line in enumerate(_lines(path, file), start=1):
            if "\0" in line:
                yield BadRow(f"{path}:{number}", "holds a NUL byte, so it is no text")
            elif line.strip():
                yield Row({"text": line.rstrip("\r\n")}, f"{path}:{number}")


_READERS: dict[str, Callable[[Path], Iterator[Row | BadRow]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _table(","),
    ".tsv": _table("\t"),
    ".parquet": _parquet,
    ".txt": _text,
}


def _hub(name: str, split: str) -> Iterator[Row | BadRow]:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    identifier, _, config = name.partition(":")
    try:
        table = datasets.load_dataset(identifier, config or None, split=split)
    except (
        datasets.exceptions.DatasetsError,
        HfHubHTTPError,
        HFValidationError,
        OSError,
        ValueError,
    ) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"data {name}: no local file of that name, and the hub data set (split {split}) cannot be loaded: "
            f"{reason}; `docstrings` needs no hub"
        ) from error
    for index, values in enumerate(table):
        yield Row({k: v for k, v in values.items() if v is not None}, f"{name}[{split}]:row {index + 1}")
