"""Likelihoods and class scores: those of each row alone, however rows are batched and padded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from trivet.data.batch import Collator
from trivet.data.encode import IGNORE, Encoded, LabelEncoder
from trivet.evaluate.score import head_scores, likelihood, without_ending
from trivet.model import Base, load_base

CPU: dict[str, Any] = {"dtype": "float32", "device": "cpu"}
LENGTHS = (5, 23, 2, 40, 11, 9, 16, 31)


def collator(base: Base) -> Collator:
    shift = base.model.prepare_decoder_input_ids_from_labels if base.task == "seq2seq" else None
    return Collator(base.tokenizer.pad_token_id, shift=shift)


def some_rows(base: Base) -> list[Encoded]:
    """Rows of very different lengths, of which the first third is not scored."""
    draw = torch.Generator().manual_seed(0)
    rows = []
    for length in LENGTHS:
        ids = torch.randint(1, 300, (length,), generator=draw).tolist()
        if base.task == "seq2seq":
            rows.append(Encoded(input_ids=ids, labels=ids[::-1][: length // 2 + 1]))
        else:
            rows.append(Encoded(input_ids=ids, labels=[IGNORE] * max(length // 3, 1) + ids[max(length // 3, 1) :]))
    return rows


@torch.no_grad()
def alone(base: Base, row: Encoded) -> tuple[float, int, int]:
    """One row without padding: negative log-likelihood, supervised tokens, and how many of them came first."""
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
    if base.task == "seq2seq":
        start = base.model.config.decoder_start_token_id
        logits = base.model(input_ids=ids, decoder_input_ids=torch.tensor([[start, *row["labels"][:-1]]])).logits[0]
    else:
        logits, labels = base.model(input_ids=ids).logits[0, :-1], labels[1:]
    logp = torch.log_softmax(logits.double(), -1)
    nll, tokens, correct = 0.0, 0, 0
    for position, label in enumerate(labels.tolist()):
        if label != IGNORE:
            nll, tokens = nll - float(logp[position, label]), tokens + 1
            correct += int(logp[position].argmax()) == label
    return nll, tokens, correct


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5", "bart"])
@pytest.mark.parametrize("size", [1, 3, 16])
def test_likelihood_is_that_of_each_row_alone(tiny: Any, kind: str, size: int) -> None:
    base = load_base(str(tiny(kind)), **CPU)
    base.model.eval()
    rows = some_rows(base)
    expected = [alone(base, row) for row in rows]
    found = likelihood(base.model, rows, collator(base), task=base.task, batch_size=size)
    np.testing.assert_allclose(found.nll, [nll for nll, _, _ in expected], rtol=1e-5)
    assert found.tokens.tolist() == [tokens for _, tokens, _ in expected]
    assert found.correct.tolist() == [correct for _, _, correct in expected]


@pytest.mark.parametrize("kind", ["bert", "distilbert", "gpt2"])
def test_class_scores_are_those_of_each_row_alone(tiny: Any, kind: str) -> None:
    base = load_base(str(tiny(kind)), task="classification", labels=["a", "b", "c"], **CPU)
    encoder = LabelEncoder(base.tokenizer, base.labels)
    rows = [encoder.inputs("the cat sat on the mat " * n, "and the dog" if n % 2 else None) for n in (1, 9, 3, 14, 2)]
    with torch.no_grad():
        expected = [
            base.model.eval()(**{key: torch.tensor([ids]) for key, ids in row.items()}).logits[0].tolist()
            for row in rows
        ]
    for size in (1, 2, 5):
        found = head_scores(base.model, rows, collator(base), batch_size=size)
        assert found.shape == (5, 3)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_training_mode_is_left_as_it_was_and_dropout_is_off(tiny: Any) -> None:
    base = load_base(str(tiny("gpt2")), **CPU)
    assert base.model.config.resid_pdrop > 0
    rows, collate = some_rows(base), collator(base)
    for training in (True, False):
        base.model.train(training)
        first, second = (
            likelihood(base.model, rows, collate, task="causal-lm", batch_size=4).nll.tolist() for _ in range(2)
        )
        assert first == second and base.model.training is training


def test_without_ending_leaves_the_last_scored_token_out() -> None:
    row = Encoded(input_ids=[1, 2, 3, 4], labels=[IGNORE, 2, 3, IGNORE])
    assert without_ending(row)["labels"] == [IGNORE, 2, IGNORE, IGNORE]
    assert row["labels"] == [IGNORE, 2, 3, IGNORE]


def test_no_rows_have_no_scores(tiny: Any) -> None:
    base = load_base(str(tiny("gpt2")), **CPU)
    assert likelihood(base.model, [], collator(base), task="causal-lm", batch_size=4).nll.tolist() == []
    assert head_scores(base.model, [], collator(base), batch_size=4).shape[0] == 0
