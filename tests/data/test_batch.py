"""Padded tensors: every row is found again, and padding is never read, learned or counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import bpe_tokenizer, tiny_model
from trivet.data.batch import Collator, to_device
from trivet.data.detect import Example
from trivet.data.encode import IGNORE, Encoded, TextEncoder

PAD = 99


def rows(*lengths: int) -> list[Encoded]:
    return [
        Encoded(input_ids=list(range(1, n + 1)), labels=[IGNORE, *range(2, n + 1)], token_type_ids=[1] * n)
        for n in lengths
    ]


def test_padding_on_the_right_to_train() -> None:
    batch = Collator(PAD, multiple=4)(rows(3, 5))
    assert set(batch) == {"input_ids", "attention_mask", "labels", "token_type_ids"}
    assert batch["input_ids"].tolist() == [[1, 2, 3, PAD, PAD, PAD, PAD, PAD], [1, 2, 3, 4, 5, PAD, PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORE, 2, 3] + [IGNORE] * 5, [IGNORE, 2, 3, 4, 5] + [IGNORE] * 3]
    assert batch["token_type_ids"].tolist() == [[1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_padding_on_the_left_to_generate() -> None:
    batch = Collator(PAD, multiple=4, side="left")([Encoded(input_ids=[1, 2, 3]), Encoded(input_ids=[1, 2, 3, 4, 5])])
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"].tolist() == [[PAD] * 5 + [1, 2, 3], [PAD] * 3 + [1, 2, 3, 4, 5]]
    assert batch["attention_mask"].tolist() == [[0] * 5 + [1, 1, 1], [0] * 3 + [1, 1, 1, 1, 1]]


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    multiple=st.integers(1, 16),
    side=st.sampled_from(["left", "right"]),
)
def test_every_row_is_found_again(lengths: list[int], multiple: int, side: str) -> None:
    given_rows = rows(*lengths)
    batch = Collator(PAD, multiple=multiple, side=side)(given_rows)
    width = batch["input_ids"].shape[1]
    assert width % multiple == 0
    assert 0 <= width - max(lengths) < multiple
    for index, row in enumerate(given_rows):
        read = batch["attention_mask"][index].bool()
        assert batch["input_ids"][index][read].tolist() == row["input_ids"]
        assert batch["labels"][index][read].tolist() == row["labels"]
        assert (batch["input_ids"][index][~read] == PAD).all()
        assert (batch["labels"][index][~read] == IGNORE).all()
        edge = read.flip(0) if side == "left" else read
        assert edge.tolist() == sorted(edge.tolist(), reverse=True)


@pytest.mark.parametrize(("length", "width"), [(1, 8), (7, 8), (8, 8), (9, 16), (16, 16)])
def test_widths_are_multiples_of_eight_by_default(length: int, width: int) -> None:
    assert Collator(PAD)(rows(length))["input_ids"].shape == (1, width)


def test_classes_are_integers_and_numbers_are_floats() -> None:
    classes = Collator(PAD)([Encoded(input_ids=[1], labels=2), Encoded(input_ids=[1, 2], labels=0)])["labels"]
    assert (classes.tolist(), classes.dtype, classes.shape) == ([2, 0], torch.int64, (2,))
    numbers = Collator(PAD)([Encoded(input_ids=[1], labels=2.5), Encoded(input_ids=[1, 2], labels=-1.0)])["labels"]
    assert (numbers.tolist(), numbers.dtype, numbers.shape) == ([2.5, -1.0], torch.float32, (2,))


# --- with real models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_decoder_inputs_are_the_models_own(kind: str) -> None:
    tokenizer = bpe_tokenizer()
    model = tiny_model(kind, len(tokenizer), pad_token_id=7).eval()
    encoder = TextEncoder(tokenizer, "seq2seq")
    examples = [
        Example(prompt="what colour is the sky ?", completion="blue"),
        Example(prompt="grass ?", completion="the grass is green"),
    ]
    encoded = [encoder.encode(e)[0][0] for e in examples]
    batch = Collator(7, shift=model.prepare_decoder_input_ids_from_labels)(encoded)
    width = batch["labels"].shape[1]
    for index, row in enumerate(encoded):
        padding = [IGNORE] * (width - len(row["labels"]))
        assert batch["labels"][index].tolist() == row["labels"] + padding
        shifted = [0, *row["labels"], *[7] * len(padding)][:width]  # 0: the models' decoder_start_token_id
        assert batch["decoder_input_ids"][index].tolist() == shifted
    with torch.inference_mode():
        ours = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        theirs = model(**{k: v for k, v in batch.items() if k != "decoder_input_ids"}).logits
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_logit(side: str) -> None:
    model: Any = tiny_model("llama", 120).eval()
    given_rows = [Encoded(input_ids=row["input_ids"]) for row in rows(3, 11)]
    batch = Collator(PAD, side=side)(given_rows)
    with torch.inference_mode():
        padded = model(**batch).logits
        for index, row in enumerate(given_rows):
            alone = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
            torch.testing.assert_close(
                padded[index][batch["attention_mask"][index].bool()], alone, atol=1e-5, rtol=1e-4
            )


def test_to_device_moves_every_tensor() -> None:
    batch = to_device(Collator(PAD)(rows(2)), torch.device("meta"))
    assert {tensor.device.type for tensor in batch.values()} == {"meta"}
