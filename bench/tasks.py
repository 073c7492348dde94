"""The README's task figures: base against tuned on real test rows. `python bench/tasks.py --data FOLDER`.

Runs the configs in examples/ on the data in FOLDER and appends one JSON line a run to bench/results/tasks.jsonl: the
task, the metrics of both sides with 95% bootstrap intervals, versions, device, and the command's settings. What is
already there (same task and seed) is skipped, so that an interrupted run can be resumed.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from pathlib import Path

from trivet.configio import load
from trivet.run import train

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent / "examples"
RESULTS = HERE / "results" / "tasks.jsonl"
TASKS = ("classification", "regression", "data_to_text")
KEPT = (
    "metrics", "intervals", "n", "evaluated_on", "steps", "model", "task", "method", "dtype", "device",
    "trainable_parameters", "tokens_per_second", "peak_memory_bytes", "wall_seconds", "seed", "data", "versions",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the task files")
    parser.add_argument("--table", action="store_true", help="only print the README's table of what is there")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    arguments = parser.parse_args()
    if arguments.table:
        print(table())
        return
    if arguments.data is None:
        parser.error("--data is needed: the folder of the task files")
    done = set()
    if RESULTS.exists():
        done = {(row["name"], row["seed"]) for row in map(json.loads, RESULTS.read_text().splitlines())}
    for name in arguments.tasks:
        for seed in arguments.seeds:
            if (name, seed) in done:
                print(f"{name} seed {seed}: done before")
                continue
            row = run(name, seed, arguments.data)
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row["metrics"], indent=1))


#: What a task is called in the table, and its metrics there.
SHOWN = {
    "classification": ("TREC questions, 6 classes (MiniLM-L6)", ("accuracy", "macro_f1")),
    "regression": ("STS-B similarity (MiniLM-L6)", ("pearson", "spearman")),
    "data_to_text": ("E2E data-to-text (SmolLM2-135M)", ("loss", "bleu", "nist", "rougeL", "cider")),
}


def table() -> str:
    """The recorded figures as a Markdown table: both sides, and the interval of their difference."""
    lines = [
        "| task | metric | base | tuned | 95% interval of the difference | n |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines()):
        title, names = SHOWN[row["name"]]
        for name in names:
            base, tuned = (row["metrics"][side][name] for side in ("base", "tuned"))
            low, high = row["intervals"]["difference"][name]
            figures = f"{base:.3g} | {tuned:.3g} | {low:+.3g} to {high:+.3g} | {row['n'][name]}"
            lines.append(f"| {title} | {name} | {figures} |")
    return "\n".join(lines)


def run(name: str, seed: int, data: Path) -> dict:
    """One run of an example config; returns the line to keep."""
    config = load(EXAMPLES / f"{name}.yaml")
    here = {
        f"data.{part}": str(data / Path(value).name)
        for part in ("train", "validation", "test")
        if isinstance(value := getattr(config.data, part), str) and value.startswith("data/")
    }
    with tempfile.TemporaryDirectory() as folder:
        settings = here | {"output_dir": str(Path(folder) / "run"), "training.seed": seed}
        result = train(load(None, values=settings, start=config)).result
    result["evaluated_on"]["source"] = Path(result["evaluated_on"]["source"]).name
    return {"name": name, "machine": platform.machine(), **{key: result[key] for key in KEPT}}


if __name__ == "__main__":
    main()
