"""The same runs of `bench/quality.py` on two kinds of processor: how far apart they end."""

from __future__ import annotations

import statistics
from pathlib import Path

from quality_table import Rows
from quality_tasks import TASKS

#: Runs on a GPU that are in quality.jsonl from a CPU.
RESULTS = Path(__file__).resolve().parent / "results" / "again_gpu.jsonl"


def on_both(rows: Rows, again: Rows) -> str:
    """Validation losses of the runs that were made twice, and their differences. Markdown."""
    lines = [
        "| task | method | seed | rate | on a CPU | on a GPU | difference |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    shifts = []
    for key in sorted(key for key in again if key in rows):
        task, method, seed, rate, *_ = key
        cpu, gpu = (found[key]["validation"]["loss"] for found in (rows, again))
        shifts.append(gpu - cpu)
        lines.append(
            f"| {TASKS[task].title} | {method} | {seed} | {rate:g} | {cpu:.4f} | {gpu:.4f} | {gpu - cpu:+.4f} |"
        )
    if not shifts:
        return "No run was made on both."
    note = f"Validation loss in nats; the median difference is {statistics.median(shifts):+.4f}."
    return "\n".join([*lines, "", note])
