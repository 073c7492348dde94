"""Scores and answers from one reading of each row are those of two."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from test_generate import CHANGES
from test_measure import session_on
from transformers import DynamicCache

from conftest import save_tiny, tiny_model
from trivet.data.dataset import load_dataset
from trivet.evaluate import measure
from trivet.evaluate.measure import Evaluator, Settings, Side
from trivet.evaluate.reading import _move_to_end, reads_once, score_endings
from trivet.evaluate.score import likelihood, without_ending

SETTINGS = Settings(batch_size=3, max_new_tokens=6, resamples=10)
ASKED = [
    "the cat sat",
    "what colour is the sky ? the sky is",
    "zero one two three four five",
    "a",
    "Hello! How are you?",
]


#: The longest prompt has the shortest answer.
ROWS = [
    {"prompt": prompt, "completion": " ".join(["blue"] * n)} for prompt, n in zip(ASKED, (4, 1, 9, 30, 3), strict=True)
]


def read(evaluator: Evaluator, model: Any) -> tuple[Side, int]:
    """What is measured, and how many tokens the model, or its encoder, reads for it."""
    tokens = 0

    def count(_: Any, args: Any, kwargs: Any) -> None:
        nonlocal tokens
        tokens += kwargs["input_ids"].numel()

    inner = model.get_base_model()
    reader = inner.get_encoder() if inner.config.is_encoder_decoder else inner
    watch = reader.register_forward_pre_hook(count, with_kwargs=True)
    try:
        return evaluator.measure(model), tokens
    finally:
        watch.remove()


def check_same(side: Side, other: Side, tolerance: float) -> None:
    assert list(side.outputs) == list(other.outputs)
    for group, others in zip(side.groups, other.groups, strict=True):
        for metric, same in zip(group, others, strict=True):
            np.testing.assert_allclose(metric.rows, same.rows, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("gpt2", {}),
        ("llama", {}),
        ("llama", {"data.chat_template": "none"}),
        ("llama", {"data.loss_on": "all"}),
        ("phimoe", {}),
        ("bart", {}),
        ("t5", {}),
    ],
)
def test_one_reading_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, settings: dict[str, Any]
) -> None:
    data = load_dataset(ROWS)
    folder = save_tiny(kind, tmp_path / kind, **CHANGES.get(kind, CHANGES["gpt2"]))
    session = session_on(folder, data, **settings)
    evaluator = session.evaluator(data, SETTINGS)
    for how in (session.model.disable_adapter, torch.no_grad):  # without its adapter, and with it
        with how():
            once, fewer = read(evaluator, session.model)
            monkeypatch.setattr(measure, "reads_once", lambda *_: False)
            twice, tokens = read(evaluator, session.model)
            monkeypatch.undo()
        assert len(set(once.outputs)) > 1, "a model that always writes the same shows nothing"
        check_same(once, twice, 1e-4)
        prompts = sum(len(evaluator.encoder.prompt_ids(e)) for e in data)  # type: ignore[union-attr]
        assert tokens - fewer >= prompts - len(ASKED)


@pytest.mark.parametrize("rest", [{"max_generate_rows": 2}, {"max_new_tokens": 125}])
def test_rows_that_are_only_scored_or_cut_are_measured_as_before(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, rest: dict[str, int]
) -> None:
    """Prompts that leave room for a long answer lose their middle, and are then no beginning of their rows."""
    data = load_dataset([{"prompt": "what colour is the sky ? " * 6, "completion": "blue"}, *ROWS])
    session = session_on(tiny("llama"), data, **{"data.max_length": 128})
    evaluator = session.evaluator(data, Settings(**{"batch_size": 2, "max_new_tokens": 6, "resamples": 10, **rest}))
    once = evaluator.measure(session.model)
    monkeypatch.setattr(measure, "reads_once", lambda *_: False)
    check_same(once, evaluator.measure(session.model), 1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bart", "t5"])
def test_a_prompt_is_read_once_for_all_its_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    choices = ["blue", "the colour of the sky on a fine day", "green grass", "red", "a cat"]
    data = load_dataset(
        [{"prompt": p, "choices": choices[i % 3 :], "answer": i % 2} for i, p in enumerate([*ASKED, *ASKED[::-1]])]
    )
    session = session_on(save_tiny(kind, tmp_path / kind, **CHANGES[kind]), data)
    evaluator = session.evaluator(data, Settings(batch_size=11, resamples=10))
    with read_by_choices(monkeypatch) as found:
        once, fewer = read(evaluator, session.model)
    monkeypatch.setattr(measure, "reads_once", lambda *_: False)
    twice, tokens = read(evaluator, session.model)
    check_same(once, twice, 1e-4)
    assert fewer < 0.8 * tokens
    rows = [
        without_ending(evaluator.encoder.encode(replace(example, completion=choice))[0][0])
        for example in data
        for choice in example.choices
    ]
    direct = likelihood(session.model, rows, session.collator, task=session.base.task, batch_size=4).nll
    np.testing.assert_allclose(np.concatenate([found[i] for i in range(len(data))]), direct, rtol=1e-4)


@contextlib.contextmanager
def read_by_choices(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, Any]]:
    """What `score_endings` gives in a measurement, by row."""
    found: dict[int, Any] = {}

    def kept(scorer: Any, indices: Any, *rest: Any) -> Any:
        given = score_endings(scorer, indices, *rest)
        found.update(zip(indices, given, strict=True))
        return given

    with monkeypatch.context() as patch:
        patch.setattr(measure, "score_endings", kept)
        yield found


def test_choices_without_a_common_prompt_are_scored_one_by_one(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long ones take a part of the prompt's room."""
    choices = ["blue", "the colour of the sky " * 12]
    data = load_dataset([{"prompt": "what colour is the sky ? " * 9, "choices": choices, "answer": 0}] * 2)
    session = session_on(tiny("gpt2"), data, **{"data.max_length": 100})
    evaluator = session.evaluator(data, SETTINGS)
    with read_by_choices(monkeypatch) as found:
        once = evaluator.measure(session.model)
    assert not found
    monkeypatch.setattr(measure, "reads_once", lambda *_: False)
    check_same(once, evaluator.measure(session.model), 1e-4)


