"""What a reader of a run should be told in words: each remark is a rule over the run's figures.

docs/report.md lists the rules.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from trivet.report.load import LOWER_IS_BETTER, Run
from trivet.report.words import clip

#: Relative changes of a loss below this say nothing.
_NOTABLE = 0.02


@dataclass(frozen=True)
class Remark:
    """`title` is the finding, `text` the figures behind it and what to do."""

    title: str
    text: str


def remarks(run: Run) -> list[Remark]:
    """All that apply, the most serious first."""
    return [found for rule in RULES for found in rule(run)]


def not_better(run: Run) -> Iterator[Remark]:
    """The 95% interval of a main metric's difference includes 0, or lies on the wrong side of it."""
    differences = (run.result.get("intervals") or {}).get("difference") or {}
    for name in ("loss", "mse", "accuracy"):
        low, high = differences.get(name) or (None, None)
        if low is None or high is None:
            continue
        worse = low > 0 if name in LOWER_IS_BETTER else high < 0
        if worse:
            yield Remark(
                "Worse than the base model",
                f"The difference in {name} is [{low:+.3g}, {high:+.3g}]. Lower training.learning_rate or set it to "
                "auto, or look at the data: are the answers in the right column?",
            )
        elif low <= 0 <= high:
            rows = (run.result.get("n") or {}).get(name)
            yield Remark(
                "No difference to the base model that these rows can show",
                f"The difference in {name} is [{low:+.3g}, {high:+.3g}] on {rows} rows. More steps, more test rows, or "
                "a task that the base model already solves.",
            )
        return


def overfit(run: Run) -> Iterator[Remark]:
    """The last validation loss is above the best, an earlier one, by 2% of it and of all that was gained, while the
    training loss still fell.
    """
    if len(run.validations) < 2:
        return
    best_step, best = min(run.validations, key=lambda v: v[1])
    last_step, last = run.validations[-1]
    gained = (run.losses[0][1] if run.losses else best) - best
    if last - best < _NOTABLE * max(best, gained):
        return
    after = [loss for step, loss in run.losses if step > best_step]
    before = [loss for step, loss in run.losses if best_step - len(after) < step <= best_step]
    if after and before and statistics.fmean(after) < statistics.fmean(before):
        kept = "The adapter is that of the best step." if run.finished else ""
        yield Remark(
            "Overfit",
            f"The validation loss rose from {best:.4g} (step {best_step}) to {last:.4g} (step {last_step}) while the "
            f"training loss fell. {kept} Fewer epochs, a lower rank or more rows; "
            "training.early_stopping_patience stops by itself.",
        )


def under_trained(run: Run) -> Iterator[Remark]:
    """The loss still falls at the end: the last validation is the best, and 2% of it and of all that was gained better
    than the one before.

    Without validations: the mean training loss of the last tenth of the steps is 2% and two standard errors below that
    of the tenth before.
    """
    if not run.finished:
        return
    if len(run.validations) >= 2:
        (_, before), (step, last) = run.validations[-2:]
        gained = (run.losses[0][1] if run.losses else before) - last
        notable = before - last > _NOTABLE * max(last, gained)
        falling = last == min(loss for _, loss in run.validations) and notable
        figures = (
            f"The last validation loss, {last:.4g} at step {step}, is the lowest; the one before was {before:.4g}."
        )
    else:
        tenth = len(run.losses) // 10
        if tenth < 5 or run.validations:
            return
        earlier, later = ([loss for _, loss in run.losses[a:b]] for a, b in ((-2 * tenth, -tenth), (-tenth, None)))
        first, second = statistics.fmean(earlier), statistics.fmean(later)
        error = math.hypot(statistics.stdev(earlier), statistics.stdev(later)) / math.sqrt(tenth)
        falling = second < first * (1 - _NOTABLE) and first - second > 2 * error
        figures = (
            f"The mean training loss of the last tenth of the steps is {second:.4g}, of the tenth before {first:.4g}."
        )
    if falling:
        yield Remark("Under-trained", f"{figures} More steps would probably help: raise max_steps or num_epochs.")


