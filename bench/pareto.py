"""Loss against trained parameters: a picture a task, every method against r = 16, and `auto` against a sweep of ranks.

`python bench/pareto.py` draws docs/images/pareto.png from bench/results/quality.jsonl; bench/page.py takes the tables.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from quality import RESULTS
from quality_table import ENOUGH, Group, Rows, Shifts, beyond, differences, interval, over_tasks, pooled, read
from quality_tasks import CANDIDATES, SEEDS, TASKS, Task

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "pareto.png"
#: The methods that come in several sizes, with Okabe & Ito's colours, which colour-blind people can tell apart.
LINES = {
    "lora": ("plain LoRA", "#555555", "o"),
    "squeeze": ("squeeze", "#0072B2", "s"),
    "uniform_squeeze": ("uniform_squeeze", "#56B4E9", "^"),
    "planned": ("planned", "#009E73", "D"),
    "truncated": ("r = 16, then cut", "#CC79A7", "v"),
    "peft_adalora": ("PEFT's AdaLoRA", "#E69F00", "X"),
}
AUTO = ("auto", "#D55E00", "*")
#: Methods of a size stand side by side, each moved by so many doublings more.
STEP = 0.07
#: What a default would be measured by: at most a quarter of r = 16's parameters.
SMALL = ("lora-r4", "squeeze-r4", "planned-r4", "uniform_squeeze-r4", "lora-r2", "squeeze-r2", "auto")

#: As large as plain r = 4.
AS_SMALL = (
    "squeeze-r4", "uniform_squeeze-r4", "planned-r4", "squeeze_late-r4", "squeeze_start16-r4", "truncated-r4",
)  # fmt: skip


def measured(rows: Rows) -> list[tuple[Task, dict[str, Group]]]:
    """Every task that plain LoRA was measured on, with its methods' runs by name."""
    found = []
    for task in TASKS.values():
        groups = {name: g for name, c in CANDIDATES.items() if (g := Group(rows, task, c, SEEDS)).runs}
        if any(group.plain for group in groups.values()):
            found.append((task, groups))
    return found


def draw(rows: Rows, path: Path = PICTURE) -> None:
    """Small multiples: test loss with its 95% interval over seeds against parameters, counted in plain LoRA's r."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter

    tasks = measured(rows)
    across = 3
    down = -(-len(tasks) // across)
    figure, axes = plt.subplots(down, across, figsize=(4.2 * across, 3.1 * down), squeeze=False)
    for axis, (task, groups) in zip(axes.flat, tasks, strict=False):
        plain = next(group for group in groups.values() if group.plain)
        one = plain.parameters / plain.candidate.rank
        for place, (family, style) in enumerate(LINES.items()):
            mine = [g for name, g in groups.items() if name.rpartition("-r")[0] == family]
            _line(axis, mine, one, 2 ** (place * STEP), *style)
        _line(axis, [g for name, g in groups.items() if name == "auto"], one, 1.0, *AUTO)
        axis.set_xscale("log", base=2)
        smallest = min(group.parameters for group in groups.values()) / one
        axis.set_xlim(min(0.7, 0.8 * smallest), 80)
        axis.xaxis.set_major_locator(FixedLocator([2**n for n in range(7)]))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.set_title(f"{task.title}\n1 = {one:,.0f} parameters", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    for axis in axes.flat[len(tasks) :]:
        axis.axis("off")
    for axis in axes[:, 0]:
        axis.set_ylabel("test loss", fontsize=9)
    for axis in axes.flat[max(0, len(tasks) - across) : len(tasks)]:
        axis.set_xlabel("parameters, in those of plain r = 1", fontsize=9)
    shown = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(shown.values(), shown.keys(), loc="lower center", ncols=len(shown), fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.35 / (3.1 * down), 1, 1))
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _line(axis: Any, groups: Iterable[Group], one: float, beside: float, label: str, colour: str, marker: str) -> None:
    """One method's sizes, joined, in units of `one` and moved by the factor `beside`."""
    groups = sorted(groups, key=lambda g: g.parameters)
    if not groups:
        return
    losses = [interval(list(g.values("test", "loss").values())) for g in groups]
    axis.errorbar(
        [g.parameters / one * beside for g in groups], [mean for mean, _ in losses],
        yerr=[half if math.isfinite(half) else 0.0 for _, half in losses],
        color=colour, marker=marker, markersize=10 if marker == "*" else 5, linewidth=1.2, elinewidth=0.6, capsize=2,
        alpha=0.85, label=label, zorder=3 if marker in "o*" else 2,
    )  # fmt: skip


