"""Which metrics rows get, and that both sides are what they say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from conftest import colour_rows
from trivet.adapter.layers import adapted_layers
from trivet.config import Config, ModelConfig
from trivet.data import load_dataset
from trivet.data.encode import IGNORE
from trivet.evaluate.measure import Evaluator, Settings
from trivet.evaluate.score import likelihood
from trivet.session import Session, begin

SETTINGS = Settings(batch_size=4, max_new_tokens=8, resamples=50)


def session_for(folder: Any, rows: list[dict[str, Any]]) -> Session:
    config = Config(model=ModelConfig(name=str(folder), dtype="float32", lora_rank=4))
    return begin(config, load_dataset(rows))


def disturb(session: Session) -> None:
    """An adapter that does something."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in adapted_layers(session.model):
            layer.B.copy_(torch.randn(layer.B.shape, generator=generator) * 0.2)


def test_base_is_the_untouched_model_and_tuned_the_adapted_one(tiny: Any) -> None:
    rows = colour_rows(6)
    session = session_for(tiny("gpt2"), rows)
    evaluator = session.evaluator(load_dataset(rows), SETTINGS)
    before = evaluator.measure(session.model)
    disturb(session)
    both = evaluator.side_by_side(session.model)
    after = evaluator.measure(session.model)
    loss = both.to_dict()["metrics"]
    assert loss["base"]["loss"] == before.groups[0][0].score
    assert loss["tuned"]["loss"] == after.groups[0][0].score
    assert loss["base"]["loss"] != loss["tuned"]["loss"]
    assert [row["base"] for row in both.predictions] == list(before.outputs)
    assert [row["tuned"] for row in both.predictions] == list(after.outputs)


def test_predictions_stand_beside_their_own_prompts(tiny: Any) -> None:
    rows = colour_rows(5)
    session = session_for(tiny("gpt2"), rows)
    found = session.evaluator(load_dataset(rows), replace(SETTINGS, max_generate_rows=3)).side_by_side(session.model)
    assert [row["prompt"].strip() for row in found.predictions] == [row["prompt"] for row in rows[:3]]
    assert [row["references"] for row in found.predictions] == [(row["completion"],) for row in rows[:3]]
    counts = found.to_dict()["n"]
    assert (counts["loss"], counts["bleu"]) == (5, 3)


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        (colour_rows(4), {"loss", "perplexity", "token_accuracy", "exact_match", "bleu", "chrf", "nist", "rougeL"}),
        ([{"text": "the cat sat on the mat"}] * 3, {"loss", "perplexity", "token_accuracy"}),
        ([{"prompt": "p", "completion": "1 + 1 #### 2", "answer": "2"}] * 3, {"loss", "number_match", "rouge1"}),
        ([{"prompt": "p", "references": ["a b", "c"]}] * 3, {"loss", "bleu", "cider"}),
        ([{"prompt": "p", "choices": ["blue", "red"], "answer": 0}] * 3, {"loss", "accuracy"}),
    ],
)
def test_metrics_by_kind_of_row(tiny: Any, rows: list[dict[str, Any]], names: set[str]) -> None:
    session = session_for(tiny("gpt2"), rows)
    side = session.evaluator(load_dataset(rows), SETTINGS).measure(session.model)
    found = {metric.name for group in side.groups for metric in group}
    assert names <= found
    if "accuracy" in names:
        assert "bleu" not in found


def test_generation_can_be_left_out(tiny: Any) -> None:
    rows = colour_rows(3)
    session = session_for(tiny("gpt2"), rows)
    side = session.evaluator(load_dataset(rows), replace(SETTINGS, generate=False)).measure(session.model)
    assert [m.name for group in side.groups for m in group] == ["loss", "perplexity", "token_accuracy"]
    assert side.outputs == ()


def test_multiple_choice_takes_the_highest_likelihood_per_byte(tiny: Any) -> None:
    rows = [
        {"prompt": "what colour is the sky ?", "choices": ["blue", "the grass is green", "a red house"], "answer": 0},
        {"prompt": "zero one", "choices": ["two", "three four five six seven"], "answer": 0},
        {"prompt": "the cat sat on the", "choices": ["mat", "ö dog", "x"], "answer": 2},
    ]
    session = session_for(tiny("llama"), rows)
    disturb(session)
    dataset = load_dataset(rows)
    evaluator = Evaluator(dataset, session.encoder, task="causal-lm", settings=SETTINGS)
    side = evaluator.measure(session.model)
    wanted = []
    for example in dataset:
        per_byte = []
        for choice in example.choices:
            (row,), _ = session.encoder.encode(replace(example, completion=choice))
            learned = [i for i, label in enumerate(row["labels"]) if label != IGNORE]
            ids = row["input_ids"]
            with torch.no_grad():
                scores = session.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            # The last learned token ends the answer; it says nothing about which answer it is.
            total = sum(float(scores[i - 1, ids[i]]) for i in learned[:-1])
            per_byte.append(total / len(choice.encode()))
        wanted.append(example.choices[int(np.argmax(per_byte))])
    assert list(side.outputs) == wanted


def test_loss_is_the_mean_over_tokens_not_rows(tiny: Any) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "the cat sat on the mat and the dog ran"}]
    session = session_for(tiny("gpt2"), rows)
    evaluator = session.evaluator(load_dataset(rows), replace(SETTINGS, generate=False))
    scored = likelihood(session.model, evaluator.rows, session.collator, task="causal-lm", batch_size=1)
    loss = evaluator.measure(session.model).groups[0][0].score
    assert loss == pytest.approx(scored.nll.sum() / scored.tokens.sum())
    assert loss != pytest.approx((scored.nll / scored.tokens).mean(), rel=1e-3)
