"""A run folder as a report sees it: finished or not, of today or of an older trivet."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trivet.config import Config
from trivet.configio import load as load_config
from trivet.errors import TrivetError
from trivet.inspection import Inspection, inspect_adapter
from trivet.runfolder import RunFolder, run_folder

#: Metrics of which less is better; of all others more is.
LOWER_IS_BETTER = frozenset({"loss", "perplexity", "mse"})


@dataclass(frozen=True)
class Run:
    """What is known of a run.

    Attributes:
        steps: rows of log.jsonl that are training steps.
        validations: (step, loss) of validations that gave a number.
        result: result.json, or {} where the run is not finished.
        predictions: rows of predictions.jsonl.
        inspection: of the adapter; None where there is none yet, or where it can't be looked into (`problem` says why).
    """

    folder: RunFolder
    config: Config
    steps: list[dict[str, Any]]
    validations: list[tuple[int, float]]
    result: Mapping[str, Any]
    predictions: list[dict[str, Any]]
    inspection: Inspection | None
    problem: str = ""

    @property
    def name(self) -> str:
        return self.folder.path.resolve().name

    @property
    def finished(self) -> bool:
        return bool(self.result)

    @property
    def last_step(self) -> int:
        """The last step that was trained."""
        return int(self.result.get("steps") or (self.steps[-1]["step"] if self.steps else 0))

    @property
    def losses(self) -> list[tuple[int, float]]:
        """(step, training loss), numbers only."""
        return [(row["step"], row["loss"]) for row in self.steps if is_number(row.get("loss"))]

    @property
    def settings(self) -> dict[str, Any]:
        """How the last evaluation was done: the run's own settings, or `trivet evaluate`'s."""
        own = vars(self.config.evaluation)
        return {**own, **{k: v for k, v in (self.result.get("evaluated_on") or {}).items() if k in own}}


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def load_run(folder: str | Path) -> Run:
    """Read what a run has left so far.

    Raises:
        ConfigError: the folder is no run folder.
        AdapterError: result.json is damaged.
    """
    path = run_folder(Path(folder))
    log = _rows(path.log)
    inspection, problem = None, ""
    if (path.adapter / "adapter_config.json").is_file():
        try:
            inspection = inspect_adapter(path.adapter)
        except TrivetError as error:  # of a form that can't be looked into: the rest of the report stands
            problem = str(error)
    return Run(
        folder=path,
        config=load_config(path.config),
        steps=[row for row in log if "loss" in row],
        validations=[(row["step"], row["validation_loss"]) for row in log if is_number(row.get("validation_loss"))],
        result=path.read_result() if path.result.is_file() else {},
        predictions=_rows(path.predictions),
        inspection=inspection,
        problem=problem,
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; a line that a killed run left unfinished is passed over."""
    found = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                found.append(row)
    return found
