"""Base and tuned side by side: which metrics, over which examples, and of which model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import colour_rows, save_tiny
from trivet.adapter.layers import adapted_layers
from trivet.configio import load
from trivet.data.dataset import Dataset, load_dataset
from trivet.data.encode import TextEncoder
from trivet.errors import DataError
from trivet.evaluate.generate import generate
from trivet.evaluate.measure import Evaluator, Settings, write_predictions
from trivet.model import load_base
from trivet.session import Session, begin

SETTINGS = Settings(batch_size=3, max_new_tokens=6, resamples=10)


def session_on(folder: Path, rows: Dataset, **settings: Any) -> Session:
    """The model with an adapter of random factors, which changes what it computes."""
    values = {"model.name": str(folder), "model.dtype": "float32", "model.device": "cpu", **settings}
    session = begin(load(values=values), rows)
    draw = torch.Generator().manual_seed(1)
    for layer in adapted_layers(session.model):
        layer.B.data.normal_(std=0.5, generator=draw)
    return session


def choice_rows(n: int = 9) -> Dataset:
    """Choices of very different lengths."""
    choices = ["blue", "the colour of the sky on a fine day", "green grass", "redé"]
    rows = [{"prompt": row["prompt"], "choices": choices[i % 2 :], "answer": 0} for i, row in enumerate(colour_rows(n))]
    return load_dataset(rows)


# -- what each kind of rows is measured by -------------------------------------------------------------------


def names(evaluator: Evaluator, model: Any) -> list[set[str]]:
    return [{metric.name for metric in group} for group in evaluator.measure(model).groups]


def test_metrics_follow_the_rows(tiny: Any) -> None:
    likelihood = {"loss", "perplexity", "token_accuracy"}
    written = {"exact_match", "bleu", "chrf", "nist", "rouge1", "rouge2", "rougeL", "cider"}
    rows = load_dataset(colour_rows(6))
    session = session_on(tiny("gpt2"), rows)
    assert names(session.evaluator(rows, SETTINGS), session.model) == [likelihood, written]
    plain = load_dataset([{"text": "the cat sat on the mat"}] * 4)
    assert names(session.evaluator(plain, SETTINGS), session.model) == [likelihood]
    assert names(session.evaluator(choice_rows(), SETTINGS), session.model) == [likelihood, {"accuracy"}]
    assert names(session.evaluator(rows, Settings(generate=False)), session.model) == [likelihood]


def test_gsm8k_like_rows_are_also_measured_by_their_number(tiny: Any) -> None:
    solved = [{"prompt": f"one plus {n} ?", "completion": f"one plus {n} is {n + 1}\n#### {n + 1}"} for n in range(4)]
    rows = load_dataset(solved)
    session = session_on(tiny("gpt2"), rows)
    groups = session.evaluator(rows, SETTINGS).measure(session.model).groups
    assert groups[1][-1].name == "number_match"
    mixed = load_dataset([*solved, *colour_rows(2)])
    assert "number_match" not in names(session.evaluator(mixed, SETTINGS), session.model)[1]


def test_classes_and_numbers(tiny: Any) -> None:
    rows = load_dataset([{"text": r["prompt"], "label": r["completion"].split()[-1]} for r in colour_rows(9)])
    session = session_on(tiny("bert"), rows)
    evaluator = session.evaluator(rows, SETTINGS)
    side = evaluator.measure(session.model)
    found = {metric.name: metric.value(metric.rows) for metric in side.groups[0]}
    with torch.no_grad():
        batch = session.collator(evaluator.rows)
        gold = batch.pop("labels")
        logits = session.model.eval()(**batch).logits
    assert found["loss"] == pytest.approx(float(F.cross_entropy(logits, gold)), rel=1e-5)
    assert found["accuracy"] == pytest.approx(float((logits.argmax(1) == gold).float().mean()))
    assert list(side.outputs) == [("blue", "green", "red")[i] for i in logits.argmax(1).tolist()]
    numbers = load_dataset([{"text": r["prompt"], "label": i / 7} for i, r in enumerate(colour_rows(9))])
    session = session_on(tiny("bert"), numbers)
    assert names(session.evaluator(numbers, SETTINGS), session.model) == [{"pearson", "spearman", "mse"}]


# -- multiple choice -----------------------------------------------------------------------------------------


@torch.no_grad()
def choose_directly(session: Session, example: Any) -> int:
    """The choice whose tokens are likeliest per UTF-8 byte, scored one by one without padding."""
    best = []
    for choice in example.choices:
        head = session.tokenizer(example.prompt + "\n")["input_ids"]
        ids = session.tokenizer(example.prompt + "\n" + choice)["input_ids"]
        logp = torch.log_softmax(session.model.eval()(input_ids=torch.tensor([ids])).logits[0].double(), -1)
        total = sum(float(logp[t - 1, ids[t]]) for t in range(len(head), len(ids)))
        best.append(total / len(choice.encode("utf-8")))
    return int(np.argmax(best))


@pytest.mark.parametrize("loss_on", ["responses", "all"])
def test_the_likeliest_choice_per_byte_is_picked(tmp_path: Path, loss_on: str) -> None:
    folder = save_tiny("gpt2", tmp_path / "gpt2", initializer_range=0.3)
    rows = choice_rows()
    session = session_on(folder, rows, **{"data.loss_on": loss_on})
    expected = [choose_directly(session, example) for example in rows]
    assert len(set(expected)) > 1
    side = session.evaluator(rows, SETTINGS).measure(session.model)
    assert list(side.outputs) == [example.choices[i] for example, i in zip(rows, expected, strict=True)]
    accuracy = side.groups[1][0]
    right = [i == example.answer for example, i in zip(rows, expected, strict=True)]
    assert accuracy.value(accuracy.rows) == pytest.approx(sum(right) / len(right))


# -- two sides -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_the_base_side_is_the_untouched_model_and_the_tuned_side_is_not(tiny: Any, kind: str) -> None:
    rows = load_dataset(colour_rows(6))
    session = session_on(tiny(kind), rows)
    evaluator = session.evaluator(rows, SETTINGS)
    found = evaluator.side_by_side(session.model).to_dict()
    untouched = load_base(str(tiny(kind)), dtype="float32", device="cpu").model
    alone = {m.name: m.value(m.rows) for group in evaluator.measure(untouched).groups for m in group}
    assert found["metrics"]["base"] == pytest.approx(alone, nan_ok=True)
    assert abs(found["metrics"]["tuned"]["loss"] - alone["loss"]) > 1e-3
    tuned = {m.name: m.value(m.rows) for group in evaluator.measure(session.model).groups for m in group}
    assert found["metrics"]["tuned"] == pytest.approx(tuned, nan_ok=True)


def test_the_base_side_of_a_classifier_is_its_untrained_head(tiny: Any) -> None:
    rows = load_dataset([{"text": r["prompt"], "label": r["completion"].split()[-1]} for r in colour_rows(9)])
    session = session_on(tiny("bert"), rows)
    torch.nn.init.normal_(session.model.get_base_model().classifier.modules_to_save["default"].weight)
    found = session.evaluator(rows, SETTINGS).side_by_side(session.model).to_dict()["metrics"]
    assert (
        found["base"]["loss"] == pytest.approx(math.log(3), abs=0.05)
        and found["tuned"]["loss"] != found["base"]["loss"]
    )


def test_loss_is_the_mean_over_tokens_of_all_rows(tiny: Any) -> None:
    rows = load_dataset([{"prompt": "a", "completion": "blue green " * n} for n in (1, 30, 2)])
    session = session_on(tiny("gpt2"), rows)
    evaluator = session.evaluator(rows, Settings(generate=False))
    loss = next(m for m in evaluator.measure(session.model).groups[0] if m.name == "loss")
    batch = session.collator(evaluator.rows)
    with torch.no_grad():
        logits = session.model.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert loss.value(loss.rows) == pytest.approx(float(expected), rel=1e-5)


def test_intervals_and_counts_stand_beside_every_metric(tiny: Any) -> None:
    rows = load_dataset(colour_rows(6))
    session = session_on(tiny("gpt2"), rows)
    evaluation = session.evaluator(rows, Settings(max_generate_rows=4, max_new_tokens=4, resamples=10)).side_by_side(
        session.model
    )
    found = evaluation.to_dict()
    for part in (found["metrics"]["tuned"], *found["intervals"].values()):
        assert part.keys() == found["n"].keys()
    assert found["n"]["loss"] == 6 and found["n"]["bleu"] == 4
    assert [row[0] for row in evaluation.table()] == list(found["n"])
    low, high = found["intervals"]["tuned"]["loss"]
    assert low <= found["metrics"]["tuned"]["loss"] <= high


# -- predictions ---------------------------------------------------------------------------------------------


def test_predictions_belong_to_their_prompts(tmp_path: Path) -> None:
    folder = save_tiny("gpt2", tmp_path / "gpt2", initializer_range=0.3)
    asked = [
        {"prompt": "the cat " * n, "completion": f"the number {n}"} for n in (5, 1, 9, 3, 7)
    ]  # sorted when batched
    rows = load_dataset(asked)
    session = session_on(folder, rows)
    assert isinstance(session.encoder, TextEncoder)
    predictions = session.evaluator(rows, SETTINGS).side_by_side(session.model).predictions
    options: dict[str, Any] = {"stop_ids": session.encoder.stop_ids(), "max_new_tokens": 6, "batch_size": 1}
    for example, given, written in zip(rows, asked, predictions, strict=True):
        ids = [session.encoder.prompt_ids(example, 6)]
        assert written["prompt"] == given["prompt"].rstrip("\n") + ("" if given["prompt"][-1].isspace() else "\n")
        assert tuple(written["references"]) == (given["completion"],)
        assert written["tuned"] == generate(session.model, session.tokenizer, ids, **options)[0]
        with session.model.disable_adapter():
            assert written["base"] == generate(session.model, session.tokenizer, ids, **options)[0]
    assert len({row["tuned"] for row in predictions}) > 1


def test_predictions_of_a_classifier_name_the_text_and_the_label(tiny: Any) -> None:
    given = [{"text": r["prompt"], "text_pair": "and", "label": r["completion"].split()[-1]} for r in colour_rows(6)]
    rows = load_dataset(given)
    session = session_on(tiny("bert"), rows)
    predictions = session.evaluator(rows, SETTINGS).side_by_side(session.model).predictions
    assert [{k: p[k] for k in ("text", "text_pair", "label")} for p in predictions] == given
    assert {p["tuned"] for p in predictions} <= {"blue", "green", "red"}


def test_predictions_are_json_lines_in_any_language() -> None:
    import json

    rows = [{"prompt": "grün\nzwei", "base": "", "tuned": "蓝"}]
    text = write_predictions(rows)
    assert text.count("\n") == 1 and "grün" in text and "蓝" in text
    assert [json.loads(line) for line in text.splitlines()] == rows
    assert write_predictions([]) == ""


# -- rows that do not suit -----------------------------------------------------------------------------------


def test_rows_of_another_task_are_refused(tiny: Any) -> None:
    texts, labels = (
        load_dataset(colour_rows(6)),
        load_dataset([{"text": "a", "label": "b"}, {"text": "c", "label": "d"}]),
    )
    plain = load_dataset([{"text": "the cat"}])
    with pytest.raises(DataError, match="classification does not suit task causal-lm"):
        session_on(tiny("gpt2"), texts).evaluator(labels)
    with pytest.raises(DataError, match="prompt-completion does not suit task classification"):
        session_on(tiny("bert"), labels).evaluator(texts)
    with pytest.raises(DataError, match="encoder-decoder needs rows with a prompt"):
        session_on(tiny("t5"), texts).evaluator(plain)
    with pytest.raises(DataError, match="'e' does not occur in the training data"):
        session_on(tiny("bert"), labels).evaluator(load_dataset([{"text": "a", "label": "e"}]))
