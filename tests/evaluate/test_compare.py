"""Bootstrap intervals and the paired comparison of base and tuned."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from trivet.evaluate.compare import bootstrap_interval, compare
from trivet.evaluate.metrics import (
    Metric,
    classification_metrics,
    likelihood_metrics,
    mean_metric,
    regression_metrics,
)
from trivet.evaluate.text_metrics import text_metrics


def noisy_pair(n: int = 200, gain: float = 0.1, seed: int = 0) -> tuple[Metric, Metric]:
    """Two models that find the same examples hard, one better by `gain` throughout, but for a little noise."""
    generator = np.random.default_rng(seed)
    hardness = generator.normal(size=n)
    return (
        mean_metric("score", hardness),
        mean_metric("score", hardness + gain + generator.normal(scale=0.1, size=n)),
    )


def test_interval_is_deterministic_by_seed():
    metric, _ = noisy_pair()
    assert bootstrap_interval(metric, seed=3) == bootstrap_interval(metric, seed=3)
    assert bootstrap_interval(metric, seed=3) != bootstrap_interval(metric, seed=4)


def test_interval_of_a_mean_nears_the_normal_one():
    metric, _ = noisy_pair(n=400)
    half = 1.96 * metric.rows.std() / math.sqrt(400)
    assert half > 0.05
    assert bootstrap_interval(metric, resamples=4000) == pytest.approx(
        (metric.score - half, metric.score + half), abs=0.01
    )


def test_interval_of_all_resamples_by_hand():
    """Of two examples 0 and 1 the mean is 0, 0.5 or 1 with chances 1/4, 1/2, 1/4."""
    metric = mean_metric("score", [0.0, 1.0])
    assert bootstrap_interval(metric, level=0.6) == (0.0, 1.0)
    assert bootstrap_interval(metric, level=0.4) == (0.5, 0.5)


def test_interval_covers_the_true_mean_about_as_often_as_it_says():
    generator = np.random.default_rng(5)
    trials = 300
    covered = 0
    for trial in range(trials):
        metric = mean_metric("accuracy", generator.random(150) < 0.7)
        low, high = bootstrap_interval(metric, resamples=200, seed=trial)
        covered += low <= 0.7 <= high
    assert 0.91 <= covered / trials <= 0.98


def test_difference_of_identical_sides_is_exactly_zero():
    predictions = ["the cat sat on the mat today", "", "a dog", "one two three four five six"]
    references = [["the cat sat on a mat today", "cat"], ["nothing"], ["a dog"], ["one two three four five", "six"]]
    result = compare(text_metrics(predictions, references), text_metrics(predictions, references), resamples=50)
    assert len(result.metrics) == 8
    for metric in result.metrics.values():
        assert metric.difference == 0 and metric.difference_interval == (0.0, 0.0) and metric.better is None
        assert metric.base_interval == metric.tuned_interval


def test_sides_share_resamples_with_each_other_and_with_the_single_interval():
    base, tuned = noisy_pair()
    result = compare([base], [tuned], seed=7).metrics["score"]
    assert result.base_interval == bootstrap_interval(base, seed=7)
    assert result.tuned_interval == bootstrap_interval(tuned, seed=7)
    # For a mean, the paired difference is the mean of the differences example by example.
    paired = mean_metric("score", tuned.rows[:, 0] - base.rows[:, 0])
    assert result.difference_interval == pytest.approx(bootstrap_interval(paired, seed=7))


def test_pairing_finds_what_separate_intervals_hide():
    base, tuned = noisy_pair(gain=0.05)
    result = compare([base], [tuned]).metrics["score"]
    assert result.base_interval[1] > result.tuned_interval[0]  # they overlap
    assert result.better is True
    assert result.difference == pytest.approx(tuned.score - base.score)


def test_better_follows_the_direction_of_the_metric():
    tokens, correct = [10] * 40, [5] * 40
    noise = np.random.default_rng(0).normal(size=40)
    worse, improved = (10 + noise).tolist(), (6 + noise).tolist()
    base, tuned = likelihood_metrics(worse, tokens, correct), likelihood_metrics(improved, tokens, correct)
    forth, back = compare(base, tuned, resamples=100).metrics, compare(tuned, base, resamples=100).metrics
    assert [forth[name].better for name in ("loss", "perplexity", "token_accuracy")] == [True, True, None]
    assert [back[name].better for name in ("loss", "perplexity", "token_accuracy")] == [False, False, None]
    assert forth["loss"].difference == pytest.approx(-0.4)


def test_metrics_are_matched_by_name_and_all_use_the_same_resamples():
    base, tuned = noisy_pair()
    other = mean_metric("other", -base.rows[:, 0])
    result = compare([base, other], [other, tuned], seed=1)
    assert list(result.metrics) == ["score", "other"]
    assert result.metrics["score"].tuned == tuned.score
    low, high = result.metrics["score"].base_interval
    assert result.metrics["other"].base_interval == pytest.approx((-high, -low), abs=1e-2)
    assert result.metrics["score"] == compare([base], [tuned], seed=1).metrics["score"]


def test_undefined_resamples_are_ignored_up_to_half_of_them():
    gold = list(range(20))
    rare, common = [0.0] * 19 + [1.0], [0.0] * 10 + [1.0] * 10  # the resample misses the 1.0 with chance 0.36
    pearson = regression_metrics(rare, gold)[0]
    assert all(math.isfinite(end) for end in bootstrap_interval(pearson))
    result = compare(regression_metrics([2.0] * 20, gold), regression_metrics(common, gold), resamples=60)
    constant = result.metrics["pearson"]
    assert math.isnan(constant.base) and all(map(math.isnan, constant.base_interval))
    assert constant.tuned > 0.8 and constant.tuned_interval[0] > 0.5
    assert all(map(math.isnan, constant.difference_interval)) and constant.better is None
    out = result.to_dict()
    assert out["metrics"]["base"]["pearson"] is None
    assert out["intervals"]["difference"]["pearson"] == [None, None]
    assert [row[1] for row in result.table() if row[0] == "pearson"] == ["nan"]


def test_more_than_half_undefined_gives_no_interval():
    mostly = Metric("mostly", np.arange(8.0)[:, None], lambda rows: math.nan if (rows == 0).any() else 1.0)
    assert all(map(math.isnan, bootstrap_interval(mostly)))  # the chance of a 0 among 8 draws is 0.66
    seldom = Metric("seldom", np.arange(8.0)[:, None], lambda rows: 1.0 if (rows == 0).any() else math.nan)
    assert bootstrap_interval(seldom) == (1.0, 1.0)


def test_an_overflown_perplexity_stays_infinite_and_becomes_none_in_json():
    base, tuned = likelihood_metrics([1e6] * 5, [1] * 5, [0] * 5), likelihood_metrics([1.0] * 5, [1] * 5, [0] * 5)
    result = compare(base, tuned, resamples=20)
    perplexity = result.metrics["perplexity"]
    assert perplexity.base_interval == (math.inf, math.inf)
    assert perplexity.difference_interval == (-math.inf, -math.inf) and perplexity.better is True
    assert result.to_dict()["intervals"]["base"]["perplexity"] == [None, None]
    both = compare(base, base, resamples=20).metrics["perplexity"]
    assert all(map(math.isnan, both.difference_interval)) and both.better is None


def test_to_dict_has_the_agreed_shape_and_is_json():
    base = classification_metrics([0, 1, 1, 0], [0, 1, 0, 1], 2)
    tuned = classification_metrics([0, 1, 0, 0], [0, 1, 0, 1], 2)
    result = compare(base, tuned, resamples=30)
    out = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    names = {"accuracy", "macro_f1", "matthews"}
    assert set(out) == {"metrics", "intervals", "n"} and out["n"] == 4
    assert set(out["metrics"]) == {"base", "tuned"}
    assert set(out["intervals"]) == {"base", "tuned", "difference"}
    assert all(set(side) == names for part in ("metrics", "intervals") for side in out[part].values())
    assert out["metrics"]["base"]["accuracy"] == 0.5 and out["metrics"]["tuned"]["accuracy"] == 0.75
    assert out["intervals"]["difference"]["accuracy"] == list(result.metrics["accuracy"].difference_interval)


def test_table_prints_each_metric_with_its_difference():
    base, tuned = mean_metric("accuracy", [0, 0, 0, 0]), mean_metric("accuracy", [1, 1, 1, 1])
    assert compare([base], [tuned], resamples=5).table() == [("accuracy", "0", "1", "+1 [+1, +1]")]


@pytest.mark.parametrize(
    ("base", "tuned", "message"),
    [
        ({"a": 3}, {"a": 4}, "base a has 3, tuned a has 4"),
        ({"a": 3, "b": 2}, {"a": 3, "b": 2}, "numbers of examples differ"),
        ({"a": 3}, {"b": 3}, r"base has the metrics \['a'\] and tuned has \['b'\]"),
        ({"a": 3, "b": 3}, {"a": 3}, r"tuned has \['a'\]"),
        ({}, {}, "at least one"),
    ],
)
def test_compare_refuses_sides_that_do_not_match(base, tuned, message):
    sides = [[mean_metric(name, [0.0] * n) for name, n in side.items()] for side in (base, tuned)]
    with pytest.raises(ValueError, match=message):
        compare(*sides)


def test_compare_refuses_a_metric_given_twice():
    metric = mean_metric("a", [0.0])
    with pytest.raises(ValueError, match="each once"):
        compare([metric, metric], [metric, metric])


@pytest.mark.parametrize("setting", [{"resamples": 0}, {"level": 0.0}, {"level": 95}])
def test_settings_out_of_range_are_refused(setting):
    metric = mean_metric("a", [0.0, 1.0])
    with pytest.raises(ValueError, match="resamples must be at least 1 and level between 0 and 1"):
        bootstrap_interval(metric, **setting)
    with pytest.raises(ValueError, match="resamples must be at least 1 and level between 0 and 1"):
        compare([metric], [metric], **setting)
