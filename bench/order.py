"""Does it matter in which order the rows come? `python bench/order.py --data FOLDER`.

Plain LoRA of r = 4 at the learning rate that `bench/quality.py` chose for it, in float32, with three orders: steps of
rows of similar length as trivet shuffles them, as transformers' sampler leaves them (of 50 steps the one with the
longest rows comes first), and rows at random, as trivet packs them. Appends a line a run to bench/results/order.jsonl;
what is there already is skipped, `--shard 0/2` and `--shard 1/2` share the seeds of a task, `--table` prints Markdown.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plain_lora
from quality_table import difference
from quality_tasks import TASKS, Loaded

RESULTS = Path(__file__).resolve().parent / "results" / "order.jsonl"
ORDERS = ("shuffled", "sorted", "random")
DEFAULT_TASKS = ("trec-head", "e2e", "stories-e2e")
CAPTION = (
    "Plain LoRA of r = 4: its test loss, mean over seeds, where steps of rows of similar length come in random order; "
    "then how much higher it is in the other orders, over the seeds that both have, with 95% intervals; and the share "
    "of tokens that are padding, in the steps of the first seed. Packed rows come at random too, without the padding."
)


def main() -> None:
    plain_lora.main(
        __doc__, RESULTS, tasks=DEFAULT_TASKS, seeds=[0, 1, 2, 3, 4], column="order", variants=ORDERS,
        measure=measure, table=table, option="--orders",
    )  # fmt: skip


def measure(loaded: Loaded, seed: int, order: str, rate: float, scale: float) -> dict[str, Any]:
    """One run with its steps in `order`."""
    from trivet.train import trainer

    ours = trainer.LengthSampler
    trainer.LengthSampler = sampler(order)  # type: ignore[misc]
    try:
        row = plain_lora.run(loaded, seed, rate, scale)
    finally:
        trainer.LengthSampler = ours  # type: ignore[misc]
    return {"order": order, **row, "padding": padding(loaded, seed, order)}


def sampler(order: str) -> Any:
    """`LengthSampler` with its steps in `order`."""
    import torch
    from transformers.trainer_pt_utils import get_length_grouped_indices

    from trivet.train.sampler import LengthSampler

    class Ordered(LengthSampler):
        def __iter__(self) -> Iterator[int]:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            if order == "sorted":
                return iter(get_length_grouped_indices(self.lengths, self.step, generator=generator))
            if order == "random":
                return iter(torch.randperm(len(self.lengths), generator=generator).tolist())
            return super().__iter__()

    return Ordered


def padding(loaded: Loaded, seed: int, order: str) -> float:
    """The share of padding in a run's batches."""
    size, rows = loaded.task.batch_size, [len(row["input_ids"]) for row in loaded.train_rows]
    made, held, epoch = sampler(order)(rows, size, seed), [], 0
    while len(held) < loaded.task.steps:
        made.set_epoch(epoch)
        lengths = [rows[i] for i in made]
        held += [lengths[i : i + size] for i in range(0, len(lengths), size)]
        epoch += 1
    held = held[: loaded.task.steps]
    return round(1 - sum(map(sum, held)) / sum(len(batch) * max(batch) for batch in held), 4)


def table(rows: list[dict[str, Any]]) -> str:
    """A line a task."""
    rendered = [
        "| task | seeds | shuffled | sorted | random | padding: grouped | random |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in TASKS:
        found = {(row["order"], row["seed"]): row for row in rows if row["task"] == name and not row["failed"]}
        losses = {
            order: {seed: row["test"]["loss"] for (of, seed), row in found.items() if of == order} for order in ORDERS
        }
        ours, *others = losses.values()
        seeds = sorted(seed for seed in ours if any(seed in theirs for theirs in others))
        if not seeds:
            continue
        apart = [difference([theirs[seed] - ours[seed] for seed in seeds if seed in theirs]) for theirs in others]
        padded = [
            f"{found[order, min(of)]['padding']:.0%}" if (of := losses[order]) else "-"
            for order in ("shuffled", "random")
        ]
        mean = statistics.fmean(ours[seed] for seed in seeds)
        cells = [TASKS[name].title, str(len(seeds)), f"{mean:.4f}", *apart, *padded]
        rendered.append("| " + " | ".join(cells) + " |")
    return "\n".join(rendered)


if __name__ == "__main__":
    main()
