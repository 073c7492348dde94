"""Is shrinking real? `python bench/shrink.py` squeezes SmolLM2-135M from r = 16 to what r = 4 holds, beside plain LoRA.

Both runs are made in one go, on real rows that need no download (`docstrings`). Reported, and appended to
bench/results/shrink.jsonl: trainable parameters, the optimizer's bytes and the saved file at the end, each as a share
of plain r = 16's; the step time of the settled steps over that of the wide ones, with their quartiles; and the time
spent on measuring, scoring and resizing as a share of the run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from trivet.configio import load
from trivet.run import train

RESULTS = Path(__file__).resolve().parent / "results" / "shrink.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--base", default="demo")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        squeezed = run(Path(place) / "squeeze", arguments, {"rank": {"name": "squeeze", "start_rank": 16}}, 4)
        plain = run(Path(place) / "plain", arguments, "lora", 16)
    row = compare(squeezed, plain) | {"steps": arguments.steps, "base": arguments.base, "machine": platform.machine()}
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=1))


def run(folder: Path, arguments: argparse.Namespace, method: Any, rank: int) -> dict[str, Any]:
    """One run and what it left on disk."""
    config = load(
        values={
            "model.name": arguments.base,
            "model.lora_rank": rank,
            "method": method,
            "data.train": "docstrings",
            "data.max_length": 128,
            "data.max_validation_rows": 16,
            "data.max_test_rows": 16,
            "training.max_steps": arguments.steps,
            "training.learning_rate": 1e-3,
            "training.eval_steps": arguments.steps,
            "evaluation.generate": False,
            "evaluation.resamples": 10,
            "output_dir": str(folder),
        }
    )
    result = train(config, console=Console(stderr=True)).result
    steps = [row for row in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "loss" in row]
    last = folder / "checkpoints" / f"checkpoint-{arguments.steps}"
    return {
        "result": result,
        "steps": steps,
        "optimizer_bytes": (last / "optimizer.pt").stat().st_size,
        "file_bytes": (folder / "adapter" / "adapter_model.safetensors").stat().st_size,
    }


def compare(squeezed: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """The shares that are claimed."""
    steps = squeezed["steps"]
    first = next(row["step"] for row in squeezed["result"]["rank_history"])
    last = squeezed["result"]["rank_history"][-1]["step"]

    def per_token(rows: list[dict[str, Any]]) -> list[float]:
        return [row["step_seconds"] / row["tokens"] for row in rows]

    pairs = list(zip(steps, plain["steps"], strict=True))  # the same rows in the same order

    def over_plain(begin: int, end: int) -> list[float]:
        return statistics.quantiles(a["step_seconds"] / b["step_seconds"] for a, b in pairs if begin < a["step"] <= end)

    # The first steps meet new tensor shapes; measured steps are part of what they cost.
    wide = per_token([row for row in steps if 5 < row["step"] <= first])
    settled = per_token([row for row in steps if row["step"] > last])
    flat = per_token([row for row in plain["steps"] if row["step"] > last])
    seconds = sum(row["step_seconds"] for row in steps)
    ours, theirs = squeezed["result"], plain["result"]
    return {
        "trainable_share": ours["trainable_parameters"] / theirs["trainable_parameters"],
        "optimizer_share": squeezed["optimizer_bytes"] / plain["optimizer_bytes"],
        "file_share": squeezed["file_bytes"] / plain["file_bytes"],
        "step_time_settled_over_wide": statistics.median(settled) / statistics.median(wide),
        "step_time_settled_over_plain_r16": statistics.median(settled) / statistics.median(flat),
        "milliseconds_per_token_quartiles": {
            name: [1000 * q for q in statistics.quantiles(values)]
            for name, values in (("wide", wide), ("settled", settled), ("plain", flat))
        },
        "step_time_over_plain_r16_quartiles": {
            "wide": over_plain(5, first),
            "squeezing": over_plain(first, last),
            "settled": over_plain(last, len(steps)),
        },
        "rank_seconds": ours["rank_seconds"],
        "rank_share_of_run": ours["rank_seconds"] / seconds,
        "loss": {"squeezed": ours["metrics"]["tuned"]["loss"], "plain": theirs["metrics"]["tuned"]["loss"]},
        "versions": ours["versions"],
    }


if __name__ == "__main__":
    main()
