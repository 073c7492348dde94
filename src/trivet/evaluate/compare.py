"""Base against tuned, with bootstrap intervals.

The examples are resampled with replacement and the metric is computed on each resample (Efron 1979,
https://doi.org/10.1214/aos/1176344552; for corpus metrics of text Koehn 2004, https://aclanthology.org/W04-3250).
Both models see the same resamples, so that what makes an example hard for both cancels out of the difference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trivet.errors import ConfigError, DataError
from trivet.evaluate.metrics import Metric

Interval = tuple[float, float]


@dataclass(frozen=True)
class MetricComparison:
    """One metric of base and tuned; `difference` is tuned - base.

    Intervals are (low, high), or (nan, nan) where they are undefined.
    """

    base: float
    tuned: float
    difference: float
    base_interval: Interval
    tuned_interval: Interval
    difference_interval: Interval
    higher_is_better: bool

    @property
    def better(self) -> bool | None:
        """True or False where the interval of the difference excludes 0, else None (also where it is undefined)."""
        low, high = self.difference_interval
        if low > 0:
            return self.higher_is_better
        if high < 0:
            return not self.higher_is_better
        return None


@dataclass(frozen=True)
class Comparison:
    """All metrics of base and tuned on the same `n` examples, by metric name."""

    metrics: Mapping[str, MetricComparison]
    n: int

    def to_dict(self) -> dict[str, object]:
        """The values and intervals as JSON holds them; what is not a finite number becomes None."""

        def ends(interval: Interval) -> list[float | None]:
            return [_finite(end) for end in interval]

        items = self.metrics.items()
        return {
            "metrics": {
                "base": {name: _finite(metric.base) for name, metric in items},
                "tuned": {name: _finite(metric.tuned) for name, metric in items},
            },
            "intervals": {
                "base": {name: ends(metric.base_interval) for name, metric in items},
                "tuned": {name: ends(metric.tuned_interval) for name, metric in items},
                "difference": {name: ends(metric.difference_interval) for name, metric in items},
            },
            "n": self.n,
        }

    def table(self) -> list[tuple[str, str, str, str]]:
        """Rows (name, base, tuned, difference with its interval) for printing, to four significant digits."""
        return [
            (
                name,
                f"{metric.base:.4g}",
                f"{metric.tuned:.4g}",
                "{:+.4g} [{:+.4g}, {:+.4g}]".format(metric.difference, *metric.difference_interval),
            )
            for name, metric in self.metrics.items()
        ]


def bootstrap_interval(metric: Metric, resamples: int = 1000, level: float = 0.95, seed: int = 0) -> Interval:
    """Percentile bootstrap interval of one metric.

    Args:
        metric: the metric.
        resamples: number of bootstrap resamples.
        level: coverage aimed at, between 0 and 1.
        seed: of the random numbers; the same seed gives the same resamples as in `compare`.

    Returns:
        (low, high). Resamples on which the metric is nan are ignored; (nan, nan) if more than half are.

    Raises:
        ConfigError: if `resamples` or `level` is out of range.
    """
    _check_settings(resamples, level)
    indices = _resample_indices(len(metric.rows), resamples, seed)
    return _percentile_interval(np.array([metric.value(metric.rows[index]) for index in indices]), level)


def compare(
    base: Sequence[Metric], tuned: Sequence[Metric], resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> Comparison:
    """Compares the metrics of the base and the tuned model on the same examples, in the same order.

    Args:
        base: metrics of the base model.
        tuned: metrics of the tuned model, with the same names and number of examples.
        resamples: number of bootstrap resamples, shared by both models and all metrics.
        level: coverage aimed at by each interval, between 0 and 1.
        seed: of the random numbers.

    Returns:
        The comparison, in the order of `base`. Undefined values are treated as in `bootstrap_interval`.

    Raises:
        DataError: if the two sides differ in metric names or number of examples, or have no metric.
        ConfigError: if `resamples` or `level` is out of range.
    """
    _check_settings(resamples, level)
    names = [metric.name for metric in base]
    n = _check_sides(base, tuned)
    by_name = {metric.name: metric for metric in tuned}
    sides = np.empty((resamples, 2, len(names)))
    # One set of indices at a time: the whole matrix of resamples x n indices would grow with the data.
    for drawn, index in enumerate(_resample_indices(n, resamples, seed)):
        for column, metric in enumerate(base):
            other = by_name[metric.name]
            sides[drawn, 0, column] = metric.value(metric.rows[index])
            sides[drawn, 1, column] = other.value(other.rows[index])
    with np.errstate(invalid="ignore"):  # inf - inf, as of two overflown perplexities, is undefined: nan
        differences = sides[:, 1] - sides[:, 0]

    results = {}
    for column, metric in enumerate(base):
        before, after = metric.score, by_name[metric.name].score
        results[metric.name] = MetricComparison(
            base=before,
            tuned=after,
            difference=after - before,
            base_interval=_percentile_interval(sides[:, 0, column], level),
            tuned_interval=_percentile_interval(sides[:, 1, column], level),
            difference_interval=_percentile_interval(differences[:, column], level),
            higher_is_better=metric.higher_is_better,
        )
    return Comparison(results, n)


def _resample_indices(n: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    generator = np.random.default_rng(seed)
    for _ in range(resamples):
        yield generator.integers(n, size=n)


def _percentile_interval(values: np.ndarray, level: float) -> Interval:
    defined = values[~np.isnan(values)]
    if 2 * len(defined) < len(values):
        return (math.nan, math.nan)
    tail = (1 - level) / 2
    # The outer neighbour of each quantile, itself a value: interpolation would make nan of inf.
    low = np.quantile(defined, tail, method="lower")
    high = np.quantile(defined, 1 - tail, method="higher")
    return (float(low), float(high))


def _check_settings(resamples: int, level: float) -> None:
    if resamples < 1 or not 0 < level < 1:
        raise ConfigError(
            f"cannot compute bootstrap intervals with resamples={resamples} and level={level}: "
            "resamples must be at least 1 and level between 0 and 1, such as 1000 and 0.95."
        )


def _check_sides(base: Sequence[Metric], tuned: Sequence[Metric]) -> int:
    """The number of examples that all metrics share."""
    ours, theirs = ([metric.name for metric in side] for side in (base, tuned))
    if not ours or sorted(ours) != sorted(theirs) or len(set(ours)) != len(ours):
        raise DataError(
            f"cannot compare base and tuned: base has the metrics {ours} and tuned has {theirs}. "
            "Compute the same metrics, each once and at least one, on both sides."
        )
    sizes = {f"{side} {m.name}": len(m.rows) for side, ms in (("base", base), ("tuned", tuned)) for m in ms}
    if len(set(sizes.values())) != 1:
        listed = ", ".join(f"{name} has {size}" for name, size in sizes.items())
        raise DataError(
            f"cannot compare base and tuned: their numbers of examples differ ({listed}). "
            "Evaluate both on the same rows of the same file, in the same order."
        )
    return len(base[0].rows)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