def against_r16(rows: Rows) -> str:
    """Do a quarter of the parameters reach r = 16's loss? Markdown, standardised as in the other tables."""
    lines = [
        "| method | parameters, of r = 16's | standardised difference in test loss to r = 16 | 95% interval over tasks "
        "| tasks | worse beyond its interval on |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    tasks = [(task, groups) for task, groups in measured(rows) if "lora-r16" in groups]
    for name in SMALL:
        shifts: Shifts = {}
        worse, shares = [], []
        for task, groups in tasks:
            if name not in groups or not (found := differences(groups[name], groups["lora-r16"], "loss")):
                continue
            spread = pooled(list(groups.values()))
            shifts.setdefault(task.trained_on, []).append(statistics.mean(found) / spread)
            shares.append(groups[name].parameters / groups["lora-r16"].parameters)
            if beyond(found) > 0:
                worse.append(task.title)
        if shifts:
            mean, half, count = over_tasks(shifts)
            lines.append(
                f"| {name} | {statistics.mean(shares):.0%} | {mean:+.2f} | {mean - half:+.2f} to {mean + half:+.2f} | "
                f"{count} | {'; '.join(worse) or 'none'} |"
            )
    return "\n".join(lines)


def of_the_gain(rows: Rows) -> str:
    """Where r = 16 is ahead of r = 4 beyond its interval: how much of that others have at r = 4's size. Markdown."""
    lines = [
        f"| task | r = 4 | r = 16 | {' | '.join(AS_SMALL)} |",
        "| --- |" + " --- |" * (len(AS_SMALL) + 2),
    ]
    for task, groups in measured(rows):
        if not {"lora-r4", "lora-r16"} <= groups.keys():
            continue
        narrow, wide = groups["lora-r4"], groups["lora-r16"]
        if beyond(differences(wide, narrow, "loss")) >= 0:
            continue
        ends = [statistics.mean(group.values("test", "loss").values()) for group in (narrow, wide)]
        cells = [_part(groups[name], narrow, ends[0] - ends[1]) if name in groups else "" for name in AS_SMALL]
        lines.append(f"| {task.title} | {' | '.join(f'{end:.3f}' for end in ends)} | {' | '.join(cells)} |")
    told = (
        "Test losses of plain LoRA, and how far the others are ahead of r = 4, of what r = 16 is; in brackets "
        "the 95% interval of their own difference, by the mean of r = 16's."
    )
    return "\n".join([*lines, "", told])


def _part(group: Group, narrow: Group, gain: float) -> str:
    """How far it is ahead of r = 4, of `gain`, with the interval of its difference."""
    found = differences(group, narrow, "loss")
    mean, half = interval(found)
    shown = f"{-mean / gain:.0%}"
    return f"{shown} [{(-mean - half) / gain:.0%}, {(-mean + half) / gain:.0%}]" if len(found) >= ENOUGH else shown


def against_sweep(rows: Rows) -> str:
    """`auto` beside the plain rank that a sweep would choose by validation loss, seed by seed. Markdown."""
    lines = [
        "| task | ranks swept | seeds | chosen by the sweep | auto's parameters, of the chosen one's "
        "| within one standard deviation | difference in test loss | auto's time, of one run of r = 16 "
        "| the sweep's time, of one run of r = 16 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    hits = total = 0
    apart = "not comparable"
    for task, groups in measured(rows):
        best = _sweep(groups)
        if not best:
            continue
        plain, seeds = [g for g in groups.values() if g.plain], list(best)
        auto, wide, spread = groups["auto"], groups["lora-r16"], pooled(list(groups.values()))
        shifts = [auto.runs[s]["test"]["loss"] - best[s].runs[s]["test"]["loss"] for s in seeds]
        within = [shift <= spread for shift in shifts]
        hits, total = hits + sum(within), total + len(within)
        shares = [auto.runs[s]["adapter_parameters"] / best[s].parameters for s in seeds]
        time, sweep = _times([auto], wide, seeds, ".2f") or _share(auto, seeds), _times(plain, wide, seeds, ".1f")
        ranks = sorted(g.candidate.rank for g in plain)
        lines.append(
            f"| {task.title} | {', '.join(map(str, ranks))} | {len(seeds)} | "
            f"{', '.join(f'r = {best[s].candidate.rank}' for s in seeds)} | {statistics.mean(shares):.0%} | "
            f"{sum(within)} of {len(within)} | {statistics.mean(shifts):+.3f} | {time or apart} | {sweep or apart} |"
        )
    share = f"{hits / total:.0%}" if total else "none"
    told = (
        f"Within one standard deviation on {hits} of {total} task-seeds ({share}); by the same measure, where it "
        f"was run, a plain rank that is always taken: {_always(rows)}. Times of different processors are not compared; "
        "*: the same training without measuring, deciding and resizing is taken for one run of r = 16."
    )
    return "\n".join([*lines, "", told])


def _sweep(groups: dict[str, Group]) -> dict[int, Group]:
    """By seed that all ran: the plain rank with the lowest validation loss. Only where `auto` is compared with it."""
    plain = [g for g in groups.values() if g.plain]
    if "auto" not in groups or "lora-r16" not in groups:
        return {}
    seeds = [seed for seed in groups["auto"].runs if all(seed in g.runs for g in plain)]
    return {seed: min(plain, key=lambda g: g.runs[seed]["validation"]["loss"]) for seed in seeds}


def _always(rows: Rows) -> str:
    """On how many task-seeds each plain rank is as near to the sweep's choice, of how many."""
    good: dict[int, list[bool]] = {}
    for _, groups in measured(rows):
        spread, best = pooled(list(groups.values())), _sweep(groups)
        for group in groups.values():
            if group.plain:
                near = [group.runs[s]["test"]["loss"] - best[s].runs[s]["test"]["loss"] <= spread for s in best]
                good.setdefault(group.candidate.rank, []).extend(near)
    return ", ".join(f"r = {rank} {sum(near)} of {len(near)}" for rank, near in sorted(good.items()) if near)


def _times(groups: list[Group], one: Group, seeds: list[int], form: str) -> str:
    """The time of `groups` together in runs of `one`, the median over the seeds that one kind of processor ran.

    Processor seconds of training, which other work on the machine changes least.
    """
    found = []
    for seed in seeds:
        runs, base = [g.runs[seed] for g in groups], one.runs[seed]
        if all(run.get("processor") == base.get("processor") for run in runs):
            found.append(sum(run["train_cpu_seconds"] for run in runs) / base["train_cpu_seconds"])
    return format(statistics.median(found), form) if found else ""


def _share(auto: Group, seeds: list[int]) -> str:
    """The time of `auto` in that of its training without measuring, deciding and resizing, the median over seeds."""
    runs = [auto.runs[seed] for seed in seeds if auto.runs[seed].get("rank_seconds")]
    found = [run["train_seconds"] / (run["train_seconds"] - run["rank_seconds"]) for run in runs]
    return f"{statistics.median(found):.2f} *" if found else ""


if __name__ == "__main__":
    draw(read(RESULTS))
