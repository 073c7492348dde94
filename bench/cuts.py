"""What does a cut after training cost, and what would which rule keep? `python bench/cuts.py --data FOLDER`.

Trains as rank `auto` does, to the end, and then measures the update whole, halved, and so on down to a sixteenth, each
cut as `auto` would cut it: the losses of the rows that `auto` looks at, and the losses on all validation and test rows.
Rules for choosing are compared on these lines, bench/results/cuts.jsonl, without training again. What is there already
is skipped; `--table` prints Markdown.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from quality import attach, configured, figures, fit, start_heads
from quality_table import append, lines
from quality_tasks import CANDIDATES, TASKS, Loaded, load_task
from versions import processor, versions

RESULTS = Path(__file__).resolve().parent / "results" / "cuts.jsonl"
SHARES = (1.0, 0.5, 0.25, 0.125, 0.0625)
#: Each task's learning rate, as `auto`'s first trials chose it.
RATES = {"trec-head": 1.5e-3, "sst2": 1.5e-3, "e2e": 3e-3, "multi30k": 3e-3}
#: What is asked of a cut's loss above the best (d), its standard error (e) and 1% of the gain (t).
RULES = {
    "d ≤ max(e, t)": lambda d, e, t: d <= max(e, t),
    "d ≤ t": lambda d, e, t: d <= t,
    "d ≤ min(e, t)": lambda d, e, t: d <= min(e, t),
    "d + e ≤ t": lambda d, e, t: d + e <= t,
    "d + e ≤ t / 2": lambda d, e, t: d + e <= t / 2,
}
CAPTION = (
    "Test loss in nats of the whole update and of its cuts to a share of its parameters; then the share that each rule "
    "keeps by the validation rows that `auto` looks at, and what that costs in test loss. d: the cut's loss above the "
    "best one's; e: the paired standard error of d; t: 1% of the gain over the base. The last rule is `auto`'s."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the task files")
    parser.add_argument("--tasks", nargs="+", choices=RATES, default=list(RATES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print what is there, as Markdown")
    arguments = parser.parse_args()
    done = lines(arguments.results) if arguments.results.exists() else []
    if arguments.table:
        print(table(done))
        return
    if arguments.data is None:
        parser.error("--data is needed: the folder of the task files")
    for name in arguments.tasks:
        loaded = None
        for seed in arguments.seeds:
            if any((row["task"], row["seed"]) == (name, seed) for row in done):
                continue
            loaded = loaded or load_task(TASKS[name], arguments.data)
            row = measure(loaded, seed, RATES[name])
            append(arguments.results, row)
            print(name, seed, [(cut["share"], round(cut["test"], 4)) for cut in row["cuts"]], flush=True)


def measure(loaded: Loaded, seed: int, rate: float) -> dict[str, Any]:
    """Train once, and measure every cut in place of choosing one."""
    from trivet.adapter.plan import plan_of
    from trivet.adapter.resize import tried
    from trivet.rank.policy import Situation, parameters
    from trivet.rank.score import cut, directions
    from trivet.session import Session

    candidate = CANDIDATES["auto"]
    start_heads(loaded, seed)
    config = configured(loaded.task, candidate, seed, rate)
    model = attach(loaded, candidate, config, candidate.scales[0])
    session = Session(loaded.base, model, loaded.encoder, loaded.data)
    policy = plan_of(model).policy
    found: dict[str, Any] = {}

    def decide(now: Situation) -> dict:
        assert now.validation is not None
        worth, held = directions(now.layers, now.statistics), parameters(now.layers)
        found["base"] = rounded(now.validation(cut(now.layers, worth, [0] * len(now.layers))))
        found["cuts"] = []
        for share in SHARES:
            changes = cut(now.layers, worth, policy.ranks(now.layers, worth, int(held * share))[0])
            looked = rounded(now.validation(changes))
            with tried(now.layers, changes):
                sides = {"validation": loaded.splits.validation, "test": loaded.splits.test}
                losses = {side: figures(session, rows)["loss"] for side, rows in sides.items()}
            found["cuts"].append({"share": share, "looked": looked, **losses})
        return {}

    policy.decide = decide
    try:
        took = fit(session, loaded, config)
    finally:
        model.unload()
    return {
        "task": loaded.task.name, "seed": seed, "learning_rate": rate, **found, **took,
        "processor": processor(), "versions": versions(),
    }  # fmt: skip


def rounded(losses: Any) -> list[float]:
    return [round(loss, 5) for loss in losses.tolist()]


def kept(row: dict[str, Any], rule: str) -> dict[str, Any]:
    """The cut that `rule` would keep: it goes down while the rule holds, against the best that keeps something."""
    chosen = row["cuts"][0]
    for i, this in enumerate(row["cuts"][1:], start=1):
        best = min(row["cuts"][: i + 1], key=lambda cut: statistics.fmean(cut["looked"]))
        apart = [a - b for a, b in zip(this["looked"], best["looked"], strict=True)]
        error = statistics.stdev(apart) / len(apart) ** 0.5
        gain = statistics.fmean(row["base"]) - statistics.fmean(best["looked"])
        if this is not best and not RULES[rule](statistics.fmean(apart), error, 0.01 * gain):
            break
        chosen = this
    return chosen


def table(rows: list[dict[str, Any]]) -> str:
    """A line a run: the test loss of every cut, and what each rule would keep."""
    rendered = [
        "| task, seed | " + " | ".join(f"{share:g}" for share in SHARES) + " | " + " | ".join(RULES) + " |",
        "| --- |" + " --- |" * (len(SHARES) + len(RULES)),
    ]
    for row in sorted(rows, key=lambda row: (list(TASKS).index(row["task"]), row["seed"])):
        losses = [f"{cut['test']:.3f}" for cut in row["cuts"]]
        choices = [kept(row, rule) for rule in RULES]
        told = [f"{cut['share']:g} ({cut['test'] - row['cuts'][0]['test']:+.3f})" for cut in choices]
        rendered.append(f"| {TASKS[row['task']].title}, {row['seed']} | {' | '.join(losses + told)} |")
    means = []
    for rule in RULES:
        choices = [(row, kept(row, rule)) for row in rows]
        share = statistics.fmean(cut["share"] for _, cut in choices)
        worse = statistics.fmean(cut["test"] - row["cuts"][0]["test"] for row, cut in choices)
        means.append(f"{share:.2f} ({worse:+.3f})")
    rendered.append("| mean |" + " |" * len(SHARES) + f" {' | '.join(means)} |")
    return "\n".join(rendered)


if __name__ == "__main__":
    main()
