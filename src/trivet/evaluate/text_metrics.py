"""Metrics of generated text against one or more references, from the libraries that define them.

BLEU and chrF are sacrebleu's, ROUGE is rouge_score's, CIDEr is pycocoevalcap's, NIST equals nltk's
`corpus_nist`. METEOR is left out on purpose: it needs WordNet or a Java program with its data, which would have to
be downloaded.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from trivet.errors import DataError
from trivet.evaluate.metrics import Metric, check_lengths, mean_metric

NIST_ORDER = 5


def text_metrics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[Metric]:
    """Scores generated texts.

    Args:
        predictions: (n,) generated texts; empty ones are allowed.
        references: (n,) lists of at least one reference text each; their number may differ from row to row.

    Returns:
        `exact_match`: share of predictions equal to a reference, both stripped of outer white space; 0..1.
        `bleu`: sacrebleu's corpus BLEU, 13a tokenizer, up to 4-grams, exponential smoothing; 0..100.
        `chrf`: sacrebleu's corpus chrF2, character 6-grams, best reference per row; 0..100.
        `nist`: NIST of order 5 (see `nist_metric`); 0 and up, no fixed maximum.
        `rouge1`, `rouge2`, `rougeL`: mean F-measure with stemming, best reference per row; 0..1. The library keeps
        only the letters a-z and digits, so these say nothing about text in another script.
        `cider`: mean CIDEr-D, see `cider_metric`; 0..10. Left out where it is undefined.

    Raises:
        DataError: if the lengths differ, there is no example, or a row has no reference.
    """
    check_lengths("text metrics", predictions=predictions, references=references)
    for row, texts in enumerate(references):
        if isinstance(texts, str) or len(texts) == 0:
            raise DataError(
                f"cannot compute text metrics: example {row} has the references {texts[:200]!r}. "
                "Give each example a list of at least one reference text."
            )

    from sacrebleu.metrics import BLEU, CHRF
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    tokenize = Tokenizer13a()
    hypotheses = [tokenize(text.rstrip()).split() for text in predictions]
    tokenized = [[tokenize(text.rstrip()).split() for text in texts] for texts in references]
    matches = [
        prediction.strip() in {text.strip() for text in texts}
        for prediction, texts in zip(predictions, references, strict=True)
    ]
    metrics = [
        mean_metric("exact_match", matches),
        # force: no warning where data is tokenised already (E2E), as it may well be.
        _sacrebleu_metric("bleu", BLEU(tokenize="13a", force=True), predictions, references),
        _sacrebleu_metric("chrf", CHRF(), predictions, references),
        nist_metric(hypotheses, tokenized),
        *_rouge_metrics(predictions, references),
    ]
    cider = cider_metric(hypotheses, tokenized)
    return metrics if cider is None else [*metrics, cider]


def _sacrebleu_metric(
    name: str, scorer: Any, predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> Metric:
    # The two private calls are what sacrebleu's own bootstrap is made of; they are why it is pinned below 2.7.
    # References go in as streams; sacrebleu drops the None with which zip_longest pads the shorter rows.
    streams = list(zip_longest(*references))
    rows = np.array(scorer._extract_corpus_statistics(list(predictions), streams), dtype=np.float64)

    def value(rows: np.ndarray) -> float:
        totals = [int(total) for total in rows.sum(axis=0)]
        return float(scorer._aggregate_and_compute([totals]).score)

    return Metric(name, rows, value)


def _rouge_metrics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[Metric]:
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(kinds, tokenizer=DefaultTokenizer(use_stemmer=True))
    scores = [scorer.score_multi(texts, prediction) for prediction, texts in zip(predictions, references, strict=True)]
    return [mean_metric(kind, [score[kind].fmeasure for score in scores]) for kind in kinds]


def cider_metric(hypotheses: Sequence[list[str]], references: Sequence[Sequence[list[str]]]) -> Metric | None:
    """`cider`: the CIDEr of pycocoevalcap (CIDEr-D of Vedantam et al. 2015, https://arxiv.org/abs/1411.5726).

    The value is the mean over rows, in 0..10. Words are lower-cased. `text_metrics` tokenizes with 13a where the
    COCO toolkit runs a Java program, so that values can differ a little from its. Document frequencies come from the
    references of all rows and stay fixed in a bootstrap.

    Args:
        hypotheses: (n,) tokenized predictions.
        references: (n,) lists of at least one tokenized reference.

    Returns:
        The metric, or None where there are no document frequencies: fewer than 2 rows, or no word in any reference.
    """
    if len(hypotheses) < 2 or not any(words for texts in references for words in texts):
        return None

    from pycocoevalcap.cider.cider_scorer import CiderScorer

    scorer = CiderScorer()
    for hypothesis, texts in zip(hypotheses, references, strict=True):
        scorer += (" ".join(hypothesis).lower(), [" ".join(words).lower() for words in texts])
    _, scores = scorer.compute_score()
    return mean_metric("cider", scores)


def nist_metric(hypotheses: Sequence[list[str]], references: Sequence[Sequence[list[str]]]) -> Metric:
    """`nist`: NIST of order 5 (Doddington 2002, https://dl.acm.org/doi/10.5555/1289189.1289273, Eq. 2 and 3).

    Equal to nltk's `corpus_nist`, which takes the best reference of a row for each n-gram order by itself. The
    information weights come from the references of all rows and stay fixed in a bootstrap.

    Where nltk divides by zero the value is 0.0: when no prediction has 5 words, so that there is no 5-gram to be
    right about (BLEU is 0 likewise when none has 4), or when no reference has a word.

    Args:
        hypotheses: (n,) tokenized predictions.
        references: (n,) lists of at least one tokenized reference.

    Returns:
        The metric. Its rows are (12,): the information of the matched n-grams of orders 1 to 5, the number of
        n-grams in the hypothesis of orders 1 to 5, and the lengths of reference and hypothesis in words, each summed
        over the orders.
    """
    information = _information_weights(references)
    rows = np.array(
        [_nist_row(hypothesis, texts, information) for hypothesis, texts in zip(hypotheses, references, strict=True)]
    )
    return Metric("nist", rows, _nist_value())


def _ngrams(words: list[str]) -> Iterator[tuple[str, ...]]:
    for order in range(1, NIST_ORDER + 1):
        for start in range(len(words) - order + 1):
            yield tuple(words[start : start + order])


def _information_weights(references: Sequence[Sequence[list[str]]]) -> dict[tuple[str, ...], float]:
    counts: Counter[tuple[str, ...]] = Counter()
    for texts in references:
        for words in texts:
            counts.update(_ngrams(words))
            counts[()] += len(words)  # the empty n-gram precedes every word: Eq. 2 then needs no special case
    # log(x, 2), not log2(x): nltk's last bit decides between references that are equally good
    return {ngram: math.log(counts[ngram[:-1]] / count, 2) for ngram, count in counts.items() if ngram}


def _nist_row(
    hypothesis: list[str], texts: Sequence[list[str]], information: dict[tuple[str, ...], float]
) -> list[float]:
    ngrams = Counter(_ngrams(hypothesis))
    candidates = []  # for each reference: (matched information, reference length) by order
    for words in texts:
        matched = [0.0] * NIST_ORDER
        for ngram, count in (ngrams & Counter(_ngrams(words))).items():
            matched[len(ngram) - 1] += information[ngram] * count
        candidates.append([(found, len(words)) for found in matched])
    best = [max(by_reference) for by_reference in zip(*candidates, strict=True)]
    totals = [max(len(hypothesis) - order, 0) for order in range(NIST_ORDER)]
    lengths = [sum(length for _, length in best), NIST_ORDER * len(hypothesis)]
    return [float(x) for x in [*(found for found, _ in best), *totals, *lengths]]


def _nist_value() -> Callable[[np.ndarray], float]:
    from nltk.translate.nist_score import nist_length_penalty

    def value(rows: np.ndarray) -> float:
        sums = rows.sum(axis=0)
        matched, totals = sums[:NIST_ORDER], sums[NIST_ORDER : 2 * NIST_ORDER]
        reference_length, hypothesis_length = sums[2 * NIST_ORDER :]
        if not totals.all() or not reference_length:
            return 0.0
        return float((matched / totals).sum() * nist_length_penalty(reference_length, hypothesis_length))

    return value
