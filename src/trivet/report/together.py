"""What the page of several runs shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trivet.errors import ConfigError
from trivet.report import charts
from trivet.report.charts import Series
from trivet.report.figures import kept_path, metrics, parts, smooth_losses
from trivet.report.load import Run


def parts_together(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything that the page of several runs shows.

    Raises:
        ConfigError: there are fewer than two, or more than six.
    """
    if not 2 <= len(runs) <= 6:
        raise ConfigError(f"two to six runs can be compared, not {len(runs)}")
    names = _names(runs)
    own = [parts(run) for run in runs]
    colours = list(enumerate(zip(names, runs, strict=True), 1))
    train = [Series(name, smooth_losses(r), "line", i) for i, (name, r) in colours]
    held = [Series(name, r.validations, "dots", i) for i, (name, r) in colours]
    kept = [Series(name, kept_path(r), "steps", i) for i, (name, r) in colours if r.steps]
    return {
        "runs": list(zip(names, runs, own, strict=True)),
        "train": charts.line_chart(train, label="training loss", wide=520, high=260),
        "held": charts.line_chart(held, label="validation loss", wide=520, high=260),
        "kept": charts.line_chart(kept, label="numbers in the adapter", wide=520, zero=True),
        "differing": differing([r.config for r in runs]),
        "metrics": _side_by_side(runs),
        "same_rows": len({_measured_on(r) for r in runs if r.finished}) <= 1,
    }


def _names(runs: Sequence[Run]) -> list[str]:
    """The folders' names, with their parents' where two are alike."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.folder.path) for run in runs]
    return names


def differing(configs: Sequence[Any]) -> list[tuple[str, list[str]]]:
    """(key, each run's value) of every setting that is not the same in all, output_dir aside."""
    flat = []
    for config in configs:
        values: dict[str, Any] = {"method": config.method}
        for section in ("model", "data", "training", "evaluation"):
            values |= {f"{section}.{key}": value for key, value in vars(getattr(config, section)).items()}
        flat.append(values)
    return [
        (key, [_shown(values[key]) for values in flat])
        for key in flat[0]
        if any(values[key] != flat[0][key] for values in flat)
    ]


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


def _side_by_side(runs: Sequence[Run]) -> list[tuple[str, list[dict[str, Any]]]]:
    """A row for each metric that any run measured."""
    tables = [{row["name"]: row for row in metrics(run)} for run in runs]
    names = dict.fromkeys(name for table in tables for name in table)
    return [(name, [table.get(name, {}) for table in tables]) for name in names]


def _measured_on(run: Run) -> str:
    """What tells the rows of an evaluation from others."""
    on = run.result.get("evaluated_on") or {}
    prints = (run.result.get("data") or {}).get("fingerprints") or {}
    return str((on.get("split"), prints.get(on.get("split")) or on.get("source"), run.result.get("n")))
