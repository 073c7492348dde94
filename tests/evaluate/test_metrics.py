"""Metrics against the libraries and closed forms that define them."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trivet.evaluate.metrics import (
    Metric,
    choice_metrics,
    classification_metrics,
    final_number,
    likelihood_metrics,
    number_match,
    regression_metrics,
)
from trivet.evaluate.text_metrics import text_metrics

PREDICTIONS = [
    "The Vaults is a cheap, family-friendly pub near the river.",
    "Alimentum is not a family-friendly place, arranged in the city centre.",
    "",
    "There is a coffee shop Blue Spice in the riverside area; its rating is 5 out of 5.",
    "A Japanese restaurant.",
    "Running runners ran & ran",
]
REFERENCES = [
    ["The Vaults pub near the river is cheap and family-friendly.", "The Vaults is a cheap pub by the river."],
    ["There is a place in the city centre, Alimentum, that is not family-friendly."],
    ["Nothing was said here at all.", "", "It was silent."],
    [
        "In the riverside area, there is a coffee shop called The Blue Spice.",
        "There is a coffee shop Blue Spice in the riverside area.",
        "At the riverside, there is a coffee shop called The Blue Spice.",
        "Blue Spice is rated 5 out of 5 and lies in the riverside area, where it sells coffee.",
    ],
    ["  A Japanese restaurant.\n", "An expensive Japanese restaurant called The Wrestlers."],
    ["The runner runs and ran &amp; ran"],
]


def by_name(metrics: list[Metric]) -> dict[str, Metric]:
    assert all(metric.rows.dtype == np.float64 and metric.rows.ndim == 2 for metric in metrics)
    return {metric.name: metric for metric in metrics}


def scores(metrics: list[Metric]) -> dict[str, float]:
    return {metric.name: metric.score for metric in metrics}


def random_corpus(seed: int, rows: int = 25) -> tuple[list[str], list[list[str]]]:
    """Sentences of a small vocabulary, so that long n-grams recur; 1 to 4 references a row."""
    chance = random.Random(seed)
    words = ["a", "the", "cat", "dog", "sat", "ran", "on", "mat", "big", "."]

    def sentence(shortest: int) -> str:
        return " ".join(chance.choices(words, k=chance.randint(shortest, 14)))

    references = [[sentence(1) for _ in range(chance.randint(1, 4))] for _ in range(rows)]
    return [chance.choice([sentence(0), texts[0], texts[-1] + " cat"]) for texts in references], references


CORPORA = [(PREDICTIONS, REFERENCES), *(random_corpus(seed) for seed in range(4))]


# -- likelihood --------------------------------------------------------------------------------------------------


def test_likelihood_is_weighted_by_token():
    metrics = by_name(likelihood_metrics([2.0, 9.0, 0.0], [1, 9, 0], [1, 3, 0]))
    assert metrics["loss"].score == pytest.approx(1.1)
    assert metrics["perplexity"].score == pytest.approx(math.exp(1.1))
    assert metrics["token_accuracy"].score == pytest.approx(0.4)
    assert [metrics[name].higher_is_better for name in metrics] == [False, False, True]
    assert metrics["loss"].value(metrics["loss"].rows[[0, 0, 1]]) == pytest.approx(13 / 11)


def test_likelihood_matches_cross_entropy_of_torch():
    import torch

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 7, 11, generator=generator, dtype=torch.float64)
    labels = torch.randint(11, (4, 7), generator=generator)
    labels[torch.rand(4, 7, generator=generator) < 0.3] = -100
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    correct = (logits.argmax(-1) == labels).sum(1)
    metrics = scores(likelihood_metrics(losses.sum(1).tolist(), (labels != -100).sum(1).tolist(), correct.tolist()))
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels)
    assert metrics["loss"] == pytest.approx(expected.item())
    hits = logits.argmax(-1)[labels != -100] == labels[labels != -100]
    assert metrics["token_accuracy"] == pytest.approx(hits.double().mean().item())


def test_likelihood_at_the_edges():
    assert scores(likelihood_metrics([1e6], [1], [0]))["perplexity"] == math.inf
    assert all(math.isnan(value) for value in scores(likelihood_metrics([0.0], [0], [0])).values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], [2, 3], [1]), "1 nll, 2 tokens, 1 correct"),
        (([], [], []), "at least one example"),
        (([1.0, 1.0], [2, 3], [1, 4]), "example 1 has 4 correct of 3 supervised tokens"),
    ],
)
def test_likelihood_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        likelihood_metrics(*arguments)


# -- text --------------------------------------------------------------------------------------------------------


def streams(references: list[list[str]]) -> list[list[str | None]]:
    widest = max(map(len, references))
    return [[texts[i] if i < len(texts) else None for texts in references] for i in range(widest)]


@pytest.mark.parametrize("corpus", CORPORA)
def test_bleu_and_chrf_are_those_of_sacrebleu(corpus):
    from sacrebleu.metrics import BLEU, CHRF

    predictions, references = corpus
    got = scores(text_metrics(predictions, references))
    assert got["bleu"] == pytest.approx(BLEU().corpus_score(predictions, streams(references)).score, abs=1e-9)
    assert got["chrf"] == pytest.approx(CHRF().corpus_score(predictions, streams(references)).score, abs=1e-9)
    assert got["bleu"] > 5 and got["chrf"] > 5


def test_a_multiset_of_rows_scores_as_that_corpus_would():
    """Whatever is resampled, the statistics must give what scoring the resampled texts gives."""
    predictions, references = random_corpus(9)
    index = np.random.default_rng(0).integers(len(predictions), size=len(predictions))
    drawn = by_name(text_metrics([predictions[i] for i in index], [references[i] for i in index]))
    metrics = by_name(text_metrics(predictions, references))
    for name in set(metrics) - {"nist", "cider"}:  # these two keep the document statistics of the whole set
        assert metrics[name].value(metrics[name].rows[index]) == pytest.approx(drawn[name].score, abs=1e-9), name


def tokenize(text: str) -> list[str]:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()(text.rstrip()).split()


def nltk_nist(predictions: list[str], references: list[list[str]]) -> float:
    from nltk.translate.nist_score import corpus_nist

    return corpus_nist([[tokenize(r) for r in texts] for texts in references], [tokenize(p) for p in predictions])


@pytest.mark.parametrize("corpus", CORPORA)
def test_nist_is_that_of_nltk(corpus):
    assert scores(text_metrics(*corpus))["nist"] == pytest.approx(nltk_nist(*corpus), rel=0, abs=1e-9)
    assert nltk_nist(*corpus) > 0.1


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.sampled_from("abc"), max_size=9),
            st.lists(st.lists(st.sampled_from("abc"), max_size=9), min_size=1, max_size=3),
        ),
        min_size=1,
        max_size=4,
    )
)
@example([([], [list("aabab"), list("abbabb")]), (list("aababb"), [list("aaabb"), list("aba")])])  # a tie
def test_nist_is_that_of_nltk_and_0_where_nltk_divides_by_zero(rows):
    predictions = [" ".join(words) for words, _ in rows]
    references = [[" ".join(words) for words in texts] for _, texts in rows]
    try:
        expected = nltk_nist(predictions, references)
    except ZeroDivisionError:
        expected = 0.0
    assert scores(text_metrics(predictions, references))["nist"] == pytest.approx(expected, rel=0, abs=1e-9)


@pytest.mark.parametrize("prediction", ["", "one two three four"])
def test_too_short_predictions_score_nist_0(prediction):
    with pytest.raises(ZeroDivisionError):
        nltk_nist([prediction] * 2, [["one two three four"]] * 2)
    assert scores(text_metrics([prediction] * 2, [["one two three four"]] * 2))["nist"] == 0.0


@pytest.mark.parametrize("corpus", CORPORA)
def test_rouge_is_that_of_rouge_score(corpus):
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    got = scores(text_metrics(*corpus))
    for kind in ("rouge1", "rouge2", "rougeL"):
        best = [
            max(scorer.score(text, prediction)[kind].fmeasure for text in texts)
            for prediction, texts in zip(*corpus, strict=True)
        ]
        assert got[kind] == pytest.approx(sum(best) / len(best)) and got[kind] > 0.1


@pytest.mark.parametrize("corpus", CORPORA)
def test_cider_is_that_of_pycocoevalcap(corpus):
    from pycocoevalcap.cider.cider import Cider

    def caption(text: str) -> str:
        return " ".join(tokenize(text)).lower()

    predictions, references = corpus
    gold = {row: [caption(text) for text in texts] for row, texts in enumerate(references)}
    mean, rows = Cider().compute_score(gold, {row: [caption(text)] for row, text in enumerate(predictions)})
    metric = by_name(text_metrics(predictions, references))["cider"]
    assert metric.score == pytest.approx(mean, rel=1e-12) and metric.score > 0.1
    assert metric.rows[:, 0] == pytest.approx(rows)


def test_cider_is_left_out_without_document_frequencies():
    assert "cider" not in scores(text_metrics(["a cat"], [["a cat"]]))
    assert "cider" not in scores(text_metrics(["a cat", "b"], [[""], [" "]]))
    assert "cider" in scores(text_metrics(["a cat", ""], [["a cat"], [""]]))


def test_exact_match_ignores_outer_white_space_only():
    metric = by_name(text_metrics(["yes\n", "Yes", "no", "a  b"], [["no", " yes"], ["yes"], ["no"], ["a b"]]))
    assert metric["exact_match"].rows[:, 0].tolist() == [1, 0, 1, 0]
    assert metric["exact_match"].score == 0.5


def test_perfect_predictions_reach_the_documented_tops():
    texts = ["the quick brown fox jumps over it", "a lazy dog sleeps under the old tree"]
    got = scores(text_metrics(texts, [[text, "something else"] for text in texts]))
    assert got["bleu"] == pytest.approx(100) and got["chrf"] == pytest.approx(100)
    assert [got[name] for name in ("exact_match", "rouge1", "rouge2", "rougeL")] == pytest.approx([1] * 4)
    single = scores(text_metrics(texts, [[text] for text in texts]))
    assert single["cider"] == pytest.approx(10)


def test_nothing_predicted_scores_nothing():
    got = scores(text_metrics(["", ""], [["a cat sat on the mat"], ["the dog"]]))
    assert got == dict.fromkeys(["exact_match", "bleu", "chrf", "nist", "rouge1", "rouge2", "rougeL", "cider"], 0.0)


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        (["a"], [["a"], ["b"]], "1 predictions, 2 references"),
        ([], [], "at least one example"),
        (["a", "b"], [["a"], []], "example 1"),
        (["a", "b"], ["cat", "dog"], "example 0 has the references 'cat'"),
    ],
)
def test_text_metrics_refuse(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        text_metrics(predictions, references)


# -- number match ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She sold 48/2 = 24 clips, so 48+24 = 72 in all.\n#### 72", "72"),
        ("#### 5 apples\nQ: 3 more?\n#### $1,234.50. Then 9", "1234.50"),
        ("The answer is $1,000,000.", "1000000"),
        ("between 3 and 4.5.", "4.5"),
        ("it costs .75", ".75"),
        ("x = -12", "-12"),
        ("that is -$3.", "-3"),
        ("that is \u22127", "-7"),
        ("10-4", "4"),
        ("(5)-4", "4"),
        ("1, 2, 3, and nothing", "3"),
        ("50% of them", "50"),
        ("7 of them #### none", None),
        ("no number", None),
        ("", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == number


def test_number_match_compares_values():
    solution = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 72"
    predictions = ["so 72.00", "#### 72", "1,072", "72 or 73", "I do not know", "0.30"]
    answers = [solution, "72", solution, solution, "72", ".3"]
    metric = number_match(predictions, answers)
    assert metric.name == "number_match"
    assert metric.rows[:, 0].tolist() == [1, 1, 0, 0, 0, 1]
    assert metric.score == 0.5


def test_number_match_refuses_a_gold_answer_without_number():
    with pytest.raises(ValueError, match="example 1 has no number: 'many'"):
        number_match(["1", "2"], ["1", "many"])


# -- classification ----------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_classification_is_that_of_sklearn(data):
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    n_labels = data.draw(st.integers(1, 6))
    label = st.integers(0, n_labels - 1)
    pairs = data.draw(st.lists(st.tuples(label, label), min_size=1, max_size=40))
    predicted, gold = (list(side) for side in zip(*pairs, strict=True))
    got = scores(classification_metrics(predicted, gold, n_labels))
    assert got["accuracy"] == pytest.approx(accuracy_score(gold, predicted))
    assert got["macro_f1"] == pytest.approx(f1_score(gold, predicted, average="macro", zero_division=0))
    assert got["matthews"] == pytest.approx(matthews_corrcoef(gold, predicted))


def test_classification_of_a_resample_is_that_of_sklearn():
    from sklearn.metrics import f1_score, matthews_corrcoef

    generator = np.random.default_rng(1)
    gold = generator.integers(77, size=400)
    predicted = np.where(generator.random(400) < 0.6, gold, generator.integers(77, size=400))
    metrics = by_name(classification_metrics(predicted.tolist(), gold.tolist(), 77))
    index = generator.integers(400, size=400)
    assert metrics["macro_f1"].value(metrics["macro_f1"].rows[index]) == pytest.approx(
        f1_score(gold[index], predicted[index], average="macro", zero_division=0)
    )
    assert metrics["matthews"].value(metrics["matthews"].rows[index]) == pytest.approx(
        matthews_corrcoef(gold[index], predicted[index])
    )


@pytest.mark.parametrize(("predicted", "gold"), [([0, -1], [0, 1]), ([0, 1], [0, 3]), ([0, math.nan], [0, 1])])
def test_classification_refuses_labels_out_of_range(predicted, gold):
    with pytest.raises(ValueError, match=r"example 1 .* labels 0\.\.2"):
        classification_metrics(predicted, gold, 3)


# -- regression and choice ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e-180, 1e180])
def test_regression_is_that_of_scipy(scale):
    from scipy.stats import pearsonr, spearmanr

    generator = np.random.default_rng(2)
    gold = generator.integers(0, 26, size=200) / 5  # as in STS-B: many ties
    predicted = np.round(gold + generator.normal(size=200), 1)
    metrics = by_name(regression_metrics((predicted * scale).tolist(), gold.tolist()))
    index = generator.integers(200, size=200)
    for rows in (np.arange(200), index):
        x, y = predicted[rows], gold[rows]
        assert metrics["pearson"].value(metrics["pearson"].rows[rows]) == pytest.approx(pearsonr(x, y).statistic)
        assert metrics["spearman"].value(metrics["spearman"].rows[rows]) == pytest.approx(spearmanr(x, y).statistic)


def test_mse_is_that_of_sklearn_and_lower_is_better():
    from sklearn.metrics import mean_squared_error

    metric = by_name(regression_metrics([1.0, 2.5, -1.0], [0.5, 2.5, 2.0]))["mse"]
    assert metric.score == pytest.approx(mean_squared_error([0.5, 2.5, 2.0], [1.0, 2.5, -1.0]))
    assert not metric.higher_is_better


@pytest.mark.parametrize("predicted", [[0.1] * 3, [1.0, math.nan, 2.0], [1.0, math.inf, 2.0]])
def test_correlation_of_constant_or_unfinite_predictions_is_nan(predicted):
    got = scores(regression_metrics(predicted, [1.0, 2.0, 3.0]))
    assert math.isnan(got["pearson"]) and math.isnan(got["spearman"])


def test_choice_accuracy_is_the_mean():
    assert scores(choice_metrics([True, False, True, True])) == {"accuracy": 0.75}
    with pytest.raises(ValueError, match="at least one example"):
        choice_metrics([])


def test_a_metric_refuses_statistics_that_are_no_matrix():
    with pytest.raises(ValueError, match=r"'loss'.*shape \(3,\)"):
        Metric("loss", np.zeros(3), lambda rows: 0.0)