def test_an_encoder_decoder_goes_on_from_the_prompt_and_nothing_more(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt that repeats itself begins like its row when it is cut, but an encoder sees all of a row."""
    data = load_dataset([{"prompt": "a" * 90, "completion": "blue"}, *ROWS])
    session = session_on(tiny("t5"), data, **{"data.max_length": 128})
    evaluator = session.evaluator(data, Settings(batch_size=2, max_new_tokens=60, resamples=10))
    cut, row = evaluator.encoder.prompt_ids(data[0], 60), evaluator.rows[0]["input_ids"]  # type: ignore[union-attr]
    assert len(cut) < len(row) and reads_once(session.model, [{"input_ids": cut}], [cut])
    assert not reads_once(session.model, [evaluator.rows[0]], [cut])
    once = evaluator.measure(session.model)
    monkeypatch.setattr(measure, "reads_once", lambda *_: False)
    check_same(once, evaluator.measure(session.model), 1e-4)


def test_training_goes_on_as_it_was(tiny: Any) -> None:
    data = load_dataset(ROWS)
    session = session_on(tiny("llama"), data)
    session.model.train()
    session.evaluator(data, SETTINGS).measure(session.model)
    assert session.model.training


# -- whose cache can be moved ---------------------------------------------------------------------------------

COMMON: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {**COMMON, "intermediate_size": 32}


def llama(**rope: Any) -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA, rope_parameters={"rope_theta": 10000.0, **rope}))


def mistral(window: int | None) -> Any:
    sizes = {**LLAMA, "num_key_value_heads": 1}
    return hf.MistralForCausalLM(hf.MistralConfig(**sizes, sliding_window=window))


@pytest.mark.parametrize(
    ("model", "able"),
    [
        (lambda: tiny_model("gpt2", 64), True),
        (lambda: tiny_model("llama", 64), True),
        (lambda: llama(rope_type="linear", factor=2.0), True),
        (lambda: llama(rope_type="dynamic", factor=2.0), False),
        (lambda: mistral(None), True),
        (lambda: mistral(8), False),
        (lambda: hf.MptForCausalLM(hf.MptConfig(vocab_size=64, d_model=32, n_heads=2, n_layers=1)), False),
        (lambda: hf.MambaForCausalLM(hf.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1)), False),
        (lambda: tiny_model("t5", 64), True),
    ],
    ids=["gpt2", "llama", "linear", "dynamic", "mistral", "window", "alibi", "states", "t5"],
)
def test_whose_cache_can_be_moved(model: Any, able: bool) -> None:
    assert reads_once(model(), [], []) == able


def entries(numbers: Sequence[Sequence[int]]) -> torch.Tensor:
    """(rows, 2 heads, places, 3), each entry its number."""
    return torch.tensor(numbers)[:, None, :, None].expand(-1, 2, -1, 3).clone()


def test_entries_move_to_the_end() -> None:
    cache = DynamicCache(config=hf.LlamaConfig(**LLAMA))
    for layer in range(2):
        numbers = entries([[1, 2, 3, 4], [5, 6, 7, 8]])
        cache.update(numbers, numbers[..., :2] * 10, layer)
    _move_to_end(cache, [3, 1], 3)
    assert cache.get_seq_length() == 3
    for layer in cache.layers:
        assert torch.equal(layer.keys[0], entries([[1, 2, 3]])[0]) and layer.keys[1, :, 2:].unique().tolist() == [5]
        assert torch.equal(layer.values[0], entries([[10, 20, 30]])[0, ..., :2])
        assert layer.values[1, :, 2:].unique().tolist() == [50]
    _move_to_end(cache, [2, 1], 5)
    assert torch.equal(cache.layers[0].keys[0, :, 3:], entries([[1, 2]])[0])
