"""What does a base model in 4 bits cost in quality? `python bench/four_bit.py --data FOLDER`.

Plain LoRA of r = 4 at the learning rate that `bench/quality.py` chose for it with whole weights, in float32, on the
base model as it is and with its linear layers in NF4 (`model.load_in_4bit`), seed by seed. Appends a line a run to
bench/results/four_bit.jsonl; what is there already is skipped, `--table` prints Markdown.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import plain_lora
import quality
from quality_table import difference
from quality_tasks import TASKS, Loaded, heads, load_task

RESULTS = Path(__file__).resolve().parent / "results" / "four_bit.jsonl"
DEFAULT_TASKS = ("trec-head", "e2e", "snips", "stories-e2e")
CAPTION = (
    "Plain LoRA of r = 4 in float32: the base model's test loss before training with whole weights, and how much "
    "higher it is with linear layers in 4 bits (NF4); then the tuned model's, mean over seeds, and the difference over "
    "seeds with its 95% interval. A new head makes a classifier's loss before training meaningless. SmolLM2's weights "
    "here were published in 4 bits of another kind (Q4_1) before, and count as whole ones."
)


def main() -> None:
    plain_lora.main(
        __doc__, RESULTS, tasks=DEFAULT_TASKS, seeds=[0, 1, 2], column="load_in_4bit", variants=(False, True),
        measure=measure, table=table, load=load, kind=lambda four: four,
    )  # fmt: skip


def load(task: Any, data: Path, four: bool) -> Loaded:
    """The task, on a base model with whole weights or in 4 bits."""
    from trivet.four_bit import to_four_bit

    loaded = load_task(task, data)
    if four:
        to_four_bit(loaded.base.model, heads(loaded))
    return loaded


def measure(loaded: Loaded, seed: int, four: bool, rate: float, scale: float) -> dict[str, Any]:
    """One run, and the base model before it on the same test rows."""
    from trivet.session import Session

    before = None
    if not loaded.task.labelled:
        session = Session(loaded.base, loaded.base.model, loaded.encoder, loaded.data)
        before = quality.figures(session, loaded.splits.test)
    return {"load_in_4bit": four, "before": before, **plain_lora.run(loaded, seed, rate, scale)}


def table(rows: list[dict[str, Any]]) -> str:
    """A line a task."""
    rendered = ["| task | seeds | before | in 4 bits | tuned | in 4 bits |", "| --- | --- | --- | --- | --- | --- |"]
    for name in TASKS:
        whole, four = (
            {
                row["seed"]: row
                for row in rows
                if (row["task"], row["load_in_4bit"], row["failed"]) == (name, kind, None)
            }
            for kind in (False, True)
        )
        seeds = sorted(whole.keys() & four.keys())
        if not seeds:
            continue
        before = ["-", "-"]
        if whole[seeds[0]]["before"]:
            first, other = (side[seeds[0]]["before"]["loss"] for side in (whole, four))
            before = [f"{first:.4f}", f"{other - first:+.4f}"]
        losses = [[side[seed]["test"]["loss"] for seed in seeds] for side in (whole, four)]
        apart = difference([b - a for a, b in zip(*losses, strict=True)])
        cells = [TASKS[name].title, str(len(seeds)), *before, f"{statistics.fmean(losses[0]):.4f}", apart]
        rendered.append("| " + " | ".join(cells) + " |")
    return "\n".join(rendered)


if __name__ == "__main__":
    main()
