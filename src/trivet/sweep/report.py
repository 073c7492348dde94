"""What came out of a sweep: means over seeds, compared in pairs, as JSON and as tables."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from trivet.runfolder import RunFolder
from trivet.sweep.plan import Run


@dataclass(frozen=True)
class Mean:
    """A mean over seeds with its 95% t-interval, None of a single one."""

    mean: float
    interval: tuple[float, float] | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        if len(values) < 2:
            return cls(values[0], None)
        from scipy.stats import t

        half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
        return cls(fmean(values), (fmean(values) - half, fmean(values) + half))

    def text(self, form: str) -> str:
        """For a table, each number in `form` (".4f")."""
        ends = "" if self.interval is None else " [{}, {}]".format(*(format(end, form) for end in self.interval))
        return f"{self.mean:{form}}{ends}"


def loss_of(run: Run) -> float:
    """The best validation loss of a finished run; infinite where it gave no number."""
    loss = run.folder.read_result()["best_validation_loss"]
    return math.inf if loss is None else float(loss)


def summarise(runs: Sequence[Run], failed: dict[Run, str]) -> dict[str, Any]:
    """What sweep.json holds: the runs by setting, means over seeds, and which setting is chosen."""
    settings: list[dict[str, Any]] = []
    for name in dict.fromkeys(run.setting for run in runs):
        mine = [run for run in runs if run.setting == name]
        losses = {run.seed: loss_of(run) for run in mine if run.folder.result.exists()}
        whole = len(losses) == len(mine) and all(map(math.isfinite, losses.values()))
        settings.append(
            {
                "setting": name,
                "validation_loss": dataclasses.asdict(Mean.of(list(losses.values()))) if whole else None,
                "runs": [_entry(run, failed.get(run)) for run in mine],
            }
        )
    ranked = sorted((s for s in settings if s["validation_loss"]), key=lambda s: s["validation_loss"]["mean"])
    for setting in ranked[1:]:  # seeds give the same splits and order to every setting, so they are compared in pairs
        pairs = zip(setting["runs"], ranked[0]["runs"], strict=True)
        above = Mean.of([mine["validation_loss"] - best["validation_loss"] for mine, best in pairs])
        setting["above_chosen"] = dataclasses.asdict(above)
    return {
        "chosen": ranked[0]["setting"] if ranked else None,
        "evaluated_on": _measured(ranked[0]["runs"][0])["evaluated_on"] if ranked else None,
        "metrics": _metrics(ranked[0]["runs"]) if ranked else {},
        "settings": settings,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
    }


def _entry(run: Run, problem: str | None) -> dict[str, Any]:
    entry: dict[str, Any] = {"seed": run.seed, "folder": str(run.folder.path)}
    if run.folder.result.exists():
        result = run.folder.read_result()
        loss = {"validation_loss": result["best_validation_loss"], "best_step": result["best_step"]}
        return {**entry, **loss, "wall_seconds": result["wall_seconds"]}
    return {**entry, "failed": problem}


def _measured(entry: dict[str, Any]) -> dict[str, Any]:
    return RunFolder(Path(entry["folder"])).read_result()


def _metrics(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over the chosen setting's seeds of base's and tuned's figures; nothing else reads those of test rows."""
    results = [_measured(entry)["metrics"] for entry in entries]
    return {
        name: {side: dataclasses.asdict(Mean.of([r[side][name] for r in results])) for side in ("base", "tuned")}
        for name in results[0]["tuned"]
        if all(r[side].get(name) is not None for r in results for side in ("base", "tuned"))
    }


def table_of(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """The settings, the best first; failed ones last."""
    rows: list[tuple[str, ...]] = [("setting", "seeds", "validation loss [95%]", "above the best [95%]")]
    best_first = sorted(
        summary["settings"], key=lambda s: s["validation_loss"]["mean"] if s["validation_loss"] else math.inf
    )
    for setting in best_first:
        done = sum("failed" not in run for run in setting["runs"])
        seeds = str(done) if done == len(setting["runs"]) else f"{done} of {len(setting['runs'])}"
        loss, above = setting["validation_loss"], setting.get("above_chosen")
        shown = Mean(**loss).text(".4f") if loss else "-"
        rows.append((setting["setting"], seeds, shown, Mean(**above).text("+.4f") if above else ""))
    return rows


def markdown(summary: dict[str, Any], table: Sequence[tuple[str, ...]]) -> str:
    def lines(rows: Sequence[tuple[str, ...]]) -> list[str]:
        return ["| " + " | ".join(row) + " |" for row in (rows[0], ("---",) * len(rows[0]), *rows[1:])]

    text = ["# Sweep", "", *lines(table), ""]
    if summary["metrics"]:
        on, seeds = summary["evaluated_on"], len(summary["settings"][0]["runs"])
        text += [f"{summary['chosen']}, on the {on['split']} rows of {on['source']}, means over {seeds} seed(s):", ""]
        figures: list[tuple[str, ...]] = [
            (name, Mean(**both["base"]).text(".4g"), Mean(**both["tuned"]).text(".4g"))
            for name, both in summary["metrics"].items()
        ]
        text += [*lines([("metric", "base", "tuned [95%]"), *figures]), ""]
    return "\n".join([*text, "Intervals are Student's t over seeds.", ""])
