"""Does `auto` find its total? `python bench/auto.py --data FOLDER` on TREC with MiniLM, several seeds.

Four cases: a quarter of the training rows, all of them, all with their labels shuffled, and a task that the base model
solves already (a model that was fine-tuned on it and merged). Each is run with rank `auto`, from r = 16, beside plain
LoRA r = 16 on the same rows. One JSON line a run in bench/results/auto.jsonl: the parameters that were kept as a share
of plain r = 16's, the budgets that were tried with their validation losses, validation losses of both, and seconds.
What is there already is skipped.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

from quality_table import append, lines
from rich.console import Console

from trivet.api import LoRAModel
from trivet.configio import load
from trivet.run import train

RESULTS = Path(__file__).resolve().parent / "results" / "auto.jsonl"
CASES = ("quarter", "all", "shuffled", "solved")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the task files")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print what is there, as Markdown")
    arguments = parser.parse_args()
    done = lines(arguments.results) if arguments.results.exists() else []
    if arguments.table:
        print(table(done))
        return
    if arguments.data is None:
        parser.error("--data is needed: the folder of the task files")
    with tempfile.TemporaryDirectory() as place:
        solved: list[Path] = []
        for case in arguments.cases:
            for seed in arguments.seeds:
                if any((row["case"], row["seed"]) == (case, seed) for row in done):
                    continue
                if case == "solved" and not solved:
                    solved.append(solve(Path(place), arguments.data))
                row = compare(
                    Path(place), arguments, case, seed, str(solved[0]) if case == "solved" else "demo-encoder"
                )
                append(arguments.results, row)
                print(json.dumps({k: v for k, v in row.items() if k != "tried"}), flush=True)


def rows_of(data: Path, case: str, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and validation rows of a case; the validation rows are the same 500 for all of them."""
    rows = [json.loads(line) for line in (data / "cls_trec_train.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [{"text": row["text"], "label": row["label"]} for row in rows]
    random.Random(0).shuffle(rows)
    held, rows = rows[:500], rows[500:]
    if case == "quarter":
        rows = rows[: len(rows) // 4]
    if case == "shuffled":
        labels = [row["label"] for row in [*rows, *held]]
        random.Random(seed).shuffle(labels)
        rows, held = (
            [{**row, "label": labels.pop()} for row in part] for part in (rows, held)
        )  # no text tells its label any more, in either part
    return rows, held


def solve(place: Path, data: Path) -> Path:
    """A base model that has learned the task: fine-tuned and merged."""
    rows, held = rows_of(data, "all", 0)
    model = LoRAModel("demo-encoder", lora_rank=16, **settings(place / "solving", 600, 7, "lora"))
    model.finetune(rows, held, quiet=True)
    model.merge(place / "solved")
    return place / "solved"


def settings(folder: Path, steps: int, seed: int, method: str) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "model.dtype": "bfloat16",
        "training.max_steps": steps,
        "training.batch_size": 16,
        "training.learning_rate": 1e-3,
        "training.seed": seed,
        "training.eval_steps": steps,
        "evaluation.resamples": 10,
        "method": method,
    }


def compare(place: Path, arguments: argparse.Namespace, case: str, seed: int, base: str) -> dict[str, Any]:
    """`auto` and plain LoRA r = 16 on the same rows."""
    rows, held = rows_of(arguments.data, case, seed)
    results = {}
    for name, method, rank in (("auto", "auto", 8), ("plain", "lora", 16)):
        values = settings(place / f"{case}-{seed}-{name}", arguments.steps, seed, method)
        config = load(values=values | {"model.name": base, "model.lora_rank": rank})
        results[name] = train(config, console=Console(quiet=True), train=rows, validation=held, overwrite=True).result
    auto, plain = results["auto"], results["plain"]
    looks = [row for row in auto["rank_history"] if "tried" in row]
    return {
        "case": case, "seed": seed, "steps": arguments.steps, "rows": len(rows),
        "kept_share": auto["adapter_parameters"] / plain["adapter_parameters"],
        "tried": {str(look["step"]): look["tried"] for look in looks}, "budget": looks[-1]["budget"],
        "validation_loss": {name: r["metrics"]["tuned"]["loss"] for name, r in results.items()},
        "accuracy": {name: r["metrics"]["tuned"]["accuracy"] for name, r in results.items()},
        "seconds_ratio": auto["wall_seconds"] / plain["wall_seconds"],
        "versions": auto["versions"],
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """What was kept, per case and seed."""
    rendered = [
        "| case | parameters kept, of r = 16's | validation loss auto / r = 16 | time, of r = 16's |",
        "| --- | --- | --- | --- |",
    ]
    for case in CASES:
        mine = sorted((row for row in rows if row["case"] == case), key=lambda row: row["seed"])
        if mine:
            kept = ", ".join(f"{row['kept_share']:.1%}" for row in mine)
            loss = ", ".join(
                f"{row['validation_loss']['auto']:.3f} / {row['validation_loss']['plain']:.3f}" for row in mine
            )
            time = ", ".join(f"{row['seconds_ratio']:.2f}" for row in mine)
            rendered.append(f"| {case} | {kept} | {loss} | {time} |")
    return "\n".join(rendered)


if __name__ == "__main__":
    main()
