"""Every architecture learns a closed-form task through `trivet.run.train`, to the end of its answers.

The bodies are tiny, random and frozen, so ranks are high, rates large and dropout is off.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from conftest import COLOURS, colour_rows, save_tiny, slow
from trivet.configio import load
from trivet.data.detect import Example
from trivet.evaluate.generate import generate
from trivet.run import Outcome, train

#: Weights large enough for logits that tell words apart; an end-of-sequence token whose embedding is no padding's zero.
CHANGES: dict[str, dict[str, Any]] = {
    "gpt2": {"initializer_range": 0.3, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "llama": {"initializer_range": 0.3, "pad_token_id": None},
    "bart": {"init_std": 0.2, "dropout": 0.0, "pad_token_id": 1},
    "t5": {"dropout_rate": 0.0},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "roberta": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "distilbert": {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0},
}


def tune(kind: str, folder: Path, rows: list[dict[str, Any]], test: list[dict[str, Any]], **settings: Any) -> Outcome:
    changes = CHANGES[kind] | ({"initializer_range": 0.1} if "label" in rows[0] else {})
    base = save_tiny(kind, folder / kind, **changes)
    values = {
        "model.name": str(base),
        "model.dtype": "float32",
        "model.device": "cpu",
        "model.lora_rank": 16,
        "data.validation": None,
        "training.learning_rate": 1e-2,
        "training.max_steps": 120,
        "training.lr_scheduler": "linear",
        "evaluation.max_new_tokens": 40,
        "evaluation.resamples": 10,
        "output_dir": str(folder / "run"),
    }
    return train(load(values=values | settings), train=rows, test=test, console=Console(quiet=True))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bart", "t5"])
def test_answers_are_learned_with_their_end(tmp_path: Path, kind: str) -> None:
    asked = colour_rows(3)
    outcome = tune(kind, tmp_path, colour_rows(24), asked)
    metrics = outcome.result["metrics"]
    assert metrics["tuned"]["token_accuracy"] == metrics["tuned"]["exact_match"] == 1.0
    assert metrics["base"]["exact_match"] == 0.0
    assert metrics["tuned"]["loss"] < metrics["base"]["loss"] / 4
    session = outcome.session
    encoder: Any = session.encoder
    longest = max(len(session.tokenizer(row["completion"])["input_ids"]) for row in asked)
    prompts = [encoder.prompt_ids(Example(prompt=row["prompt"])) for row in asked]
    options: dict[str, Any] = {"stop_ids": encoder.stop_ids(), "batch_size": 1}
    exact = generate(session.model, session.tokenizer, prompts, max_new_tokens=longest + 1, **options)
    roomy = generate(session.model, session.tokenizer, prompts, max_new_tokens=100, **options)
    assert exact == roomy == [row["completion"] for row in asked]  # stopped by itself, with room for 100 tokens


@pytest.mark.parametrize("kind", ["bert", *slow("roberta", "distilbert"), "gpt2"])
def test_classes_are_learned(tmp_path: Path, kind: str) -> None:
    filler, draw = (
        ["the", "cat", "sat", "on", "mat", "and", "dog", "ran", "to", "number", "plus", "minus"],
        random.Random(0),
    )
    rows = []
    for i in range(330):
        thing, words = list(COLOURS)[i % 3], draw.choices(filler, k=3)
        words.insert(draw.randrange(4), thing)
        rows.append({"text": " ".join(words), "label": COLOURS[thing]})
    outcome = tune(kind, tmp_path, rows[30:], rows[:30], **{"training.max_steps": 200, "training.learning_rate": 5e-3})
    metrics = outcome.result["metrics"]
    assert metrics["tuned"]["accuracy"] >= 0.9 and metrics["tuned"]["macro_f1"] >= 0.9
    assert metrics["base"]["accuracy"] <= 0.7
    assert outcome.session.base.labels == ("blue", "green", "red")


@pytest.mark.parametrize("kind", ["bert", *slow("distilbert")])
def test_numbers_are_learned(tmp_path: Path, kind: str) -> None:
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    rows = [{"text": f"the number {a} plus {b}", "label": (i + j) / 10 - 0.95}
            for i, a in enumerate(words) for j, b in enumerate(words)]  # fmt: skip
    held = rows[::7]
    outcome = tune(kind, tmp_path, [row for row in rows if row not in held], held, **{"training.max_steps": 200})
    metrics = outcome.result["metrics"]
    assert metrics["tuned"]["pearson"] > 0.9 and metrics["tuned"]["spearman"] > 0.9
    assert metrics["tuned"]["mse"] < metrics["base"]["mse"] / 4


def test_gradient_checkpointing_learns_the_same(tmp_path: Path) -> None:
    losses = []
    for flag in (False, True):
        settings = {"training.gradient_checkpointing": flag, "training.max_steps": 6}
        tune("llama", tmp_path / str(flag), colour_rows(24), colour_rows(3), **settings)
        lines = (tmp_path / str(flag) / "run" / "log.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]


def test_sixteen_bit_weights_learn(tmp_path: Path) -> None:
    outcome = tune("llama", tmp_path, colour_rows(24), colour_rows(3), **{"model.dtype": "bfloat16"})
    assert outcome.result["dtype"] == "bfloat16"
    assert outcome.result["metrics"]["tuned"]["exact_match"] == 1.0
