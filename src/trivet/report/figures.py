"""What the page of one run shows: its figures, as texts and drawings."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from trivet.configio import dump
from trivet.memory import gib
from trivet.methods import find_method
from trivet.pictures import kinds, place
from trivet.report import charts
from trivet.report.charts import Series
from trivet.report.load import LOWER_IS_BETTER, Run, is_number
from trivet.report.remarks import remarks
from trivet.report.words import clock, mean, middle_out

#: Examples that are shown.
_EXAMPLES = 6
#: What the first line of figures shows beside the loss: the first of these that was measured.
_MAIN = ("rougeL", "accuracy", "number_match", "pearson", "bleu", "token_accuracy")


def parts(run: Run) -> dict[str, Any]:
    """Everything that the page of one run shows."""
    result, data = run.result, run.result.get("data") or {}
    return {
        "remarks": remarks(run),
        "method": method_words(run),
        "tiles": _tiles(run),
        "metrics": metrics(run),
        "losses": charts.line_chart(
            [
                Series(_training(run), smooth_losses(run), "line", 1),
                Series("validation", run.validations, "dots", 2),
            ],
            label="loss", wide=520, high=260,
        ),
        "ranks": _rank_map(run),
        "path": _rank_path(run),
        "kept": charts.line_chart(
            [Series("kept", kept_path(run), "steps", 1)], label="numbers in the adapter", high=150, zero=True
        ),
        "prices": _prices(run),
        "tried": _tried(run),
        "trials": _trials(run),
        "unused": _unused(run),
        "speed": charts.line_chart(
            [Series("speed", speeds(run), "line", 1)], label="tokens a second", high=150, zero=True
        ),
        "memory": charts.line_chart(
            [Series("memory", memories(run), "line", 2)], label="memory held, GiB", high=150, zero=True
        ),
        "examples": [_example(row) for row in run.predictions[:_EXAMPLES]],
        "data": data,
        "sample": [(text if learned else middle_out(text, 800), learned) for text, learned in data.get("sample") or []],
        "command": command(run),
        "from_python": run.config.data.train is None,
        "config_text": dump(run.config),
        "facts": _facts(result),
    }  # fmt: skip


def smooth_losses(run: Run) -> list[charts.Point]:
    """The training losses, as means over a twentieth of the run."""
    return charts.smoothed(run.losses, max(1, len(run.losses) // 20))


def _training(run: Run) -> str:
    return "training" if len(run.losses) < 40 else "training (mean of 5% of the steps)"


def method_words(run: Run) -> str:
    """The method's name, or its parts."""
    method = run.config.method
    return method if isinstance(method, str) else str(find_method(method))


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """(what, figure, small print), the figures that are looked for first."""
    result, out = run.result, []
    base, tuned = ((result.get("metrics") or {}).get(side) or {} for side in ("base", "tuned"))
    names = [name for name in ("loss", "mse") if name in tuned][:1] + [name for name in _MAIN if name in tuned][:1]
    for name in names:
        if is_number(base.get(name)) and is_number(tuned.get(name)):
            out.append((name, f"{base[name]:.3g} → {tuned[name]:.3g}", "base → tuned"))
    if run.validations:
        step, least = min(run.validations, key=lambda v: v[1])
        out.append(("best validation loss", f"{least:.4g}", f"at step {step}"))
    trained, total = result.get("trainable_parameters"), result.get("total_parameters")
    if trained:
        out.append(("trained", charts.short(trained), f"{trained / total:.2%} of the model" if total else "numbers"))
    elif run.steps:
        out.append(("adapter", charts.short(run.steps[-1].get("adapter_parameters") or 0), "numbers, so far"))
    rate = result.get("tokens_per_second") or mean([v for _, v in speeds(run)])
    if rate:
        out.append(("speed", f"{rate:,.0f}", "tokens a second"))
    peak = result.get("peak_memory_bytes") or max((row.get("memory_bytes") or 0 for row in run.steps), default=0)
    if peak:
        out.append(("peak memory", gib(peak), str(result.get("device") or "so far")))
    if result.get("wall_seconds"):
        out.append(("time", clock(result["wall_seconds"]), "with evaluation"))
    return out