def endless(run: Run) -> Iterator[Remark]:
    """A fifth or more of the tuned answers reach max_new_tokens, where less than half as many references do."""
    limit = run.settings["max_new_tokens"]
    rows = [row for row in run.predictions if row.get("references") and isinstance(row.get("tuned"), str)]
    count = _counter(run)
    if not rows or count is None:
        return
    answers = sum(count(row["tuned"]) >= limit - 1 for row in rows) / len(rows)
    references = sum(count(str(row["references"][0])) >= limit - 1 for row in rows) / len(rows)
    if answers >= 0.2 and references < answers / 2:
        yield Remark(
            "Answers do not end",
            f"{answers:.0%} of the tuned answers reach the limit of {limit} tokens; only {references:.0%} of the "
            "references are that long. The end of an answer was not learned: train longer, or check that "
            "data.max_length does not cut answers off.",
        )


def _counter(run: Run) -> Callable[[str], int] | None:
    """Counts tokens with the tokenizer that was saved beside the adapter."""
    file = run.folder.adapter / "tokenizer.json"
    if not file.is_file():
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def one_answer(run: Run) -> Iterator[Remark]:
    """Nine in ten of at least 20 tuned answers are the same one, and it is right for a fifth of the rows less."""
    right = [str(row.get("label", row.get("answer", (row.get("references") or [None])[0]))) for row in run.predictions]
    tuned = Counter(str(row.get("tuned")) for row in run.predictions)
    if len(right) < 20:
        return
    ((answer, times),) = tuned.most_common(1)
    share, wanted = times / len(right), right.count(answer) / len(right)
    if share >= 0.9 and wanted <= share - 0.2:
        yield Remark(
            "One answer for all",
            f"{share:.0%} of the tuned answers are “{clip(answer, 60)}”, where {wanted:.0%} should be. Only how "
            "frequent answers are was learned: halve training.learning_rate or set it to auto, or train longer; a "
            "classifier may want a training.head_learning_rate of its own.",
        )


def too_few_rows(run: Run) -> Iterator[Remark]:
    """Over 50 trained numbers for each learned token, and a training loss that ends below 70% of the validation's."""
    learned, trained = (run.result.get("data") or {}).get("supervised_tokens"), run.result.get("trainable_parameters")
    rows = ((run.result.get("data") or {}).get("rows") or {}).get("train")
    learned = learned or rows  # a label a row
    if not learned or not trained or trained < 50 * learned or not run.validations or not run.losses:
        return
    tail = [loss for _, loss in run.losses[-max(1, len(run.losses) // 10) :]]
    train, held = statistics.fmean(tail), run.validations[-1][1]
    if train < 0.7 * held:
        yield Remark(
            "Few rows for this rank",
            f"The adapter trains {trained:,} numbers on {learned:,} learned tokens or labels, and fits the training "
            f"rows better ({train:.3g}) than the validation rows ({held:.3g}). A lower lora_rank, or method: trivet, "
            "learns less by heart.",
        )


def cut_rows(run: Run) -> Iterator[Remark]:
    """5% or more of the training rows were longer than data.max_length and lost a part."""
    data = run.result.get("data") or {}
    cut, rows = data.get("shortened_rows") or 0, (data.get("rows") or {}).get("train") or 0
    if rows and cut >= 0.05 * rows:
        yield Remark(
            "Rows were cut",
            f"{cut:,} of {rows:,} training rows are longer than data.max_length ({run.config.data.max_length}) and "
            "lost a part. Raise it if memory allows.",
        )


def broken_steps(run: Run) -> Iterator[Remark]:
    """A step's loss is no number."""
    bad = [row["step"] for row in run.steps if row.get("loss") is None]
    if bad:
        shown = ", ".join(map(str, bad[:5])) + (", …" if len(bad) > 5 else "")
        yield Remark(
            "Steps without a number", f"The loss of step {shown} is NaN or infinite: the learning rate is too high."
        )


RULES: Sequence[Callable[[Run], Iterator[Remark]]] = (
    broken_steps,
    one_answer,
    not_better,
    overfit,
    endless,
    too_few_rows,
    under_trained,
    cut_rows,
)
