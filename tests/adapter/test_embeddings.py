"""Adapted embeddings: token ids come in, and every leg but the cores works on them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel

from conftest import tiny_model
from trivet.adapter.attach import attach
from trivet.adapter.layers import adapted_layers
from trivet.adapter.plan import optimizer
from trivet.adapter.save import export
from trivet.rank.policy import parameters
from trivet.train.ranks import RankCallback

BATCH = {
    "input_ids": torch.arange(2, 42).reshape(4, 10) % 23 + 2,
    "labels": torch.arange(2, 42).reshape(4, 10) % 23 + 2,
}


@pytest.mark.parametrize("form", ["native", "portable"])
@pytest.mark.parametrize("update", ["adamw", "equivariant"])
def test_an_embedding_is_squeezed_saved_and_loaded(tmp_path: Path, update: str, form: str) -> None:
    def fresh() -> object:
        return tiny_model("llama", 64, initializer_range=0.2, tie=False)

    model = attach(
        fresh(),
        lora_rank=2,
        target_modules=["embed_tokens", "q_proj", "down_proj"],
        method={"rank": {"name": "squeeze", "start_rank": 6}, "update": update},
    )
    layers = adapted_layers(model)
    embedding = layers[0]
    assert embedding.embedding and embedding.shape == (32, 64) == embedding.weight.shape
    torch.testing.assert_close(embedding.weight, model.get_input_embeddings().weight.detach().T)
    made, ranks = optimizer(model, learning_rate=0.02), RankCallback(model)
    state = SimpleNamespace(global_step=0, max_steps=12, is_world_process_zero=True)
    args = SimpleNamespace(seed=0)
    ranks.on_train_begin(args, state, None)
    losses = []
    for _ in range(12):
        ranks.on_step_begin(args, state, None)
        loss = model(**BATCH).loss
        loss.backward()
        losses.append(float(loss.detach()))
        del loss
        ranks.on_pre_optimizer_step(args, state, None)
        made.step()
        made.zero_grad()
        state.global_step += 1
        ranks.on_step_end(args, state, None, optimizer=made)
    assert losses[-1] < losses[0] - 0.05
    assert parameters(adapted_layers(model)) <= 2 * ((32 + 64) + 2 * (64 + 96))
    export(model, tmp_path / "adapter", form, {"input_ids": BATCH["input_ids"]})
    again = PeftModel.from_pretrained(fresh(), str(tmp_path / "adapter"))  # type: ignore[arg-type]
    model.eval()
    again.eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**BATCH).logits, model(**BATCH).logits, rtol=1e-4, atol=1e-4)
