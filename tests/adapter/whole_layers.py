"""What layers that are one function are held to, whatever they compute: for test_decoder.py and test_encoder.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from trivet import attach
from trivet.loss import training_loss

Batch = dict[str, torch.Tensor]


def adapted(model: Any, task: str, **settings: Any) -> Any:
    """With factors none of which is zero."""
    found = attach(model, task=task, **{"lora_rank": 9} | settings)
    generator = torch.Generator().manual_seed(1)
    for name, factor in found.named_parameters():
        if factor.requires_grad and "lora_" in name:
            factor.data = torch.randn(factor.shape, generator=generator).to(factor.dtype) / 16
    return found.train()


def watched(monkeypatch: pytest.MonkeyPatch, module: Any, asked: Callable[[], bool] = lambda: True) -> list[bool]:
    """Whether each pass of a layer, among those that are `asked` for, was one function: of `module._together`."""
    found, own = [], module._together

    def spy(*given: Any) -> torch.Tensor | None:
        counted = asked()
        found.extend([True] * counted)  # recomputing ends before the last result is there
        y = own(*given)
        if counted and y is None:
            found[-1] = False
        return y

    monkeypatch.setattr(module, "_together", spy)
    return found


def ids_and_mask(rows: int, length: int, vocabulary: int) -> Batch:
    """The second row is half padding."""
    ids = torch.randint(1, vocabulary, (rows, length), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def results(model: Any, batch: Batch, task: str) -> Batch:
    """The loss, and the gradients of what learns."""
    inputs = dict(batch)
    labels = inputs.pop("labels")
    loss = training_loss(model, inputs, labels, task=task)
    learn = {name: each for name, each in model.named_parameters() if each.requires_grad}
    return {"loss": loss.detach(), **dict(zip(learn, torch.autograd.grad(loss, list(learn.values())), strict=True))}


def reads_a_repeated_number(y: torch.Tensor, x: torch.Tensor, layer: Any) -> None:
    """A sum's gradient has no memory of its own: y's are those of a gradient that has."""
    learn = [x, *(factor for factor in layer.parameters() if factor.requires_grad)]
    one = torch.ones((), dtype=y.dtype)
    found = [
        torch.autograd.grad(y, learn, grad, retain_graph=True) for grad in (one.expand(y.shape), torch.ones_like(y))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def leaves_out(frozen: str, make: Callable[[], Any], found: Callable[[Any], Batch], together: list[bool]) -> None:
    """What does not learn has no gradient, and all else the same one."""
    whole, model = found(make()), make()
    for name, factor in model.named_parameters():
        factor.requires_grad_(factor.requires_grad and frozen not in name)
    together.clear()
    some = found(model)
    assert together == [True, True] and len(some) == len(whole) - 2
    assert all(torch.equal(some[name], whole[name]) for name in some)


def shows_hidden_states(model: Any, batch: Batch, together: list[bool], in_parts: Callable[[], None]) -> None:
    """transformers hooks attention for its weights, and layers for hidden states."""
    inputs = {name: each for name, each in batch.items() if name != "labels"}
    whole = model(**inputs, output_hidden_states=True)
    assert together[-2:] == [True, True] and len(whole.hidden_states) == 3
    in_parts()
    for ours, theirs in zip(whole.hidden_states, model(**inputs, output_hidden_states=True).hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.03, atol=0.03 * float(theirs.detach().abs().max()))
