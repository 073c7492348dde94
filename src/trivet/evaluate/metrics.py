"""Evaluation metrics as per-example sufficient statistics, so that a bootstrap never scores a text twice.

A `Metric` is a matrix with one row of statistics per example, and a function from any multiset of those rows to
the corpus value. A bootstrap resample is then `metric.value(metric.rows[indices])`. Metrics of generated text are
in `trivet.evaluate.text_metrics`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal

import numpy as np

from trivet.errors import DataError


@dataclass(frozen=True)
class Metric:
    """One metric over n examples.

    Args:
        name: the key in result.json.
        rows: (n, k) float64, one row of sufficient statistics per example.
        value: maps any multiset of rows, (m, k) with m >= 1, to the corpus metric; nan where it is undefined.
        higher_is_better: False for losses and errors. Default True.

    Raises:
        DataError: if `rows` is not a matrix with at least one row.
    """

    name: str
    rows: np.ndarray
    value: Callable[[np.ndarray], float]
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        if self.rows.ndim != 2 or len(self.rows) == 0:
            raise DataError(
                f"cannot compute {self.name!r}: it needs one row of statistics per example and at least one "
                f"example, but got an array of shape {self.rows.shape}. Evaluate on a file with at least one row."
            )

    @property
    def score(self) -> float:
        """The metric on the examples as they are."""
        return self.value(self.rows)


def mean_metric(name: str, values: Sequence[float] | np.ndarray, higher_is_better: bool = True) -> Metric:
    """A metric that is the mean of one value per example; `values` has n entries."""
    rows = np.asarray(values, dtype=np.float64).reshape(-1, 1)
    return Metric(name, rows, lambda rows: float(rows.mean()), higher_is_better)


def check_lengths(what: str, **columns: Sequence[object]) -> None:
    """Refuses columns that do not describe the same examples.

    Raises:
        DataError: if the columns differ in length or are empty.
    """
    sizes = {name: len(column) for name, column in columns.items()}
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        listed = ", ".join(f"{size} {name}" for name, size in sizes.items())
        raise DataError(f"cannot compute {what}: got {listed}. Pass one of each per example, and at least one example.")


def likelihood_metrics(nll: Sequence[float], tokens: Sequence[int], correct: Sequence[int]) -> list[Metric]:
    """`loss`, `perplexity` and `token_accuracy` over the supervised tokens.

    Args:
        nll: (n,) negative log-likelihood of each example, summed over its supervised tokens, in nats.
        tokens: (n,) number of supervised tokens of each example; 0 is allowed.
        correct: (n,) how many of them the model predicts correctly by argmax, 0 <= correct <= tokens.

    Returns:
        `loss`: sum of nll / sum of tokens, that is the token-weighted mean, in nats; lower is better.
        `perplexity`: exp(loss), inf where that overflows; lower is better.
        `token_accuracy`: sum of correct / sum of tokens, in 0..1.
        All three are nan where there is no supervised token.

    Raises:
        DataError: if the lengths differ, there is no example, or `correct` is not within 0..tokens.
    """
    check_lengths("likelihood metrics", nll=nll, tokens=tokens, correct=correct)
    rows = np.column_stack([np.asarray(column, dtype=np.float64) for column in (nll, tokens, correct)])
    wrong = np.flatnonzero((rows[:, 2] < 0) | (rows[:, 2] > rows[:, 1]))
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            f"cannot compute likelihood metrics: example {row} has {correct[row]} correct of {tokens[row]} "
            "supervised tokens. Check that the arguments are in the order nll, tokens, correct."
        )

    def per_token(column: int) -> Callable[[np.ndarray], float]:
        def ratio(rows: np.ndarray) -> float:
            count = rows[:, 1].sum()
            return float(rows[:, column].sum() / count) if count else float("nan")

        return ratio

    loss = per_token(0)

    def perplexity(rows: np.ndarray) -> float:
        with np.errstate(over="ignore"):
            return float(np.exp(loss(rows)))

    return [
        Metric("loss", rows, loss, higher_is_better=False),
        Metric("perplexity", rows, perplexity, higher_is_better=False),
        Metric("token_accuracy", rows, per_token(2)),
    ]


# A sign counts only where no operand stands before it: "10-4" ends in 4, "is -4" in -4, "-$4" in -4.
_NUMBER = re.compile(r"(?:(?<![\w)])[-\u2212])?\$?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)")
_NOT_DIGITS = str.maketrans({",": None, "$": None, "\u2212": "-"})


def final_number(text: str) -> str | None:
    """The number a worked answer ends with, as a plain decimal such as "1234.5", or None.

    It is the first number after the last `####` if the text has that mark (the answer format of GSM8K, Cobbe et
    al. 2021, https://arxiv.org/abs/2110.14168), else the last number in the text. Commas, `$` and a period that
    ends the sentence are no part of it.
    """
    _, mark, answer = text.rpartition("####")
    found = _NUMBER.findall(answer)
    if not found:
        return None
    return str(found[0] if mark else found[-1]).translate(_NOT_DIGITS)


def number_match(predictions: Sequence[str], answers: Sequence[str]) -> Metric:
    """`number_match`: how often the generated text ends in the right number, in 0..1.

    Args:
        predictions: (n,) generated texts; a text without a number counts as wrong.
        answers: (n,) gold answers, either the bare number or a worked solution that ends in "#### number".

    Raises:
        DataError: if the lengths differ, there is no example, or a gold answer has no number.
    """
    check_lengths("number_match", predictions=predictions, answers=answers)
    matches = []
    for row, (prediction, answer) in enumerate(zip(predictions, answers, strict=True)):
        gold, got = final_number(answer), final_number(prediction)
        if gold is None:
            raise DataError(
                f"cannot compute number_match: the gold answer of example {row} has no number: {answer[:200]!r}. "
                "Give the number itself or a solution that ends in '#### number'."
            )
        matches.append(got is not None and Decimal(got) == Decimal(gold))
    return mean_metric("number_match", matches)


def classification_metrics(predicted: Sequence[int], gold: Sequence[int], n_labels: int) -> list[Metric]:
    """`accuracy`, `macro_f1` and `matthews` of label indices.

    Args:
        predicted: (n,) predicted labels in 0..n_labels-1.
        gold: (n,) gold labels in 0..n_labels-1.
        n_labels: number of labels of the task.

    Returns:
        `accuracy`: in 0..1.
        `macro_f1`: unweighted mean F1 over the labels that occur in `gold` or `predicted`, in 0..1; equal to
        scikit-learn's `f1_score(average="macro", zero_division=0)`.
        `matthews`: the multi-class correlation R_K of Gorodkin 2004 (https://doi.org/10.1016/j.compbiolchem.2004.09.006),
        in -1..1, and 0 where either side has one label only; equal to scikit-learn's `matthews_corrcoef`.

    Raises:
        DataError: if the lengths differ, there is no example, or a label is out of range.
    """
    check_lengths("classification metrics", predicted=predicted, gold=gold)
    rows = np.column_stack([np.asarray(predicted, dtype=np.float64), np.asarray(gold, dtype=np.float64)])
    outside = np.flatnonzero(~((rows >= 0) & (rows < n_labels)).all(axis=1))
    if len(outside):
        row = int(outside[0])
        raise DataError(
            f"cannot compute classification metrics: example {row} has predicted label {predicted[row]} and gold "
            f"label {gold[row]}, but the task has labels 0..{n_labels - 1}. Check n_labels and the numbering."
        )

    def label_counts(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The diagonal and both margins of the confusion matrix: all that F1 and R_K need of it."""
        ours, theirs = rows.astype(np.intp).T
        hits, guessed, true = (np.bincount(x, minlength=n_labels) for x in (ours[ours == theirs], ours, theirs))
        return hits, guessed, true

    def macro_f1(rows: np.ndarray) -> float:
        hits, guessed, true = label_counts(rows)
        both = guessed + true
        return float(np.mean(2 * hits[both > 0] / both[both > 0]))

    def matthews(rows: np.ndarray) -> float:
        hits, guessed, true = label_counts(rows)
        n = len(rows)
        spread = float(n * n - guessed @ guessed) * float(n * n - true @ true)
        return float((n * hits.sum() - guessed @ true) / np.sqrt(spread)) if spread else 0.0

    return [
        mean_metric("accuracy", rows[:, 0] == rows[:, 1]),
        Metric("macro_f1", rows, macro_f1),
        Metric("matthews", rows, matthews),
    ]


def regression_metrics(predicted: Sequence[float], gold: Sequence[float]) -> list[Metric]:
    """`pearson`, `spearman` and `mse` of real-valued predictions.

    Args:
        predicted: (n,) predictions.
        gold: (n,) targets, in the same unit.

    Returns:
        `pearson`: linear correlation, in -1..1; nan where either side is constant or not finite.
        `spearman`: Pearson correlation of the average ranks among the rows that are scored; nan likewise.
        `mse`: mean squared error in the squared unit of `gold`; lower is better.

    Raises:
        DataError: if the lengths differ or there is no example.
    """
    check_lengths("regression metrics", predicted=predicted, gold=gold)
    rows = np.column_stack([np.asarray(predicted, dtype=np.float64), np.asarray(gold, dtype=np.float64)])

    def pearson(rows: np.ndarray) -> float:
        # Compared with the first row, not by the variance: that of a constant column can round to above zero.
        if not np.isfinite(rows).all() or (rows == rows[0]).all(axis=0).any():
            return float("nan")
        centred = rows - rows.mean(axis=0)
        x, y = (centred / np.abs(centred).max(axis=0)).T  # so that no square under- or overflows
        return float(np.clip(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)), -1.0, 1.0))

    def spearman(rows: np.ndarray) -> float:
        from scipy.stats import rankdata

        return pearson(rankdata(rows, axis=0)) if np.isfinite(rows).all() else float("nan")

    def mse(rows: np.ndarray) -> float:
        return float(np.mean((rows[:, 0] - rows[:, 1]) ** 2))

    return [
        Metric("pearson", rows, pearson),
        Metric("spearman", rows, spearman),
        Metric("mse", rows, mse, higher_is_better=False),
    ]


def choice_metrics(correct: Sequence[bool]) -> list[Metric]:
    """`accuracy`, in 0..1, of multiple choice by length-normalised likelihood.

    Args:
        correct: (n,) whether the gold choice had the highest likelihood per byte of its text.

    Raises:
        DataError: if there is no example.
    """
    check_lengths("accuracy", choices=correct)
    return [mean_metric("accuracy", correct)]
