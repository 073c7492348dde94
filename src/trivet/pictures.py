"""Pictures of ranks as PNG files, and how layers are named in them. matplotlib is imported only to draw."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trivet.errors import ConfigError
from trivet.runfolder import storage

#: Okabe & Ito's colours, which colour-blind people can tell apart.
_BLUE, _RED, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#555555"
#: Inches: a cell's width, its largest and smallest height, and from where on a number fits into it.
_WIDTH, _TALL, _FLAT, _LEGIBLE = 0.46, 0.26, 0.1, 0.15
#: Inches that the cells of one panel should not exceed in height; room left and right of a panel's cells, and above.
_PAGE, _LEFT, _RIGHT, _TOP = 15.0, 0.85, 0.65, 0.4


# -- where a layer stands in its model -----------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A layer's place: `model.layers.12.self_attn.q_proj` is module `self_attn.q_proj` of block 12 of `model.layers`.

    `stack` is "" and `block` None outside of blocks. Indices inside a block (T5's sublayers, experts) are left out.
    """

    stack: str
    block: int | None
    module: str


def place(name: str) -> Place:
    """The place of a layer: the first number in its name is its block."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts[:-1]) if part.isdigit()), None)
    if at is None:
        return Place("", None, name)
    inside = [part for part in parts[at + 1 : -1] if not part.isdigit()]
    return Place(".".join(parts[:at]), int(parts[at]), ".".join([*inside, parts[-1]]))


def kinds(names: Iterable[str]) -> dict[str, str]:
    """What each layer is called together with its like in other blocks: `q_proj`, or `encoder q_proj` where needed."""
    found = {name: place(name) for name in names}
    stacks = _stacks(found.values())
    out = {}
    for name, where in found.items():
        label = _labels(where.stack, found.values())[where.module]
        title = stacks[where.stack] if where.stack and len([s for s in stacks if s]) > 1 else ""
        out[name] = f"{title} {label}".strip()
    return out


def _stacks(places: Iterable[Place]) -> dict[str, str]:
    """The stacks in order, what is outside of blocks last, each with a short title: `encoder`, `decoder`."""
    names = list(dict.fromkeys(p.stack for p in places))
    parts = {name: name.split(".") for name in names if name}
    while len(parts) > 1 and min(map(len, parts.values())) > 1 and len({p[0] for p in parts.values()}) == 1:
        parts = {name: p[1:] for name, p in parts.items()}
    while len(parts) > 1 and min(map(len, parts.values())) > 1 and len({p[-1] for p in parts.values()}) == 1:
        parts = {name: p[:-1] for name, p in parts.items()}
    titles = {name: ".".join(p) for name, p in parts.items()}
    return titles | ({"": "outside the blocks"} if "" in names else {})


def _labels(stack: str, places: Iterable[Place]) -> dict[str, str]:
    """The shortest ending of each module's path that no other one has; a path that another ends in stays whole.

    Modules outside of blocks keep their whole names.
    """
    paths = list(dict.fromkeys(p.module for p in places if p.stack == stack))
    out = {}
    for path in paths:
        parts = path.split(".")
        endings = [".".join(parts[i:]) for i in reversed(range(len(parts)))] if stack else []
        others = [p for p in paths if p != path]
        out[path] = next((e for e in endings if not any(o == e or o.endswith(f".{e}") for o in others)), path)
    return out


# -- maps ----------------------------------------------------------------------------------------------------


def rank_map(ranks: Mapping[str, int], path: str | Path) -> None:
    """Draw the rank of every layer: blocks x modules, one map for each stack of blocks.

    Args:
        ranks: by layer name; 0 for a layer that has left. What isn't there is drawn as an empty cell.
        path: the PNG file.

    Raises:
        ConfigError: there are no layers.
        StorageError: the file can't be written.
    """
    heat_maps({"rank": ranks}, path)


def heat_maps(panels: Mapping[str, Mapping[str, float]], path: str | Path) -> None:
    """Draw maps side by side, each with a title and a value for every layer; see `rank_map`.

    Several layers in one cell, such as the experts of a block, are drawn as their mean.
    """
    places = {name: place(name) for values in panels.values() for name in values}
    if not places:
        raise ConfigError(f"picture {path}: there are no layers to draw")
    stacks = _stacks(places.values())
    rows = {stack: max((p.block or 0) for p in places.values() if p.stack == stack) + 1 for stack in stacks}
    labels = {stack: _labels(stack, places.values()) for stack in stacks}
    widest = max(map(len, labels.values()))
    height = min(_TALL, max(_FLAT, _PAGE / sum(rows.values())))
    below = {stack: 0.22 + 0.043 * max(map(len, labels[stack].values())) for stack in stacks}  # slanted labels

    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    pitch = _LEFT + widest * _WIDTH + _RIGHT
    tall = _TOP + sum(n * height + below[stack] for stack, n in rows.items())
    wide = pitch * len(panels)
    figure = Figure(figsize=(wide, tall), dpi=150, facecolor="white")

    def axes(left: float, top: float, width: float, high: float) -> Any:
        return figure.add_axes((left / wide, 1 - (top + high) / tall, width / wide, high / tall))

    for column, (title, values) in enumerate(panels.items()):
        norm = Normalize(0, max(max(values.values(), default=0.0), 1e-9))
        whole = all(float(v).is_integer() for v in values.values())
        left, top = _LEFT + column * pitch, _TOP
        for stack, n in rows.items():
            own = {name: value for name, value in values.items() if places[name].stack == stack}
            cells = _cells(own, places, list(labels[stack]), n)
            ax = axes(left, top, len(labels[stack]) * _WIDTH, n * height)
            image = ax.imshow(cells, cmap=_colours(), norm=norm, aspect="auto", interpolation="nearest")
            _label(ax, list(labels[stack].values()), n, height, stacks[stack] if stack else "")
            if height >= _LEGIBLE:
                _write(ax, cells, norm, whole)
            top += n * height + below[stack]
        figure.text((left + widest * _WIDTH / 2) / wide, 1 - 0.25 / tall, title, ha="center", fontsize=11)
        bar = axes(left + widest * _WIDTH + 0.12, _TOP, 0.12, min(3.0, tall - _TOP - 0.1))
        figure.colorbar(image, cax=bar).locator = MaxNLocator(6, integer=whole)
        bar.tick_params(labelsize=7, length=2)
    _save(figure, path)


def _colours() -> Any:
    """Light is little; what is missing is white."""
    import matplotlib

    return matplotlib.colormaps["YlGnBu"].with_extremes(bad="white")


def _cells(values: Mapping[str, float], places: Mapping[str, Place], modules: Sequence[str], rows: int) -> Any:
    import numpy as np

    sums, counts = np.zeros((rows, len(modules))), np.zeros((rows, len(modules)))
    for name, value in values.items():
        at = (places[name].block or 0, modules.index(places[name].module))
        sums[at] += value
        counts[at] += 1
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _label(ax: Any, labels: Sequence[str], rows: int, height: float, title: str) -> None:
    """Names on both sides, and thin lines between the cells; no title is outside of blocks."""
    ax.set_xticks(range(len(labels)), labels, rotation=40, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(0, rows, math.ceil(0.15 / height)) if title else [])
    ax.tick_params(length=0, labelsize=8)
    if title:
        ax.set_ylabel(title, fontsize=9)
    else:
        ax.set_ylabel("outside\nblocks", fontsize=8, rotation=0, ha="right", va="center")
    ax.spines[:].set_visible(False)
    ax.hlines([i - 0.5 for i in range(rows + 1)], -0.5, len(labels) - 0.5, color="#dddddd", linewidth=0.6)
    ax.vlines([i - 0.5 for i in range(len(labels) + 1)], -0.5, rows - 0.5, color="#dddddd", linewidth=0.6)


def _write(ax: Any, cells: Any, norm: Any, whole: bool) -> None:
    for (row, column), value in _filled(cells):
        text = f"{value:.0f}" if whole and float(value).is_integer() else f"{value:.1f}"
        dark = float(norm(value)) > 0.55
        ax.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")


def _filled(cells: Any) -> Iterable[tuple[tuple[int, int], float]]:
    rows, columns = cells.shape
    for row in range(rows):
        for column in range(columns):
            if not math.isnan(cells[row, column]):
                yield (row, column), float(cells[row, column])


# -- the path of a squeeze -----------------------------------------------------------------------------------


def rank_path(
    history: Sequence[Mapping[str, Any]], validations: Sequence[tuple[int, float | None]], path: str | Path
) -> None:
    """Draw what a rank policy did: parameters kept, the price, the validation loss, and the budgets that were tried.

    Args:
        history: a policy's decisions, each with `step` and, as far as known, `parameters_before`, `parameters`,
            `price` and `tried` ({budget: loss}, with the `budget` that was chosen).
        validations: (step, loss); losses of None or NaN are left out.
        path: the PNG file.

    Raises:
        StorageError: the file can't be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    kept = [(h["step"], h.get("parameters_before"), h["parameters"]) for h in history if "parameters" in h]
    prices = [(h["step"], h["price"]) for h in history if h.get("price")]
    losses = [(step, loss) for step, loss in validations if loss is not None and math.isfinite(loss)]
    tried = [h for h in history if h.get("tried")]
    last = max([step for step, *_ in kept] + [step for step, _ in losses] + [1])

    steps = [("parameters kept", _draw_kept, kept), ("price per parameter", _draw_prices, prices)]
    panels: list[tuple[str, Any, Any]]
    panels = [p for p in [*steps, ("validation loss", _draw_losses, losses)] if p[2] or p[1] is _draw_kept]
    count = len(panels) + len(tried)
    figure = Figure(figsize=(7.5, 0.6 + 2.0 * count), dpi=150, facecolor="white", layout="constrained")
    axes = list(figure.subplots(count, 1, squeeze=False)[:, 0])
    for ax, (title, draw, values) in zip(axes, panels, strict=False):
        draw(ax, values, last)
        ax.set_ylabel(title)
        ax.set_xlim(0, 1.02 * last)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        moved = [step for step, before, after in kept if before != after]
        if moved:
            ax.axvline(moved[-1], color=_GREY, linestyle=":", linewidth=1)
    axes[0].yaxis.set_major_formatter(FuncFormatter(lambda v, _: brief(v)))
    axes[len(panels) - 1].set_xlabel("step (dotted: the last change of rank)")
    for ax, entry in zip(axes[len(panels) :], tried, strict=True):
        _draw_tried(ax, entry)
    for ax in axes:
        ax.grid(color="#e6e6e6", linewidth=0.6)
        ax.set_axisbelow(True)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    figure.align_ylabels(axes)
    _save(figure, path)


