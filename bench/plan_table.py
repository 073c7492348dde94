"""The figures of docs/scale.md, from bench/results/plan.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results" / "plan.jsonl"
#: What the columns of the first table compare.
QUANTITIES = {
    "flops": "matrix products",
    "kept_bytes": "kept for the backward pass",
    "trained": "trained numbers",
    "gradient_bytes": "gradients",
    "optimizer_bytes": "optimizer",
    "peak_beyond_model": "peak beyond the model",
    "peak_with_freed_memory_kept": "likewise, freed memory kept",
}


def newest(path: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """The last row of every measurement, by what was measured."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        names = ("kind", "base", "rows", "length", "rank", "checkpointing", "method", "model", "gpus")
        found[json.dumps([row.get(name) for name in names])] = row
    return found


def figures(path: Path = RESULTS) -> str:
    """Every table, as Markdown."""
    rows = list(newest(path).values())
    kinds = ("counts", "run", "times", "pair", "scale")
    by_kind = {kind: [row for row in rows if row["kind"] == kind] for kind in kinds}
    parts = []
    if by_kind["counts"]:
        parts += ["### A training step: predicted / measured", "", counts(by_kind["counts"])]
    if by_kind["run"]:
        parts += ["### What a run writes: predicted / measured", "", run(by_kind["run"])]
    if by_kind["times"]:
        parts += ["### Step time, from one measured size", "", times(by_kind["times"][-1])]
    if by_kind["pair"]:
        parts += ["### Two processes", "", pair(by_kind["pair"][-1])]
    if by_kind["scale"]:
        parts += ["### Large models", "", scale(by_kind["scale"]), "### Ranks", "", ranks(by_kind["scale"])]
    return "\n".join("" if part == "" else part + ("\n" if part.startswith("|") else "") for part in parts)


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def ratio(said: float | None, seen: float | None) -> str:
    if said is None or seen is None:
        return ""
    if said == seen:
        return "exact"
    return f"{said / seen:.4f}" if abs(said / seen - 1) < 0.05 else f"{said / seen:.2f}"


def counts(rows: list[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        more = ", checkpointing" if row["checkpointing"] else ""
        case = f"{row['base']}, `{row['method']}` r={row['rank']}, {row['rows']} x {row['length']}{more}"
        cells.append([case, *(ratio(row["predicted"][q], row["measured"][q]) for q in QUANTITIES)])
    return table(["step", *QUANTITIES.values()], cells)


def run(rows: list[dict[str, Any]]) -> str:
    shown = {
        "saved_numbers": "numbers in the adapter",
        "adapter_file_bytes": "its file",
        "optimizer_bytes": "optimizer state in a checkpoint",
        "optimizer_file_bytes": "its file",
        "checkpoint_bytes": "the whole checkpoint",
    }
    cells = [
        [f"{row['base']}, `{row['method']}` r={row['rank']}"]
        + [ratio(row["predicted"][q], row["measured"][q]) for q in shown]
        for row in rows
    ]
    return table(["run", *shown.values()], cells)


def times(row: dict[str, Any]) -> str:
    cells = []
    for key, said in row["predicted"].items():
        seen = row["measured"][key]
        note = "calibrates" if key == row["calibrated_at"] else f"{said / seen:.2f}"
        cells.append([key.replace("x", " x "), f"{seen:.2f}", f"{said:.2f}", note])
    reached = f"{row['flops_per_second'] / 1e9:,.0f} GFLOP/s"
    return table(["rows x tokens", "measured, s", "predicted, s", f"ratio (at {reached})"], cells)


def pair(row: dict[str, Any]) -> str:
    said, seen = row["predicted"], row["measured"]
    cells = [
        [name, f"{seen[key] / 1e6:,.1f} MB", f"{said[key] / 1e6:,.1f} MB", ratio(said[key], seen[key])]
        for key, name in (
            ("data_parallel_sent", "sent in a step by both, data parallel"),
            ("fsdp_sent", "sent in a step by both, FSDP2"),
        )
    ]
    sizes = list(seen["all_reduce_seconds"])
    for size in sizes:
        a, b = said["all_reduce_seconds"][size], seen["all_reduce_seconds"][size]
        note = "calibrates" if size in (sizes[0], sizes[-1]) else f"{a / b:.2f}"
        cells.append([f"all-reduce of {int(size) / 2**20:.0f} MiB", f"{1e3 * b:.1f} ms", f"{1e3 * a:.1f} ms", note])
    return table(["", "measured", "predicted", "ratio"], cells)


def scale(rows: list[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        c = row["chosen"]
        first = [row["model"], f"{row['gpus']:,}"]
        if c is None:
            least, would = row["least_gb"], row["fewest"]
            cells.append([*first, f"nothing fits ({least:,.0f} GB at least; {would} GPUs would do)", *[""] * 7])
            continue
        cells.append([
            *first,
            c["setting"],
            "yes" if c["checkpointing"] else "no",
            f"{c['gb']:,.0f}",
            f"{c['compute']:,.3g}",
            f"{c['gathering']:,.2g}",
            f"{c['reducing']:,.2g}",
            f"{c['sent_gb']:,.3g}",
            f"{c['rate']:,.0f}",
        ])  # fmt: skip
    figures = ["GB a GPU", "computing, s", "gathering, s", "summing, s", "GB sent a GPU", "tokens/s"]
    return table(["model", "GPUs", "use", "checkpointing", *figures], cells)


def ranks(rows: list[dict[str, Any]]) -> str:
    cells = []
    for row in {r["model"]: r for r in rows}.values():
        r = row["ranks"]
        cells.append([
            row["model"],
            *(f"{4 * r[k] / 1e6:,.0f} MB" for k in ("start", "mean", "end")),
            f"{r['resizes']}",
            f"{r['measured']} x {r['moments'] / 1e6:,.0f} MB",
            f"{r['decision'] / 1e3:,.1f} kB",
        ])  # fmt: skip
    head = ["model", "gradients at the start", "on average", "at the end", "changes", "moments summed", "a decision"]
    return table(head, cells)
