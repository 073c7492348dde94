"""Likelihoods do not depend on how rows are batched and padded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from trivet.data.batch import Collator
from trivet.data.encode import IGNORE, Encoded
from trivet.evaluate.score import likelihood, without_ending

LENGTHS = (3, 11, 7, 20, 5, 13, 9)


def rows_of(vocabulary: int) -> list[Encoded]:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in LENGTHS:
        ids = torch.randint(1, vocabulary, (length,), generator=generator).tolist()
        rows.append(Encoded(input_ids=ids, labels=[IGNORE] * (length // 2) + ids[length // 2 :]))
    return rows


def direct(model: Any, row: Encoded) -> tuple[float, int, int]:
    """One row alone, without padding, token by token."""
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
    nll, tokens, correct = 0.0, 0, 0
    for position, label in enumerate(row["labels"][1:]):
        if label != IGNORE:
            nll -= float(scores[position, label])
            tokens += 1
            correct += int(scores[position].argmax()) == label
    return nll, tokens, correct


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_causal_likelihood_equals_rows_alone(tiny: Any, kind: str, batch_size: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny(kind), dtype=torch.float32).eval()
    rows = rows_of(400)
    found = likelihood(model, rows, Collator(0), task="causal-lm", batch_size=batch_size)
    wanted = np.array([direct(model, row) for row in rows])
    np.testing.assert_allclose(found.nll, wanted[:, 0], rtol=1e-5)
    assert found.tokens.tolist() == wanted[:, 1].astype(int).tolist()
    assert found.correct.tolist() == wanted[:, 2].astype(int).tolist()


def test_seq2seq_likelihood_equals_the_models_own_loss(tiny: Any) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(tiny("t5"), dtype=torch.float32).eval()
    rows = [Encoded(input_ids=row["input_ids"], labels=row["input_ids"][::-1]) for row in rows_of(400)]
    collator = Collator(0, shift=model.prepare_decoder_input_ids_from_labels)
    found = likelihood(model, rows, collator, task="seq2seq", batch_size=4)
    for index, row in enumerate(rows):
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss
        assert found.nll[index] / found.tokens[index] == pytest.approx(float(loss), rel=1e-5)


def test_training_mode_is_left_as_it_was(tiny: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("gpt2"))
    for mode in (True, False):
        model.train(mode)
        likelihood(model, rows_of(400)[:1], Collator(0), task="causal-lm", batch_size=1)
        assert model.training is mode


def test_without_ending_drops_the_last_supervised_token_only() -> None:
    row = Encoded(input_ids=[5, 6, 7, 8], labels=[IGNORE, 6, 7, IGNORE])
    assert without_ending(row)["labels"] == [IGNORE, 6, IGNORE, IGNORE]
    assert row["labels"] == [IGNORE, 6, 7, IGNORE]


def test_tokenizer_of_the_tiny_models_round_trips(tiny: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny("gpt2"))
    text = "Ünïcode, emoji 🦊 and\ttabs"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
