"""The rows of `bench/quality.py`: reading and adding them, which run comes next, and what they say as Markdown."""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
from pathlib import Path

from quality_tasks import Candidate, Task

#: The seed whose validation loss chooses each method's learning rate.
TUNING_SEED = 0
#: Fewer seeds than this say too little for an interval that is worth reading.
ENOUGH = 3

#: (task, method, seed, learning rate, scale, steps) -> row.
Rows = dict[tuple, dict]


def key(task: Task, candidate: Candidate, seed: int, rate: float, scale: float) -> tuple:
    return task.name, candidate.name, seed, rate, scale, task.steps


def read(path: Path) -> Rows:
    """All whole rows; a line that a killed process left unfinished is passed over."""
    rows: Rows = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], start=1):
        try:
            row = json.loads(line)
        except ValueError:
            print(f"{path.name}:{number}: unfinished line passed over", file=sys.stderr)
            continue
        rows[tuple(row[k] for k in ("task", "method", "seed", "learning_rate", "scale", "steps"))] = row
    return rows


def lines(path: Path) -> list[dict]:
    """The rows of a file of results."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def append(path: Path, row: dict) -> None:
    """Add a line in one write, so that processes which share the file never mix theirs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cut = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")  # somebody was killed
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, ("\n" * cut + json.dumps(row, allow_nan=False) + "\n").encode())
    finally:
        os.close(file)


def trial_rows(rows: Rows, task: Task, candidate: Candidate) -> list[dict]:
    """The tuning runs that are there."""
    keys = [key(task, candidate, TUNING_SEED, *trial) for trial in candidate.trials(task)]
    return [rows[k] for k in keys if k in rows]


def chosen(rows: Rows, task: Task, candidate: Candidate) -> tuple[float, float] | None:
    """(learning rate, scale) with the lowest validation loss; None while a trial is missing, or where all failed."""
    trials = trial_rows(rows, task, candidate)
    good = [row for row in trials if not row["failed"]]
    if len(trials) < len(candidate.trials(task)) or not good:
        return None
    best = min(good, key=lambda row: row["validation"]["loss"])
    return best["learning_rate"], best["scale"]


def best_loss(rows: Rows, task: Task, candidate: Candidate, seed: int) -> float:
    """The lowest validation loss of the trials so far; infinite where there is none, and where nothing is tuned."""
    trials = trial_rows(rows, task, candidate) if seed == TUNING_SEED else []
    return min((row["validation"]["loss"] for row in trials if not row["failed"]), default=math.inf)


def next_run(rows: Rows, task: Task, candidate: Candidate, seeds: list[int]) -> tuple[int, float, float] | None:
    """(seed, learning rate, scale) of a run that is missing: all trials first, then the other seeds."""
    best = chosen(rows, task, candidate)
    wanted = [(TUNING_SEED, *trial) for trial in candidate.trials(task)]
    wanted += [(seed, *best) for seed in seeds if best is not None]
    return next((w for w in wanted if key(task, candidate, *w) not in rows), None)


def check(rows: Rows, tasks: list[Task], candidates: list[Candidate], seeds: list[int]) -> list[str]:
    """What is missing, one line a task and method; and which rates lie at the edge of what was tried."""
    lines = []
    for task in tasks:
        for candidate in candidates:
            trials, best = trial_rows(rows, task, candidate), chosen(rows, task, candidate)
            left = len(candidate.trials(task)) - len(trials)
            if left:
                lines.append(f"{task.name} {candidate.name}: {left} of {len(candidate.trials(task))} trials missing")
            elif best is None:
                lines.append(f"{task.name} {candidate.name}: all trials failed: {trials[0]['failed']}")
            elif absent := [seed for seed in seeds if key(task, candidate, seed, *best) not in rows]:
                lines.append(f"{task.name} {candidate.name}: seeds {', '.join(map(str, absent))} missing")
    return lines


