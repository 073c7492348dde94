"""What becomes of a learning rate at another rank: the trials of `bench/quality.py`, read across ranks."""

from __future__ import annotations

from quality_table import TUNING_SEED, Rows, chosen, key
from quality_tasks import CANDIDATES, TASKS, Task

#: The rank whose chosen rate is carried over, and those it is carried to.
FROM, TO = 4, (1, 16, 64)


def across_ranks(rows: Rows) -> str:
    """Validation loss of plain LoRA at the rate L that suits r = 4, and at L √(4 / r), by rank. Markdown.

    All of the seed that tunes: these are its trials, none was run for this table.
    """
    lines = [
        "| task | L | r = 4 at L | "
        + " | ".join(f"r = {r} at L | r = {r} at {(FROM / r) ** 0.5:g} L" for r in TO)
        + " |",
        "| --- | --- | --- |" + " --- |" * (2 * len(TO)),
    ]
    for task in TASKS.values():
        best = chosen(rows, task, CANDIDATES[f"lora-r{FROM}"])
        if best is None:
            continue
        rate = best[0]
        cells = [_loss(rows, task, FROM, rate)]
        for rank in TO:
            cells += [_loss(rows, task, rank, rate), _loss(rows, task, rank, rate * (FROM / rank) ** 0.5)]
        lines.append(f"| {task.title} | {rate:g} | {' | '.join(cells)} |")
    return "\n".join(
        [*lines, "", "Validation loss in nats; L is the rate that suits r = 4, and empty is what was not tried."]
    )


def _loss(rows: Rows, task: Task, rank: int, rate: float) -> str:
    candidate = CANDIDATES[f"lora-r{rank}"]
    row = rows.get(key(task, candidate, TUNING_SEED, float(f"{rate:.3g}"), candidate.scales[0]))
    return "" if row is None else "diverged" if row["failed"] else f"{row['validation']['loss']:.3f}"
