"""Trains what is missing of a sweep, and compares the settings.

What a run's folder says counts: a finished run is not trained again, an unfinished one is resumed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trivet import processes
from trivet.configio import dump, load
from trivet.errors import ConfigError
from trivet.runfolder import storage, write_json, write_text
from trivet.sweep.jobs import local, on_ray
from trivet.sweep.plan import Run, plan
from trivet.sweep.report import loss_of, markdown, summarise, table_of

SUMMARY, TABLE = "sweep.json", "sweep.md"


@dataclass(frozen=True)
class Outcome:
    """A finished sweep.

    Attributes:
        folder: where it is.
        summary: what sweep.json holds.
        table: rows for printing, the first being the head.
        failed: the runs that failed, each with the reason.
    """

    folder: Path
    summary: dict[str, Any]
    table: list[tuple[str, ...]]
    failed: dict[Run, str]


def sweep(
    path: Path | None,
    overrides: Sequence[str] = (),
    *,
    seeds: int = 1,
    jobs: int = 1,
    say: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Train what is missing of `plan`'s runs, then compare the settings; sweep.json and sweep.md are written.

    Args:
        jobs: runs at a time on this machine. On a Ray cluster (RAY_ADDRESS is set) Ray decides.
        say: gets a line for each run that ends.

    Raises:
        ConfigError: before anything is trained: see `plan`; or the folder holds something else, or other runs.
    """
    if processes.count() > 1:
        raise ConfigError("a sweep starts processes of its own; start it without torchrun or accelerate launch")
    start = on_ray() if os.environ.get("RAY_ADDRESS") else local(jobs)
    folder, runs = plan(path, overrides, seeds)
    _check_free(folder, runs)
    with storage(f"sweep {folder}"):
        for run in runs:
            run.folder.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(run.config_file, dump(run.config))
        write_json(folder / SUMMARY, summarise(runs, {}))
    missing = [run for run in runs if not run.folder.result.exists()]
    if len(missing) < len(runs):
        say(f"{len(runs) - len(missing)} of {len(runs)} runs are finished already")
    failed: dict[Run, str] = {}
    for done, (run, problem) in enumerate(start(missing), 1):
        if problem is not None:
            failed[run] = problem
        said = f"failed: {problem}" if problem is not None else f"validation loss {loss_of(run):.4f}"
        say(f"{done}/{len(missing)} {run}: {said}")
    summary = summarise(runs, failed)
    table = table_of(summary)
    with storage(f"sweep {folder}"):
        write_json(folder / SUMMARY, summary)
        write_text(folder / TABLE, markdown(summary, table))
    return Outcome(folder, summary, table, failed)


def _check_free(folder: Path, runs: Sequence[Run]) -> None:
    if folder.is_dir() and any(folder.iterdir()) and not (folder / SUMMARY).exists():
        raise ConfigError(f"output_dir {folder}: holds files but no sweep; set another output_dir")
    for run in runs:
        if not run.folder.config.exists():
            continue
        before = load(run.folder.config)
        if run.config.as_decided(before) != before:
            raise ConfigError(
                f"run {run.folder.path}: was made with other settings than this sweep's; set another output_dir, or "
                f"remove {run.folder.path.parent}"
            )