def _draw_kept(ax: Any, kept: Sequence[tuple[int, int | None, int]], last: int) -> None:
    if not kept:
        ax.text(0.5, 0.5, "no rank was changed", transform=ax.transAxes, ha="center", va="center")
        ax.set_yticks([])
        return
    before = kept[0][1] or kept[0][2]
    steps, sizes = [0, *(step for step, *_ in kept), last], [before, *(after for *_, after in kept), kept[-1][2]]
    ax.step(steps, sizes, where="post", color=_BLUE)
    ax.fill_between(steps, sizes, step="post", color=_BLUE, alpha=0.12)
    ax.annotate(brief(kept[-1][2]), (last, kept[-1][2]), xytext=(0, 4), textcoords="offset points", ha="right")
    ax.set_ylim(0, 1.12 * max(sizes))


def _draw_prices(ax: Any, prices: Sequence[tuple[int, float]], last: int) -> None:
    ax.semilogy(*zip(*prices, strict=True), color=_RED, marker="o", markersize=3)


def _draw_losses(ax: Any, losses: Sequence[tuple[int, float]], last: int) -> None:
    ax.plot(*zip(*losses, strict=True), color=_GREEN, marker="o", markersize=4)


def _draw_tried(ax: Any, entry: Mapping[str, Any]) -> None:
    """Evenly spaced, as each budget is half of the one before and the least is 0."""
    found = sorted((int(budget), loss) for budget, loss in entry["tried"].items())
    ax.plot(range(len(found)), [loss for _, loss in found], color=_GREEN, marker="o", markersize=4)
    ax.set_xticks(range(len(found)), [brief(budget) for budget, _ in found])
    near = min(range(len(found)), key=lambda i: abs(found[i][0] - int(entry.get("budget", 0))))
    ax.plot([near], [found[near][1]], marker="o", markersize=11, markerfacecolor="none", color=_RED)
    ax.set_ylabel("validation loss")
    ax.set_xlabel(f"budgets tried after step {entry['step']}, in parameters (ringed: chosen)")


def brief(amount: float) -> str:
    """A count in a few characters: 12,340 is 12.3k."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if amount >= size:
            return f"{amount / size:.3g}{unit}"
    return f"{amount:.0f}"


def _save(figure: Any, path: str | Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    with storage(f"picture {path}"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(buffer.getvalue())