def metrics(run: Run) -> list[dict[str, Any]]:
    """A row for each metric: values, the difference with its interval, and whether it is better."""
    result, rows = run.result, []
    base, tuned = ((result.get("metrics") or {}).get(side) or {} for side in ("base", "tuned"))
    for name, after in tuned.items():
        before = base.get(name)
        if not is_number(before) or not is_number(after):
            continue
        ends: Sequence[Any] = ((result.get("intervals") or {}).get("difference") or {}).get(name) or ()
        known = len(ends) == 2 and all(map(is_number, ends))
        low, high = ends if known else (0.0, 0.0)
        good = (high < 0) == (name in LOWER_IS_BETTER) if low > 0 or high < 0 else None
        rows.append({
            "name": name,
            "base": f"{before:.4g}",
            "tuned": f"{after:.4g}",
            "difference": f"{after - before:+.3g}",
            "interval": f"[{low:+.3g}, {high:+.3g}]" if known else "",
            "bar": charts.interval_bar(low, high, after - before, good=good) if known else "",
            "verdict": {True: "better", False: "worse", None: "not told apart"}[good],
            "n": (result.get("n") or {}).get(name),
        })  # fmt: skip
    return rows


def _grid(values: Mapping[str, float]) -> tuple[list[str], list[str], dict[tuple[int, int], float]]:
    """Values by layer as rows of modules and columns of blocks; layers that share a cell as their mean."""
    labels = kinds(values)
    rows = list(dict.fromkeys(labels.values()))
    blocks = max((place(name).block or 0 for name in values), default=0) + 1
    cells: dict[tuple[int, int], list[float]] = {}
    for name, value in values.items():
        cells.setdefault((rows.index(labels[name]), place(name).block or 0), []).append(value)
    return rows, [str(i) for i in range(blocks)], {at: sum(v) / len(v) for at, v in cells.items()}


def final_ranks(run: Run) -> dict[str, float]:
    """The rank of every layer at the end, those that have left as 0."""
    decided = [h["ranks"] for h in run.result.get("rank_history") or [] if h.get("ranks")]
    ranks = {name: 0.0 for h in decided for name in h} | {
        name: float(rank) for name, rank in (run.result.get("ranks") or {}).items()
    }
    if not ranks and run.inspection is not None:
        ranks = {layer.name: float(layer.rank) for layer in run.inspection.layers}
    return ranks


def _rank_map(run: Run) -> tuple[str, Any]:
    """A title and a map of ranks; where they are all the same, of how much of them is used."""
    ranks, unit = final_ranks(run), "rank"
    title = "Where the ranks are"
    if len(set(ranks.values())) == 1 and run.inspection is not None:
        title = f"Rank {next(iter(ranks.values())):g} everywhere: how much of it is used"
        ranks, unit = {layer.name: layer.effective_rank for layer in run.inspection.layers}, "effective rank"
    if not ranks:
        return title, ""
    rows, columns, values = _grid(ranks)
    return title, charts.heat_map(rows, columns, values, across="block", unit=unit)


def _rank_path(run: Run) -> Any:
    """Mean ranks of each kind of module after each decision."""
    decided = [h for h in run.result.get("rank_history") or [] if h.get("ranks")]
    if not decided:
        return ""
    names = list(dict.fromkeys(name for h in decided for name in h["ranks"]))
    labels = kinds(names)
    rows = list(dict.fromkeys(labels.values()))
    values = {}
    for j, entry in enumerate(decided):
        for i, kind in enumerate(rows):
            own = [entry["ranks"].get(name, 0) for name in names if labels[name] == kind]
            values[i, j] = sum(own) / len(own)
    steps = [str(h["step"]) for h in decided]
    return charts.heat_map(rows, steps, values, across="after step", unit="mean rank")


def kept_path(run: Run) -> list[charts.Point]:
    """(step, numbers in the adapter)."""
    rows = [(row["step"], row["adapter_parameters"]) for row in run.steps if is_number(row.get("adapter_parameters"))]
    if rows:
        return [rows[0], *(b for a, b in itertools.pairwise(rows) if a[1] != b[1]), rows[-1]]
    history = [h for h in run.result.get("rank_history") or [] if is_number(h.get("parameters"))]
    return [(h["step"], h["parameters"]) for h in history]


