"""Adapters against each other on the same rows: paired differences with intervals, and what they say in words."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trivet.data.dataset import Dataset
from trivet.errors import ConfigError, DataError
from trivet.evaluate.compare import MetricComparison, compare
from trivet.evaluate.measure import Evaluation, Settings, Side
from trivet.evaluation import rows_of
from trivet.runfolder import adapter_folder
from trivet.session import LABELLED, reopen

#: The word for the base model of the first adapter, its adapter switched off.
BASE = "base"
#: A verdict is on the first of these that was measured.
_MAIN = ("loss", "accuracy", "mse", "rougeL")


@dataclass(frozen=True)
class Pair:
    """A candidate against the first one; in `evaluation` the first one stands as base and the other as tuned."""

    first: str
    other: str
    evaluation: Evaluation

    @property
    def metrics(self) -> dict[str, tuple[MetricComparison, int]]:
        """By name: the difference other - first with its interval, and the rows behind it."""
        return {name: (m, c.n) for c in self.evaluation.comparisons for name, m in c.metrics.items()}

    @property
    def verdict(self) -> str:
        """In words, on the main metric, and which of the others say something."""
        found = self.metrics
        main = next((name for name in _MAIN if name in found), next(iter(found)))
        m, n = found[main]
        low, high = m.difference_interval
        figures = f"{main} {m.difference:+.3g} [{low:+.3g}, {high:+.3g}]"
        if math.isnan(low):
            out = f"{self.other} and {self.first} can't be told apart: the difference in {main} is not defined"
        elif m.better is None:
            out = f"no difference between {self.other} and {self.first} that {n:,} rows can show: {figures}"
        else:
            out = f"{self.other} is {'better' if m.better else 'worse'} than {self.first}: {figures} on {n:,} rows"
        for better, word in ((True, "better"), (False, "worse")):
            names = [name for name, (other, _) in found.items() if other.better is better and name != main]
            if names:
                out += f"; {word} in {', '.join(names)}"
        return out

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; what is not a finite number is None."""

        def value(x: float) -> float | None:
            return x if math.isfinite(x) else None

        return {
            "first": self.first,
            "other": self.other,
            "verdict": self.verdict,
            "metrics": {
                name: {
                    "first": value(m.base),
                    "other": value(m.tuned),
                    "difference": value(m.difference),
                    "interval": [value(end) for end in m.difference_interval],
                    "better": m.better,
                    "n": n,
                }
                for name, (m, n) in self.metrics.items()
            },
        }


@dataclass(frozen=True)
class Compared:
    """Every candidate against the first one, on the rows of `source`; `remarks` say what was left out and why."""

    pairs: Sequence[Pair]
    source: str
    rows: int
    remarks: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**vars(self), "pairs": [pair.to_dict() for pair in self.pairs], "remarks": list(self.remarks)}


def compare_adapters(
    candidates: Sequence[str],
    *,
    data: str | None = None,
    max_rows: int | None = None,
    settings: Settings | None = None,
    base_model: str | None = None,
) -> Compared:
    """Measure two or more candidates on the same rows, one after the other, and compare each with the first.

    Args:
        candidates: run folders, adapter folders, or `base` for the base model of the first adapter among them.
        data: a file or hub id; None takes the test (else validation) rows of the first run among them.
        max_rows: at most so many rows.
        base_model: for adapters that do not say which they belong to.

    Raises:
        ConfigError: fewer than two candidates, one named twice, or no rows to measure on.
        DataError: the candidates have nothing in common that could be compared.
    """
    settings = settings or Settings()
    names = _names(candidates)
    adapters = [c for c in candidates if c != BASE]
    if len(candidates) < 2 or not adapters:
        raise ConfigError("name two candidates or more, at least one of them an adapter or run folder")
    for candidate in adapters:
        adapter_folder(Path(candidate))  # what is not there should show now, not after the first has been measured
    rows: Dataset | None = None
    sides: dict[str, tuple[Side, Any]] = {}
    remarks = []
    for candidate in adapters:
        session = reopen(Path(candidate), base_model=base_model)
        if rows is None:
            rows = rows_of(Path(candidate), session, data)[0].take(max_rows)
        evaluator = session.evaluator(rows, settings)
        # What a loss is of: the same tokens, or it can't be compared.
        seen = None if session.base.task in LABELLED else [(r["input_ids"], r["labels"]) for r in evaluator.rows]
        sides[candidate] = evaluator.measure(session.model), (session.base.task, seen)
        if BASE in candidates and BASE not in sides:
            with session.model.disable_adapter():
                sides[BASE] = evaluator.measure(session.model), (session.base.task, seen)
            if len(adapters) > 1:
                remarks.append(f"base is {session.base.name}, the base model of {names[candidate]}")
        del session, evaluator
        gc.collect()  # one model at a time
    assert rows is not None  # noqa: S101 - there is an adapter
    first, *others = candidates
    pairs = []
    for other in others:
        (mine, (task, seen)), (theirs, (their_task, their_seen)) = sides[first], sides[other]
        if task != their_task:
            raise DataError(f"{names[first]} is for {task} and {names[other]} for {their_task}: nothing to compare")
        groups = list(zip(mine.groups, theirs.groups, strict=True))
        if seen != their_seen:
            left_out = ", ".join(m.name for m in groups[0][0])
            remarks.append(
                f"{left_out} of {names[other]} are left out: it reads the rows as other tokens than {names[first]}"
            )
            groups = groups[1:]
        if not groups:
            raise DataError(
                f"{names[first]} and {names[other]} read the rows as different tokens, so their losses can't be "
                "compared; rows with a prompt and an answer can be compared by what is written"
            )
        comparisons = [compare(a, b, resamples=settings.resamples) for a, b in groups]
        pairs.append(Pair(names[first], names[other], Evaluation(comparisons)))
    return Compared(pairs, rows.source, len(rows), remarks)


def _names(candidates: Sequence[str]) -> dict[str, str]:
    """What each candidate is called: its run's or folder's name, or its path where two are alike."""
    paths = {c: Path(c).resolve() for c in candidates}
    short = {c: BASE if c == BASE else (p.parent if p.name == "adapter" else p).name for c, p in paths.items()}
    if len(short) < len(candidates):
        twice = next(c for c in candidates if candidates.count(c) > 1)
        raise ConfigError(f"{twice} is named twice; name each candidate once")
    return short if len(set(short.values())) == len(short) else {c: c for c in candidates}
