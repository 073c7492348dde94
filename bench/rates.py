"""Is the learning rate that `learning_rate: auto` finds a good one? `python bench/rates.py --data FOLDER`.

Plain LoRA of r = 4 in float32, seed by seed, at four rates: the one that trials of the run find before it begins
(`auto`); the best of three whole runs, which `bench/quality.py` chose on validation rows (`swept`); the rate at which
the trials begin, for every task (`start`); and trivet's default (`default`). Appends a line a run to
bench/results/rates.jsonl; what is there already is skipped, `--shard 0/2` and `--shard 1/2` share the seeds of a task,
`--table` prints Markdown.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import plain_lora
from quality_table import difference
from quality_tasks import TASKS, Loaded

RESULTS = Path(__file__).resolve().parent / "results" / "rates.jsonl"
DEFAULT_TASKS = ("trec", "sst2", "banking", "stsb", "stories-e2e")
WAYS = ("auto", "swept", "start", "default")
CAPTION = (
    "Plain LoRA of r = 4 in float32. Swept: the best of three whole runs on validation rows, the rates a factor of two "
    "apart around where the task's own lies; its test loss is the mean over seeds. Then how much higher it is at the "
    "rate that `learning_rate: auto` finds, at 2.8e-3 (where the trials begin) for every task, and at the default of "
    "3e-4, over the seeds that both have, with 95% intervals; losses in nats, or mean squared errors where a number is "
    "predicted. Found: the rates of the seeds in turn. Trials: the seconds that they took, of those of one training."
)


def main() -> None:
    plain_lora.main(
        __doc__, RESULTS, tasks=DEFAULT_TASKS, seeds=[0, 1, 2], column="way", variants=WAYS, measure=measure,
        table=table, option="--ways",
    )  # fmt: skip


def measure(loaded: Loaded, seed: int, way: str, swept: float, scale: float) -> dict[str, Any]:
    """One run at the rate that `way` gives."""
    from trivet.config import TrainingConfig
    from trivet.learning_rate import start_rate

    start = start_rate(plain_lora.CANDIDATE.rank)
    rates = {"auto": "auto", "swept": swept, "start": start, "default": TrainingConfig().learning_rate}
    return {"way": way, **plain_lora.run(loaded, seed, rates[way], scale)}


def table(rows: list[dict[str, Any]]) -> str:
    """A line a task."""
    rendered = [
        "| task | seeds | swept | test loss | found | auto | at 2.8e-3 | at 3e-4 | trials |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in TASKS:
        ways = {
            way: {row["seed"]: row for row in rows if (row["task"], row["way"], row["failed"]) == (name, way, None)}
            for way in WAYS
        }
        seeds = sorted(ways["auto"].keys() & ways["swept"].keys())
        if not seeds:
            continue
        losses = {way: {seed: row["test"]["loss"] for seed, row in found.items()} for way, found in ways.items()}
        apart = [
            difference([losses[way][seed] - losses["swept"][seed] for seed in seeds if seed in losses[way]])
            for way in ("auto", "start", "default")
        ]
        autos = [ways["auto"][seed] for seed in seeds]
        share = statistics.fmean(row["trial_seconds"] / row["train_seconds"] for row in autos)
        cells = [
            TASKS[name].title, str(len(seeds)), f"{ways['swept'][seeds[0]]['learning_rate']:.2g}",
            f"{statistics.fmean(losses['swept'][seed] for seed in seeds):.4f}",
            ", ".join(f"{row['learning_rate']:.2g}" for row in autos), *apart, f"{share:.0%}",
        ]  # fmt: skip
        rendered.append("| " + " | ".join(cells) + " |")
    return "\n".join(rendered)


if __name__ == "__main__":
    main()
