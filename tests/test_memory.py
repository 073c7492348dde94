"""Memory: what the process reports, and the estimate against what tensors really take."""

from __future__ import annotations

import mmap
from typing import Any

import pytest
import torch

from conftest import tiny_model
from trivet.adapter.attach import attach, trainable_parameters
from trivet.memory import Estimate, current_memory, estimate, peak_memory


@pytest.mark.skipif(torch.cuda.is_available(), reason="reports the GPU's memory here")
def test_resident_memory_grows_with_what_is_held() -> None:
    before = current_memory()
    held = mmap.mmap(-1, 64 * 2**20)  # from the system: the heap may have kept as much of what was freed before
    held.write(b"x" * len(held))
    grown = current_memory() - before
    assert 0.9 * len(held) <= grown <= 2.5 * len(held)
    assert peak_memory() >= 0.95 * current_memory()


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5", "bart"])
def test_weights_and_adapter_are_counted_exactly(kind: str) -> None:
    model = attach(tiny_model(kind, 64), lora_rank=4)
    found = estimate(model, rows=2, length=16, checkpointing=False)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert found.weights == 4 * frozen
    assert found.adapter == 16 * trainable_parameters(model)  # value, gradient, two moments, 4 bytes each
    assert found.total == found.weights + found.adapter + found.activations


class Kept:
    """Bytes that autograd keeps for the backward pass, each storage once and parameters not at all."""

    def __init__(self, model: Any) -> None:
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.sizes: dict[int, int] = {}
        self.alive: list[torch.Tensor] = []

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.sizes[storage.data_ptr()] = storage.nbytes()
            self.alive.append(tensor)
        return tensor


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_activations_are_of_the_right_size(kind: str) -> None:
    """Within a factor of 2.5 of what autograd keeps: an estimate that warns, no accounting."""
    model = attach(tiny_model(kind, 64), lora_rank=4)
    kept = Kept(model)
    ids = torch.randint(0, 64, (4, 64))
    with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
        loss = model.train()(input_ids=ids, labels=ids).loss
    real = sum(kept.sizes.values())
    found = estimate(model, rows=4, length=64, checkpointing=False).activations
    assert real / 2.5 <= found <= real * 2.5
    loss.backward()


def test_the_estimate_follows_rows_length_and_checkpointing() -> None:
    model = attach(tiny_model("llama", 64), lora_rank=4)

    def activations(rows: int, length: int, checkpointing: bool = False) -> int:
        return estimate(model, rows=rows, length=length, checkpointing=checkpointing).activations

    assert activations(4, 16) == 2 * activations(2, 16) == activations(2, 32)
    assert activations(2, 16, checkpointing=True) < activations(2, 16)


def test_it_prints_in_mebibytes() -> None:
    assert str(Estimate(2**20, 2**21, 2**22)) == "weights 1 MiB, adapter and optimizer 2 MiB, activations 4 MiB"
