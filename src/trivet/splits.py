"""Which rows a run trains on, validates on and is tested on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trivet.config import Config
from trivet.data.dataset import DOCSTRINGS, Dataset, load_dataset
from trivet.errors import ConfigError
from trivet.methods import find_method


@dataclass(frozen=True)
class Splits:
    """The rows of a run. `test` is touched once, after training."""

    train: Dataset
    validation: Dataset | None
    test: Dataset | None

    def fingerprints(self) -> dict[str, str]:
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: part.fingerprint for name, part in parts.items() if part is not None}


def load_splits(config: Config, train: Any = None, validation: Any = None, test: Any = None) -> Splits:
    """The data that `config` names, or the given data sets in its place; the same seed gives the same splits.

    Needs no torch, so that what is wrong with the data is said at once.

    Raises:
        DataError: a file or a row is not what it should be.
        ConfigError: no training rows are named, or a setting needs validation rows and there are none.
    """
    data, seed = config.data, config.training.seed
    source = data.train if train is None else train
    if source is None:
        raise ConfigError("data.train is not set: a file, a hub data set, or `docstrings` to try trivet out")
    options: dict[str, Any] = {"columns": data.columns, "on_bad_row": data.on_bad_row}
    rows = load_dataset(source, format=data.format, **options)
    if rows.format == "regression" and config.model.task == "classification":
        rows = load_dataset(source, format="classification", **options)
    # Other files follow train's format where it could be told apart by values only (labels 1, 2 or 1.5).
    later = rows.format if rows.format in ("classification", "regression") else "auto"

    held = validation if validation is not None else data.validation
    held_rows: Dataset | None = None
    if held == "auto" and source == DOCSTRINGS:
        held_rows = load_dataset(DOCSTRINGS, split="validation")
    elif held == "auto":
        n = min(max(len(rows) // 20, 1), 500)
        if len(rows) >= 20:
            rows, held_rows = rows.split(n, seed)
    elif isinstance(held, (int, float)) and not isinstance(held, bool):
        if not 0 < held < 1:
            raise ConfigError(
                f"data.validation {held:g}: a share of train is above 0 and below 1; or give a file, or null"
            )
        n = round(len(rows) * held)
        if not 0 < n < len(rows):
            raise ConfigError(f"data.validation {held:g}: of {len(rows)} rows that leaves nothing to one side")
        rows, held_rows = rows.split(n, seed)
    elif held is not None:
        held_rows = load_dataset(held, split="validation", format=later, **options)

    if held_rows is None and config.training.early_stopping_patience is not None:
        raise ConfigError("training.early_stopping_patience needs validation rows; set data.validation")
    if held_rows is None and find_method(config.method).part("rank").validates:
        raise ConfigError("method: rank auto chooses on validation rows; set data.validation, or use rank squeeze")

    tested = test if test is not None else data.test
    test_rows = None if tested is None else load_dataset(tested, split="test", format=later, **options)
    if test_rows is None and source == DOCSTRINGS:
        test_rows = load_dataset(DOCSTRINGS, split="test").shuffled(seed)
    if data.max_train_rows is not None:
        rows = rows.shuffled(seed).take(data.max_train_rows)
    return Splits(
        rows,
        held_rows.take(data.max_validation_rows) if held_rows is not None else None,
        test_rows.take(data.max_test_rows) if test_rows is not None else None,
    )
