"""Plain LoRA of r = 4 in float32, at the learning rate that `bench/quality.py` chose for it, in variants of one thing.

What `bench/order.py`, `bench/four_bit.py` and `bench/rates.py` share: tasks, seeds and variants in turn, a line a run,
nothing twice.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import quality
from quality_table import append, chosen, lines, read
from quality_tasks import CANDIDATES, TASKS, Loaded, load_task
from versions import processor, versions

CANDIDATE = CANDIDATES["lora-r4"]
KEPT = (
    "task", "method", "seed", "learning_rate", "steps", "validation", "test", "failed", "train_seconds", "trials",
    "trial_seconds",
)  # fmt: skip


def main(
    doc: str | None,
    results: Path,
    *,
    tasks: Sequence[str],
    seeds: Sequence[int],
    column: str,
    variants: Sequence[Any],
    measure: Callable[..., dict[str, Any]],
    table: Callable[[list[dict[str, Any]]], str],
    option: str | None = None,
    load: Callable[[Any, Path, Any], Loaded] = lambda task, data, _: load_task(task, data),
    kind: Callable[[Any], Any] = lambda _: None,
) -> None:
    """The command: every run that is not there yet, or the table of those that are.

    Args:
        doc: what --help says.
        tasks, seeds: what is run where nothing else is asked for.
        variants: in this order for each seed; a line has its own under `column`.
        measure: (loaded, seed, variant, learning rate, scale) -> the line.
        table: the lines as Markdown.
        option: the flag that chooses among variants; None for none.
        load: (task, data, kind of base) -> what a run needs; once a task and kind.
        kind: of the base that a variant runs on.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the task files")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(tasks))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(seeds))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shard", default="0/1", help="this process's part of the seeds, e.g. 0/2")
    parser.add_argument("--results", type=Path, default=results)
    parser.add_argument("--table", action="store_true", help="only print what is there, as Markdown")
    parser.set_defaults(variants=variants)
    if option is not None:
        parser.add_argument(option, nargs="+", choices=variants, dest="variants")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(lines(arguments.results)))
        return
    if arguments.data is None:
        parser.error("--data is needed: the folder of the task files")
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # read when torch is imported
    tuned = read(quality.RESULTS)
    for name in arguments.tasks:
        best = chosen(tuned, TASKS[name], CANDIDATE)
        if best is None:
            parser.error(f"{name}: bench/quality.py has chosen no learning rate for plain LoRA there yet")
        loaded = functools.cache(functools.partial(load, replace(TASKS[name], dtype="float32"), arguments.data))
        for seed in quality.shard(arguments.seeds, arguments.shard):
            for variant in arguments.variants:
                done = lines(arguments.results) if arguments.results.exists() else []
                if any((row["task"], row["seed"], row[column]) == (name, seed, variant) for row in done):
                    continue
                row = measure(loaded(kind(variant)), seed, variant, *best)
                append(arguments.results, row)
                print(name, seed, f"{column}={variant}", row["test"], f"{row['train_seconds']:.0f} s", flush=True)


def run(loaded: Loaded, seed: int, rate: float | str, scale: float) -> dict[str, Any]:
    """One run: what is kept of it, and on what it was made."""
    row = quality.run(loaded, CANDIDATE, seed, rate, scale)
    made_on = {"dtype": loaded.task.dtype, "processor": processor(), "versions": versions()}
    return {name: row[name] for name in KEPT if name in row} | made_on