def _prices(run: Run) -> Any:
    points = [(h["step"], h["price"]) for h in run.result.get("rank_history") or [] if is_number(h.get("price"))]
    points = [p for p in points if p[1] > 0]
    chart = charts.line_chart([Series("price", points, "dots", 3)], label="price, nats a number", high=150, log=True)
    return chart if points else ""


def _tried(run: Run) -> list[dict[str, Any]]:
    """What `auto` tried: budgets with their validation losses, and which it chose."""
    return [
        {
            "step": h["step"],
            "budget": h.get("budget"),
            "rows": [(charts.short(float(b)), f"{loss:.4g}") for b, loss in h["tried"].items() if is_number(loss)],
        }
        for h in run.result.get("rank_history") or []
        if h.get("tried")
    ]


def _trials(run: Run) -> list[tuple[str, str]]:
    """Learning rates that were tried, with the losses of their trials."""
    return [
        (f"{trial['learning_rate']:.2g}", f"{trial['loss']:.4f}" if is_number(trial.get("loss")) else "diverged")
        for trial in run.result.get("learning_rate_trials") or []
        if is_number(trial.get("learning_rate"))
    ]


def _unused(run: Run) -> list[dict[str, Any]]:
    if run.inspection is None:
        return []
    return [
        {"kind": s.kind, "rank": f"{s.mean_rank:.1f}", "effective": f"{s.effective_rank:.1f}", "unused": s.unused,
         "parameters": charts.short(s.parameters)}
        for s in [*run.inspection.by_kind(), run.inspection.total]
    ]  # fmt: skip


def speeds(run: Run) -> list[charts.Point]:
    """(step, tokens a second), a mean over a twentieth of the run."""
    rows = [r for r in run.steps if r.get("step_seconds") and r.get("tokens")]
    return charts.smoothed([(r["step"], r["tokens"] / r["step_seconds"]) for r in rows], max(1, len(rows) // 20))


def memories(run: Run) -> list[charts.Point]:
    """(step, GiB held)."""
    return [(r["step"], r["memory_bytes"] / 2**30) for r in run.steps if is_number(r.get("memory_bytes"))]


def _example(row: Mapping[str, Any]) -> dict[str, Any]:
    """A prediction as (what, text) pairs, and whether base and tuned gave the gold answer."""
    gold = row.get("references") or row.get("label", row.get("answer"))
    wanted = [str(g) for g in gold] if isinstance(gold, list) else [str(gold)]
    asked = str(row.get("prompt", row.get("text", "")))
    if row.get("text_pair"):
        asked += f"\n—\n{row['text_pair']}"
    if row.get("choices"):
        asked += "\n" + "\n".join(f"• {choice}" for choice in row["choices"])
    answers = {side: str(row.get(side, "")) for side in ("base", "tuned")}
    right = {side: text.strip() in [w.strip() for w in wanted] for side, text in answers.items()}
    return {"asked": asked, "wanted": wanted, "right": right, **answers}


def command(run: Run) -> str:
    """What trains the same again, into a folder of its own."""
    path = run.folder.path
    return f"trivet train {shlex.quote(str(run.folder.config))} {shlex.quote(f'output_dir={path}-again')}"


def _facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    data, proof = result.get("data") or {}, result.get("proof") or {}
    facts = {
        "seed": result.get("seed"),
        "finished": result.get("finished"),
        "saved adapter against the trained model": (
            f"relative logit error {proof['relative_logit_error']:.1e}, tolerance {proof['tolerance']:.0e}"
            if is_number(proof.get("relative_logit_error")) and is_number(proof.get("tolerance")) else None
        ),
        **{f"fingerprint of {split}": value for split, value in (data.get("fingerprints") or {}).items()},
        **(result.get("versions") or {}),
    }  # fmt: skip
    return [(name, str(value)) for name, value in facts.items() if value is not None]