class Group:
    """A method's runs on a task at its chosen rate, by seed."""

    def __init__(self, rows: Rows, task: Task, candidate: Candidate, seeds: list[int]) -> None:
        self.task, self.candidate = task, candidate
        self.rate, self.scale = chosen(rows, task, candidate) or (math.nan, math.nan)
        wanted = {seed: rows.get(key(task, candidate, seed, self.rate, self.scale)) for seed in seeds}
        self.runs = {seed: row for seed, row in wanted.items() if row and not row["failed"] and row["test"]}

    def values(self, split: str, metric: str) -> dict[int, float]:
        return {seed: row[split][metric] for seed, row in self.runs.items()}

    @property
    def parameters(self) -> float:
        return statistics.mean(row["adapter_parameters"] for row in self.runs.values())

    @property
    def edge(self) -> str:
        """Where the chosen rate is the lowest or highest that was tried: a better one may lie beyond."""
        rates = [rate for rate, _ in self.candidate.trials(self.task)]
        return {min(rates): " ↓", max(rates): " ↑"}.get(self.rate, "")

    @property
    def plain(self) -> bool:
        """Whether it is plain LoRA, left as it was trained."""
        return self.candidate.name == f"lora-r{self.candidate.rank}"

    def reference(self, groups: list[Group]) -> Group | None:
        """Plain LoRA of the nearest size, by ratio; None for plain LoRA itself."""
        plain = [g for g in groups if g.plain]
        if self in plain or not plain:
            return None
        return min(plain, key=lambda g: abs(math.log(g.parameters / self.parameters)))


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half of its 95% interval, by t with n - 1 degrees of freedom; infinite for one value."""
    from scipy.stats import t

    n = len(values)
    half = float(t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.inf
    return statistics.mean(values), half


def beyond(values: list[float]) -> int:
    """-1 or 1, by its sign, where the mean is farther from zero than its 95% interval reaches; else, or of few, 0."""
    mean, half = interval(values)
    return int(math.copysign(1, mean)) if len(values) >= ENOUGH and abs(mean) > half else 0


def differences(group: Group, reference: Group, metric: str) -> list[float]:
    """On test rows, seed by seed: the same rows in the same order, the same start of the head."""
    ours, theirs = group.values("test", metric), reference.values("test", metric)
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def pooled(groups: list[Group]) -> float:
    """One standard deviation of the test loss over seeds, from all groups of a task; 0 where no group has two seeds."""
    losses = [list(g.values("test", "loss").values()) for g in groups]
    spreads = [statistics.variance(values) for values in losses if len(values) > 1]
    return math.sqrt(statistics.mean(spreads)) if spreads else 0.0


#: Shifts by the base model and the rows that were trained on.
Shifts = dict[tuple[str, str], list[float]]


def by_task(shifts: Shifts) -> list[float]:
    """One shift a task: rows that a model was trained on in two settings are one task, with the mean of both."""
    return [statistics.mean(same) for same in shifts.values()]


def over_tasks(shifts: Shifts) -> tuple[float, float, int]:
    """Mean, half of its 95% interval, and the number of tasks."""
    means = by_task(shifts)
    return *interval(means), len(means)


def table(rows: Rows, tasks: list[Task], candidates: list[Candidate], seeds: list[int]) -> str:
    """Markdown: a table a task, and one over all tasks."""
    lines: list[str] = []
    overall: dict[str, Shifts] = {}  # by method
    sides: dict[str, dict[int, list[str]]] = {}  # by method, the tasks on each side of its interval
    for task in tasks:
        groups = [g for c in candidates if (g := Group(rows, task, c, seeds)).runs]
        if not groups:
            continue
        lines += [f"### {task.title}", "", *_header(task)]
        spread = pooled(groups)
        for group in groups:
            reference = group.reference(groups)
            lines.append(_row(group, reference))
            if reference and spread and (shifts := differences(group, reference, "loss")):
                name = group.candidate.name
                overall.setdefault(name, {}).setdefault(task.trained_on, []).append(statistics.mean(shifts) / spread)
                sides.setdefault(name, {}).setdefault(beyond(shifts), []).append(task.name)
        lines += ["", f"One standard deviation over seeds (pooled): {spread:.4f} nats.", ""]
    lines += ["### Over all tasks", "", *_OVERALL]
    for name, found in overall.items():
        mean, half, count = over_tasks(found)
        shown = f"{mean - half:+.2f} to {mean + half:+.2f}" if count >= ENOUGH else f"n = {count}: too small"
        ahead, behind = (", ".join(sides[name].get(side, ["none"])) for side in (-1, 1))
        lines.append(
            f"| {name} | {mean:+.2f} | {shown} | {count} | {statistics.median(by_task(found)):+.2f} "
            f"| {ahead} | {behind} |"
        )
    lines += ["", _NOTES]
    return "\n".join(lines)


_OVERALL = [
    "| method | mean standardised difference in test loss | 95% interval over tasks | tasks | median "
    "| ahead beyond its interval on | behind on |",
    "| --- | --- | --- | --- | --- | --- | --- |",
]
_NOTES = (
    "Differences are to plain LoRA of the nearest number of trained parameters (× their ratio where it is over 10% "
    "off), seed by seed on the same rows; losses in nats, or mean squared errors where a number is predicted, negative "
    "is better. Intervals: t with n − 1 degrees of freedom over seeds; of twenty such intervals one misses zero by "
    "chance. ↓ ↑: the chosen learning rate is the lowest or highest that was tried. Standardised: divided by the "
    "task's pooled standard deviation over seeds; rows that a model was trained on in two settings are one task, with "
    "the mean of both."
)


def _header(task: Task) -> list[str]:
    names = [
        "method", "parameters", "rate", "n", "validation loss", "test loss", f"test {task.metric}", "against",
        "difference in loss [95%]", f"difference in {task.metric} [95%]",
    ]  # fmt: skip
    return [f"| {' | '.join(names)} |", "|" + " --- |" * len(names)]


def _row(group: Group, reference: Group | None) -> str:
    task = group.task
    rate = f"{group.rate:g}{group.edge}" + (f", scale {group.scale:g}" if len(group.candidate.scales) > 1 else "")
    spreads = [("validation", "loss"), ("test", "loss"), ("test", task.metric)]
    cells = [group.candidate.name, f"{group.parameters:,.0f}", rate, str(len(group.runs))]
    cells += [_spread(list(group.values(*which).values())) for which in spreads]
    if reference is None:
        return f"| {' | '.join(cells)} | | | |"
    ratio = group.parameters / reference.parameters
    cells.append(reference.candidate.name + (f" × {ratio:.2g}" if abs(math.log(ratio)) > math.log(1.1) else ""))
    cells += [difference(differences(group, reference, metric)) for metric in ("loss", task.metric)]
    return f"| {' | '.join(cells)} |"


def _spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean


def difference(values: list[float]) -> str:
    """The mean of paired differences with its 95% interval, where there are enough for one."""
    if not values:
        return "no seed in common"
    mean, half = interval(values)
    if len(values) < ENOUGH:
        return f"{mean:+.4f} (n = {len(values)}: too small)"
    return f"{mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}]"
