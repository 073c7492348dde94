"""An adapted gated feed-forward layer as one function: float64's numbers, and those of its parts one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP

import trivet.adapter.fast as fast_adapter
from trivet.adapter.fast import make_fast
from trivet.fast import speed_up
from trivet.kernels import compiled, low_rank
from trivet.kernels.heap import empty

pytestmark = pytest.mark.skipif(
    not compiled.multiplies_tiles(), reason="this processor has no AMX, or no C compiler is here"
)
WIDTH, MIDDLE = 64, 160
PARTS = ("gate_proj", "up_proj", "down_proj")


class Block(nn.Module):
    """transformers' feed-forward layer, as a model that `speed_up` takes."""

    def __init__(self, dtype: torch.dtype, bias: bool) -> None:
        super().__init__()
        self.config = LlamaConfig(hidden_size=WIDTH, intermediate_size=MIDDLE, mlp_bias=bias)
        self.config._attn_implementation = "eager"
        torch.manual_seed(0)
        self.mlp = LlamaMLP(self.config).to(dtype).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x)


def block(dtype: torch.dtype = torch.bfloat16, bias: bool = False, **settings: Any) -> Any:
    model: Any = Block(dtype, bias)
    inject_adapter_in_model(LoraConfig(r=9, target_modules=list(PARTS), **settings), model)
    for number, (name, part) in enumerate(model.named_modules()):
        if name.endswith(".default") and isinstance(part, nn.Linear):
            shape, generator = part.weight.shape, torch.Generator().manual_seed(number)
            part.weight = nn.Parameter(torch.randn(shape, generator=generator) / 8)  # float32
    return model


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each pass was one function."""
    found, own = [], fast_adapter.adapted_gate

    def spy(*given: Any) -> torch.Tensor | None:
        y = own(*given)
        found.append(y is not None)
        return y

    monkeypatch.setattr(fast_adapter, "adapted_gate", spy)
    return found


def fast(model: Any) -> Any:
    make_fast(model)
    speed_up(model)
    return model.train()


def inputs(rows: int = 77, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, rows, WIDTH, generator=generator).to(torch.bfloat16).to(dtype).requires_grad_()


def results(model: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    y = model(x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16).to(y.dtype)
    learn = {"x": x} | dict(model.named_parameters())
    learn = {name: each for name, each in learn.items() if each.requires_grad}
    return {"y": y.detach(), **dict(zip(learn, torch.autograd.grad(y, list(learn.values()), grad), strict=True))}


def errors(found: dict[str, torch.Tensor], bias: bool) -> dict[str, float]:
    """Of each result, against PEFT's layers and transformers' in float64, of the same 16-bit weights."""
    model = block(bias=bias)
    for part in model.modules():
        part.to(torch.float64)
    exact = results(model.train(), inputs(dtype=torch.float64))
    return {name: float((found[name].double() - exact[name]).norm() / exact[name].norm()) for name in found}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_it_is_as_exact_as_part_by_part(
    together: list[bool], monkeypatch: pytest.MonkeyPatch, threads: int, bias: bool
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = errors(results(fast(block(bias=bias)), inputs()), bias)
        assert together == [True]
        monkeypatch.setattr(fast_adapter, "adapted_gate", lambda *_: None)
        theirs = errors(results(fast(block(bias=bias)), inputs()), bias)
    finally:
        torch.set_num_threads(before)
    assert ours.keys() == theirs.keys() and len(ours) == 8
    for name, error in ours.items():
        assert error < 1e-2 and error <= 1.2 * theirs[name] + 1e-4, name


@pytest.mark.parametrize("rows", [16, 77, 128])
def test_in_blocks_numbers_are_those_of_rows(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    found = results(fast(block()), inputs(rows))
    monkeypatch.setattr(low_rank, "blocks", lambda n, k, like: empty(n, k, like=like))
    plain = results(fast(block()), inputs(rows))
    assert all(torch.equal(found[name], plain[name]) for name in plain)


@pytest.mark.parametrize("frozen", ["gate_proj.lora_A", "up_proj.lora_A", "down_proj.lora_A", "down_proj.lora_B"])
def test_what_does_not_learn_has_no_gradient(together: list[bool], frozen: str) -> None:
    whole = results(fast(block()), inputs())
    model, x = fast(block()), inputs()
    for name, factor in model.named_parameters():
        factor.requires_grad_(factor.requires_grad and frozen not in name)
    some = results(model, x)
    assert together == [True, True] and len(some) == len(whole) - 1
    assert all(torch.equal(some[name], whole[name]) for name in some)


def test_the_activation_is_not_kept(together: list[bool]) -> None:
    kept: list[torch.Tensor] = []
    model, x = fast(block()), inputs()
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
        model(x)
    assert together == [True]
    assert sum(each.numel() >= 77 * MIDDLE for each in kept) == 2  # gate and up; weights are parameters


def hook(model: Any) -> None:
    model.mlp.up_proj.register_forward_hook(lambda module, given, y: y * 2)


def off(model: Any) -> None:
    model.mlp.down_proj.enable_adapters(enabled=False)


@pytest.mark.parametrize("change", [hook, off])
def test_what_one_function_does_not_have_is_computed_part_by_part(
    together: list[bool], change: Callable[[Any], None]
) -> None:
    model, x = fast(block()), inputs()
    change(model)
    found, mlp = model(x), model.mlp
    parted = mlp.down_proj(nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    torch.testing.assert_close(found, parted, rtol=0.02, atol=0.02 * float(parted.detach().abs().max()))
    assert not any(together)


def test_short_rows_dropout_and_float32_are_computed_part_by_part(together: list[bool]) -> None:
    results(fast(block()), inputs(rows=15))
    results(fast(block(lora_dropout=0.1)), inputs())
    results(fast(block(torch.float32)), inputs(dtype=torch.float32))
    assert not any(together)
