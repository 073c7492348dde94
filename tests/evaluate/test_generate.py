"""Answers in padded batches are those of each prompt alone, token by token; stop tokens stop."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf

from conftest import save_tiny
from trivet.adapter.attach import attach
from trivet.evaluate.generate import generate
from trivet.model import Base, load_base

#: Weights large enough that what comes next depends on what was read.
CHANGES: dict[str, dict[str, Any]] = {
    "gpt2": {"initializer_range": 0.3},
    "llama": {"initializer_range": 0.3, "pad_token_id": None},
    "bart": {"init_std": 0.3, "pad_token_id": 1},
    "t5": {"initializer_factor": 3.0},
}
TEXTS = [
    "the cat sat",
    "what colour is the sky ? the sky is blue",
    "zero one two three four five six",
    "Hello!",
    "a",
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    place = tmp_path_factory.mktemp("generate")
    return {
        kind: load_base(str(save_tiny(kind, place / kind, **changes)), dtype="float32", device="cpu")
        for kind, changes in CHANGES.items()
    }


def prompts(base: Base) -> list[list[int]]:
    return [base.tokenizer(text)["input_ids"] for text in TEXTS]


@torch.no_grad()
def greedy(base: Base, ids: list[int], n: int, stop: list[int]) -> list[int]:
    """The most likely token, `n` times or until a stop token: no batch, no padding, no cache."""
    model, new = base.model.eval(), list[int]()
    seq2seq = model.config.is_encoder_decoder
    written = [model.config.decoder_start_token_id] if seq2seq else list(ids)
    while len(new) < n and not (new and new[-1] in stop):
        rest = {"decoder_input_ids": torch.tensor([written])} if seq2seq else {}
        read = torch.tensor([ids if seq2seq else written])
        new.append(int(model(input_ids=read, use_cache=False, **rest).logits[0, -1].argmax()))
        written.append(new[-1])
    return new


def text_of(base: Base, ids: list[int]) -> str:
    return str(base.tokenizer.decode(ids, skip_special_tokens=True)).strip()


@pytest.mark.parametrize("kind", CHANGES)
def test_batches_write_what_each_prompt_alone_gives(bases: dict[str, Base], kind: str) -> None:
    base, stop = bases[kind], [bases[kind].tokenizer.eos_token_id]
    expected = [text_of(base, greedy(base, ids, 12, stop)) for ids in prompts(base)]
    assert len(set(expected)) > 1, "a model that always writes the same shows nothing"
    for size in (1, 2, 5):
        found = generate(base.model, base.tokenizer, prompts(base), stop_ids=stop, max_new_tokens=12, batch_size=size)
        assert found == expected


@pytest.mark.parametrize("kind", CHANGES)
def test_any_of_the_stop_tokens_ends_the_answer(bases: dict[str, Base], kind: str) -> None:
    base, eos = bases[kind], bases[kind].tokenizer.eos_token_id
    asked = prompts(base)
    whole = [greedy(base, ids, 12, [eos]) for ids in asked]
    stops = [eos, whole[0][3], whole[1][5]]
    expected = [greedy(base, ids, 12, stops) for ids in asked]
    assert [len(ids) for ids in expected] != [len(ids) for ids in whole]
    found = generate(base.model, base.tokenizer, asked, stop_ids=stops, max_new_tokens=12, batch_size=5)
    assert found == [text_of(base, ids) for ids in expected]


@pytest.mark.parametrize("kind", ["gpt2", "bart"])
@pytest.mark.parametrize("adapted", [False, True])
def test_a_checkpoints_own_settings_do_not_leak_in(bases: dict[str, Base], kind: str, adapted: bool) -> None:
    """Beams, penalties and lengths, as summarisers and chat models have them in generation_config.json."""
    base = bases[kind]
    model = attach(copy.deepcopy(base.model)) if adapted else copy.deepcopy(base.model)
    options: dict[str, Any] = {"stop_ids": [0], "max_new_tokens": 12, "batch_size": 5}
    plain = generate(model, base.tokenizer, prompts(base), **options)
    torch.manual_seed(1)
    sampled = generate(model, base.tokenizer, prompts(base), temperature=2.0, **options)
    holder = model.get_base_model() if adapted else model
    own = hf.GenerationConfig(
        num_beams=3, repetition_penalty=3.0, no_repeat_ngram_size=2, length_penalty=2.0, min_length=60, max_length=70,
        do_sample=True, temperature=0.1, top_k=1, early_stopping=True, forced_eos_token_id=5, suppress_tokens=[9],
    )  # fmt: skip
    holder.generation_config = own
    assert generate(model, base.tokenizer, prompts(base), **options) == plain
    torch.manual_seed(1)
    assert generate(model, base.tokenizer, prompts(base), temperature=2.0, **options) == sampled
    assert holder.generation_config is own


def test_sampling_follows_torchs_seed_and_the_temperature(bases: dict[str, Base]) -> None:
    base = bases["llama"]

    def sample(seed: int, temperature: float, top_p: float = 1.0) -> list[str]:
        torch.manual_seed(seed)
        return generate(
            base.model, base.tokenizer, prompts(base), stop_ids=[0], max_new_tokens=8,
            temperature=temperature, top_p=top_p,
        )  # fmt: skip

    greedy_texts = generate(base.model, base.tokenizer, prompts(base), stop_ids=[0], max_new_tokens=8)
    assert sample(1, 5.0) == sample(1, 5.0) != sample(2, 5.0)
    assert sample(1, 1e-4) == greedy_texts
    assert sample(1, 5.0, top_p=1e-6) == greedy_texts


def test_progress_counts_every_prompt_and_the_mode_is_restored(bases: dict[str, Base]) -> None:
    base, seen = bases["gpt2"], list[int]()
    base.model.train()
    generate(
        base.model,
        base.tokenizer,
        prompts(base),
        stop_ids=[0],
        max_new_tokens=2,
        batch_size=2,
        progress=seen.append,
    )
    assert base.model.training and sum(seen) == len(TEXTS)
    assert base.model.config.use_cache is False


def test_no_prompts_no_answers(bases: dict[str, Base]) -> None:
    assert generate(bases["gpt2"].model, bases["gpt2"].tokenizer, [], stop_ids=[0]) == []


def test_an_answer_ends_at_the_models_last_position(bases: dict[str, Base]) -> None:
    base = bases["gpt2"]
    assert base.model.config.max_position_embeddings == 128
    ids = torch.randint(1, 300, (122,), generator=torch.Generator().manual_seed(0)).tolist()
    found = generate(base.model, base.tokenizer, [ids], stop_ids=[0], max_new_tokens=50)
    assert found == [text_of(base, greedy(base, ids, 6, [0]))]
