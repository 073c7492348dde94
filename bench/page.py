"""The generated part of docs/evidence.md, from the recorded results. `python bench/page.py` renews it."""

from __future__ import annotations

import json
from pathlib import Path

import auto
import quality
from quality_table import read, table
from quality_tasks import CANDIDATES, TASKS

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "evidence.md"
MARK = "## Figures\n"


def figures() -> str:
    """Every table, as Markdown."""
    rows = read(quality.RESULTS)
    there = [task for task in TASKS.values() if any(key[0] == task.name for key in rows)]
    parts = ["", table(rows, there, list(CANDIDATES.values()), [0, 1, 2]).replace("\n### ", "\n#### ")]
    parts[1] = "### Methods, task by task\n\n#" + parts[1] if parts[1].startswith("### ") else parts[1]
    if auto.RESULTS.exists():
        parts += ["", "### What `auto` keeps (TREC, MiniLM-L6, seeds 0, 1, 2)", "", auto.table(lines(auto.RESULTS))]
    shrink = HERE / "results" / "shrink.jsonl"
    if shrink.exists():
        parts += [
            "",
            "### Shrinking (SmolLM2-135M, r = 16 to what r = 4 holds, 2 threads)",
            "",
            shrunk(lines(shrink)[-1]),
        ]
    return "\n".join(parts) + "\n"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def shrunk(row: dict) -> str:
    """The last run of bench/shrink.py."""
    shown = {
        "trainable parameters, of plain r = 16's": f"{row['trainable_share']:.1%}",
        "optimizer's file, of plain r = 16's": f"{row['optimizer_share']:.1%}",
        "adapter's file, of plain r = 16's": f"{row['file_share']:.1%}",
        "step time once settled, over plain r = 16's": f"{row['step_time_settled_over_plain_r16']:.2f}",
        "measuring, scoring and resizing, of the run's time": f"{row['rank_share_of_run']:.1%}",
    }
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in shown.items())])


def renewed() -> str:
    """The page with its figures as they should be."""
    before, found, _ = PAGE.read_text(encoding="utf-8").partition(MARK)
    if not found:
        raise SystemExit(f"{PAGE} has no line {MARK!r}")
    return before + MARK + figures()


if __name__ == "__main__":
    PAGE.write_text(renewed(), encoding="utf-8")
