"""What is made again instead of kept: by what, how often, and when it must not be."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from test_fast import one_layer, pefts
from torch import nn
from transformers import BertForSequenceClassification
from transformers.activations import ACT2FN

from conftest import tiny_model
from trivet import attach
from trivet.fast import speed_up
from trivet.kernels.gate import silu_gate
from trivet.kernels.norm import layer_norm, rms_norm
from trivet.kernels.recipe import Maker, carries, kept_for, rows_from


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def kept_by(forward: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(the result, what autograd keeps for it: each storage once)."""
    kept: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        return forward(), list(kept.values())


MAKERS = {
    "rms_norm": lambda x: rms_norm(x, draw(12, seed=5), 1e-5),
    "layer_norm": lambda x: layer_norm(x, draw(12, seed=5), draw(12, seed=6), 1e-5),
    "layer_norm without a bias": lambda x: layer_norm(x, draw(12, seed=5), None, 1e-5),
    "silu_gate": lambda x: silu_gate(x, x.sin()),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_layer_that_reads_it_keeps_nothing_of_it_and_learns_the_same(name: str) -> None:
    layer, x = one_layer(), draw(3, 5, 12, seed=1).requires_grad_()
    factors = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    y, made = kept_by(lambda: MAKERS[name](x))
    _, read = kept_by(lambda: layer(y))
    known = {t.untyped_storage().data_ptr() for t in made}
    large = [t for t in read if t.numel() >= x.numel()]
    assert y.untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in large}
    assert {t.untyped_storage().data_ptr() for t in large} <= known

    weights = draw(3, 5, 10, seed=2)
    found = torch.autograd.grad(layer(MAKERS[name](x)), [x, *factors], weights)
    wanted = torch.autograd.grad(pefts(layer)(MAKERS[name](x)), [x, *factors], weights)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MAKERS)
def test_what_was_changed_in_place_is_kept(name: str) -> None:
    layer, x = one_layer(), draw(4, 12, seed=1).requires_grad_()
    a = layer.lora_A["default"].weight
    found = torch.autograd.grad(layer(MAKERS[name](x).mul_(3)).sum(), a)[0]
    torch.testing.assert_close(found, torch.autograd.grad(layer(MAKERS[name](x) * 3).sum(), a)[0])


def test_it_is_made_once_for_all_layers_that_read_it() -> None:
    calls: list[int] = []
    x = draw(4, 6).requires_grad_()

    def make(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return x * 2

    y = carries(make(x), make, x)
    calls.clear()
    given = [kept_for(y, y) for _ in range(3)]
    made = [rows_from(maker, kept) for maker, kept in given]
    assert len(calls) == 1 and {each.data_ptr() for each in made} == {made[0].data_ptr()}
    maker: Any = given[0][0]
    assert maker.made is None  # the last one lets go of it
    assert torch.equal(rows_from(*given[0]), x * 2) and maker.made is None  # a graph that was retained


def test_nothing_is_held_before_the_backward_pass() -> None:
    maker = Maker(torch.sin)
    assert not any(isinstance(value, torch.Tensor) for value in vars(maker).values())


def test_an_input_that_is_changed_after_it_was_read_is_refused() -> None:
    layer, x = one_layer(), draw(4, 12, seed=1).requires_grad_()
    inner = x * 1
    y = layer(layer_norm(inner, draw(12, seed=5), None, 1e-5))
    with torch.no_grad():
        inner.add_(1)
    with pytest.raises(RuntimeError, match="inplace operation"):
        y.sum().backward()


def test_without_a_gradient_there_is_no_recipe() -> None:
    x = draw(4, 12)
    with torch.no_grad():
        assert not any(hasattr(make(x.clone().requires_grad_()), "recipe") for make in MAKERS.values())
    assert not any(hasattr(make(x), "recipe") for make in MAKERS.values())


@pytest.mark.parametrize("name", [*MAKERS, "adapted layer"])
def test_a_second_derivative_is_never_wrong(name: str) -> None:
    """Refused where what is kept has no gradient of its own; torch's layer norm has one."""
    x = draw(2, 12, seed=1).requires_grad_()
    y = (one_layer() if name == "adapted layer" else MAKERS[name])(x)
    first = torch.autograd.grad(y.square().sum(), x, create_graph=True)[0]
    refused = pytest.raises(RuntimeError, match="once_differentiable")
    with contextlib.nullcontext() if "layer_norm" in name else refused:
        first.sum().backward()


# -- activations -----------------------------------------------------------------------------------------------


class Block(nn.Module):
    """An activation as a model has it, with all that `speed_up` looks at."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.act = activation
        self.config = type("Config", (), {"_attn_implementation": "eager"})


REPLACED = ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_python", "silu", "swish", "gelu_fast")


@pytest.mark.parametrize("name", REPLACED)
def test_activations_are_transformers_own(name: str) -> None:
    block = Block(ACT2FN[name])
    speed_up(block)
    assert "forward" in vars(block.act)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        x = (3 * draw(40, 30, seed=1)).to(dtype).requires_grad_()
        weights = draw(40, 30, seed=2, dtype=dtype)
        ours, theirs = block.act(x), type(block.act).forward(block.act, x)
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
        gradients = (torch.autograd.grad(y, x, weights)[0] for y in (ours, theirs))
        torch.testing.assert_close(*gradients, rtol=tolerance, atol=4 * tolerance)
        y, kept = kept_by(lambda x=x: block.act(x))
        assert [t.data_ptr() for t in kept] == [x.data_ptr()] and y.recipe.inputs[0].data_ptr() == x.data_ptr()
    with torch.no_grad():
        assert torch.equal(block.act(x), type(block.act).forward(block.act, x))


@pytest.mark.parametrize("name", ["relu", "gelu_10", "quick_gelu", "tanh", "mish", "relu2", "prelu"])
def test_others_stay(name: str) -> None:
    block = Block(ACT2FN[name])
    speed_up(block)
    assert "forward" not in vars(block.act)


# -- whole models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "most"), [("llama", 0.8), ("gpt2", 0.72), ("bart", 0.8), ("bert", 0.8)])
def test_a_model_keeps_less(kind: str, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Than it would if no layer read recipes: found 0.78, 0.69, 0.76, 0.76."""
    ids = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if kind == "bart" else {})

    def size() -> int:
        base = tiny_model(kind, 64)
        model = attach(BertForSequenceClassification(base.config) if kind == "bert" else base, lora_rank=2).train()
        _, kept = kept_by(lambda: model(**inputs))
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        return sum(t.untyped_storage().nbytes() for t in kept if t.untyped_storage().data_ptr() not in weights)

    with_recipes = size()
    monkeypatch.setattr("trivet.adapter.fast.kept_for", lambda x, rows: (None, (rows,)))
    assert with_recipes <= most * size()
