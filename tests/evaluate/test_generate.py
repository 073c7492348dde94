"""Answers written in batches are the answers written alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from trivet.evaluate.generate import generate

PROMPTS = ["the cat", "what colour is the sky ?", "zero one two three four five six", "dog", "name : The Vaults"]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5", "bart"])
def test_batched_equals_one_by_one(tiny: Any, kind: str) -> None:
    family = AutoModelForSeq2SeqLM if kind in ("t5", "bart") else AutoModelForCausalLM
    model = family.from_pretrained(tiny(kind), dtype=torch.float32)
    with torch.no_grad():  # larger random weights, so that different prompts get different answers
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    tokenizer = AutoTokenizer.from_pretrained(tiny(kind))
    tokenizer.pad_token = tokenizer.eos_token
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    options = {"stop_ids": [tokenizer.eos_token_id], "max_new_tokens": 12}
    together = generate(model, tokenizer, ids, batch_size=8, **options)
    alone = [generate(model, tokenizer, [one], batch_size=1, **options)[0] for one in ids]
    assert together == alone
    assert kind == "bart" or len(set(together)) > 1  # a random BART answers all prompts alike


def test_stops_at_a_stop_token_and_leaves_the_prompt_out(tiny: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("gpt2"), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny("gpt2"))
    tokenizer.pad_token = tokenizer.eos_token
    ids = tokenizer("the cat")["input_ids"]
    with torch.no_grad():
        first = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
    free = generate(model, tokenizer, [ids], stop_ids=[tokenizer.eos_token_id], max_new_tokens=6)[0]
    assert "the cat" not in free[:7]
    stopped = generate(model, tokenizer, [ids], stop_ids=[first], max_new_tokens=6)[0]
    assert stopped == tokenizer.decode([first]).strip() != free


def test_sampling_settings_of_a_checkpoint_do_not_leak_in(tiny: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    tokenizer.pad_token = tokenizer.eos_token
    ids = [tokenizer("the cat")["input_ids"]]
    options = {"stop_ids": [tokenizer.eos_token_id], "max_new_tokens": 10}
    greedy = generate(model, tokenizer, ids, **options)
    model.generation_config.do_sample, model.generation_config.temperature = True, 50.0
    assert [generate(model, tokenizer, ids, **options) for _ in range(3)] == [greedy] * 3
