"""What does measuring a model cost? `bench/evaluation.py --data FOLDER`: trivet's way beside the libraries' own.

Both sides give the same metrics of the same rows: the likelihood of the answers, and what the model writes, or which
choice it takes. trivet's reads a prompt once for all of it, with its own products of few rows; the other one scores and
writes apart, with PEFT's and transformers' layers and transformers' `generate`. They take turns in one process, a
measurement each, and each pair gives a ratio. Lines go to bench/results/evaluation.jsonl; --table prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any
from unittest.mock import patch

import torch
from quality_table import append, lines
from versions import processor, versions

from trivet.adapter.layers import adapted_layers
from trivet.configio import load
from trivet.data.dataset import load_dataset
from trivet.evaluate import measure
from trivet.evaluate.measure import Settings, Side
from trivet.session import Session, begin

RESULTS = Path(__file__).resolve().parent / "results" / "evaluation.jsonl"
#: Test rows, their name, how many of them, and the tokens of an answer.
WORKLOADS = {
    "docstrings": ("docstrings", "functions, a line on each of at most 48 tokens", 16, 48),
    "e2e": ("d2t_e2e_test.jsonl", "E2E, texts of at most 64 tokens", 16, 64),
    "gsm8k": ("math_gsm8k_test.jsonl", "GSM8K, texts of at most 128 tokens", 16, 128),
    "arc": ("mc_arc_easy_test.jsonl", "ARC easy, 4 choices", 32, 0),
    "boolq": ("mc_boolq_test.jsonl", "BoolQ, 2 choices", 16, 0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the task files")
    parser.add_argument("--table", action="store_true", help="only print the table of what was recorded")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--base", default="demo")
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(lines(RESULTS)))
        return
    if arguments.data is None:
        parser.error("--data is needed: the folder of the task files")
    for name in arguments.workloads:
        row = run(name, arguments)
        append(RESULTS, row)
        print(json.dumps(row), flush=True)


def run(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Both sides in turns; returns the line to keep."""
    file, _, n, tokens = WORKLOADS[name]
    rows = load_dataset(file if file == "docstrings" else arguments.data / file, split="test").take(n)
    sides = {fast: opened(rows, arguments, fast) for fast in (True, False)}
    settings = Settings(max_new_tokens=tokens or 1)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    found: dict[bool, Side] = {}
    for turn in range(arguments.rounds + 1):
        for fast in (True, False) if turn % 2 else (False, True):
            evaluator = sides[fast].evaluator(rows, settings)
            start = time.perf_counter()
            if fast:
                found[fast] = evaluator.measure(sides[fast].model)
            else:
                with patch.object(measure, "reads_once", lambda *_: False):
                    found[fast] = evaluator.measure(sides[fast].model)
            if turn:  # the first one meets new tensor shapes
                seconds[fast].append(time.perf_counter() - start)
    ratios = [theirs / ours for ours, theirs in zip(seconds[True], seconds[False], strict=True)]
    metrics = {
        side: {metric.name: metric.value(metric.rows) for group in found[fast].groups for metric in group}
        for side, fast in (("trivet", True), ("libraries", False))
    }
    same = sum(a == b for a, b in zip(found[True].outputs, found[False].outputs, strict=True))
    return {
        "workload": name, "rows": n, "base": arguments.base, "dtype": arguments.dtype, "processor": processor(),
        "threads": torch.get_num_threads(), "seconds": {"trivet": seconds[True], "libraries": seconds[False]},
        "ratio": median(ratios), "quartiles": [quantiles(ratios)[0], quantiles(ratios)[2]],
        "same_outputs": same / n, "metrics": metrics, "versions": versions(),
    }  # fmt: skip


def opened(rows: Any, arguments: argparse.Namespace, fast: bool) -> Session:
    """The base model with a small random adapter."""
    values = {
        "model.name": arguments.base, "model.dtype": arguments.dtype, "model.device": "cpu", "training.fast": fast
    }  # fmt: skip
    session = begin(load(values=values), rows)
    draw = torch.Generator().manual_seed(0)
    for layer in adapted_layers(session.model):
        layer.B.data.normal_(std=0.01, generator=draw)
    return session


def table(rows: list[dict[str, Any]]) -> str:
    """The recorded lines as Markdown."""
    out = [
        "| rows | type | trivet, s | libraries, s | times as fast | the same outputs | processor |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        ours, theirs = (median(row["seconds"][side]) for side in ("trivet", "libraries"))
        low, high = row["quartiles"]
        name = f"{row['rows']} of {WORKLOADS[row['workload']][1]}"
        out.append(
            f"| {name} | {row['dtype']} | {ours:.1f} | {theirs:.1f} | {row['ratio']:.2f} [{low:.2f}, {high:.2f}] "
            f"| {row['same_outputs']:.0%} | {row['processor']} |"
        )
    return "\n".join(out)


if __name__ == "__main__":
    main()
