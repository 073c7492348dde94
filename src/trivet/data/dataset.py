"""`Dataset`: rows of one format, from files, the hub or Python, with a fingerprint and deterministic splits."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from trivet.data.detect import Example, detect, parse
from trivet.data.read import BadRow, Row, read
from trivet.errors import ConfigError, DataError

#: The built-in data set: functions of the installed Python packages and their docstrings.
DOCSTRINGS = "docstrings"


@dataclass(frozen=True)
class Dataset:
    """Checked rows of one format. Immutable; `split` and `take` give new ones."""

    examples: Sequence[Example]
    format: str
    source: str
    skipped: Sequence[BadRow] = field(default=())

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    @property
    def fingerprint(self) -> str:
        """SHA-256 (first 16 hex digits) of the rows' contents in order; where they came from does not count."""
        digest = hashlib.sha256(self.format.encode())
        for example in self.examples:
            row = asdict(replace(example, origin=""))
            digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode())
        return digest.hexdigest()[:16]

    def take(self, n: int | None) -> Dataset:
        """The first `n` rows (all of them for None)."""
        return self if n is None or n >= len(self) else replace(self, examples=list(self.examples[:n]))

    def shuffled(self, seed: int) -> Dataset:
        """The rows in an order that depends on `seed` and the number of rows only."""
        order = list(range(len(self)))
        random.Random(seed).shuffle(order)  # noqa: S311 - not cryptography
        return replace(self, examples=[self.examples[i] for i in order])

    def split(self, n: int, seed: int) -> tuple[Dataset, Dataset]:
        """(the rest, `n` rows chosen by `seed`), each in the original order."""
        chosen = set(random.Random(seed).sample(range(len(self)), n))  # noqa: S311
        rest = [e for i, e in enumerate(self.examples) if i not in chosen]
        return replace(self, examples=rest), replace(self, examples=[self.examples[i] for i in sorted(chosen)])


def load_dataset(
    source: Any,
    *,
    split: str = "train",
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    on_bad_row: str = "refuse",
) -> Dataset:
    """Read rows and check them.

    Args:
        source: a file or a list of files (.jsonl .json .csv .tsv .parquet .txt, also .gz), a hub data set id,
            `"docstrings"` (rows made from the Python packages installed here), a list of dicts, a `datasets.Dataset`,
            or a `Dataset` (returned as it is).
        split: which split of a hub data set or of `docstrings` to read: train, validation or test.
        format: see `trivet.config.FORMATS`; `auto` detects it from the columns.
        columns: your column for each of ours where names differ, e.g. `{"prompt": "question"}`.
        on_bad_row: `refuse` raises at the first row that is wrong, `skip` leaves it out and counts it.

    Raises:
        ConfigError: there is no such file or hub data set.
        DataError: a row is wrong (file:line and reason), no format fits, or no row is left.
    """
    if isinstance(source, Dataset):
        return source
    name = _name(source)
    good: list[Row] = []
    bad: list[BadRow] = []
    for row in _rows(source, split):
        if isinstance(row, BadRow):
            _refuse_or_keep(row, bad, on_bad_row)
        else:
            renamed = _rename(row, columns or {})
            if isinstance(renamed, BadRow):
                _refuse_or_keep(renamed, bad, on_bad_row)
            else:
                good.append(renamed)
    if not good:
        raise DataError(
            f"{name}: no rows" + (f" (skipped {len(bad)}, the first: {bad[0]})" if bad else "; the file is empty")
        )
    fmt = detect((row.values for row in good), name) if format == "auto" else format
    examples = []
    for row in good:
        parsed = parse(row.values, fmt, row.origin)
        if isinstance(parsed, str):
            _refuse_or_keep(BadRow(row.origin, parsed), bad, on_bad_row)
        else:
            examples.append(parsed)
    if not examples:
        raise DataError(f"{name}: no usable row of format {fmt}; skipped {len(bad)}, the first: {bad[0]}")
    return Dataset(examples, fmt, name, tuple(bad))


def _refuse_or_keep(bad: BadRow, skipped: list[BadRow], on_bad_row: str) -> None:
    if on_bad_row == "refuse":
        raise DataError(f"{bad}. Mend the row, or leave such rows out with data.on_bad_row: skip")
    skipped.append(bad)


def _name(source: Any) -> str:
    if isinstance(source, (str, Path)):
        return str(source)
    if isinstance(source, (list, tuple)) and source and all(isinstance(s, (str, Path)) for s in source):
        return ", ".join(map(str, source))
    return f"{type(source).__name__} of rows"


def _rows(source: Any, split: str) -> Iterable[Row | BadRow]:
    if isinstance(source, str) and source == DOCSTRINGS and not Path(DOCSTRINGS).exists():
        from trivet.data.docstrings import parts

        return [Row({k: row[k] for k in ("prompt", "completion")}, row["function"]) for row in parts()[split]]
    if isinstance(source, (str, Path)):
        return read(source, split)
    if isinstance(source, (list, tuple)) and source and all(isinstance(s, (str, Path)) for s in source):
        return (row for part in source for row in read(part, split))
    if isinstance(source, Mapping):  # a DatasetDict
        if split not in source:
            raise ConfigError(f"the data set has no split `{split}`; it has {', '.join(map(str, source))}")
        source = source[split]
    if not hasattr(source, "__iter__"):
        raise ConfigError(f"a data set is a path, a hub id or rows, not {type(source).__name__}")
    return [_python_row(values, index) for index, values in enumerate(source)]


def _python_row(values: Any, index: int) -> Row | BadRow:
    if not isinstance(values, Mapping):
        return BadRow(f"row {index + 1}", f"a row is a dict of columns, not {type(values).__name__}")
    return Row(dict(values), f"row {index + 1}")


def _rename(row: Row, columns: Mapping[str, str]) -> Row | BadRow:
    values = dict(row.values)
    for ours, theirs in columns.items():
        if theirs not in row.values:
            has = ", ".join(map(str, row.values))[:300]
            return BadRow(row.origin, f"data.columns maps `{ours}` to `{theirs}`, but the row has {has}")
        values[ours] = row.values[theirs]
    return Row({k: v for k, v in values.items() if k in columns or k not in columns.values()}, row.origin)
