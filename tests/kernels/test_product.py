"""Products of 16-bit tensors in float32: float64's result, rounded to the type once. Those of few rows, turned."""

from __future__ import annotations

import copy
import platform
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from test_fast_model import base, data, gradients, task
from trivet import attach
from trivet.adapter.fast import FastLinear
from trivet.adapter.layers import adapted_layers
from trivet.fast import speed_up
from trivet.kernels import product
from trivet.kernels.product import addmm_, few_sizes, improves, linear, mm, multiplies, turns, widens
from trivet.loss import training_loss

HALVES = [torch.bfloat16, torch.float16]


@given(number=st.integers(0, 5000))
def test_few_sizes(number: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(product, "multiplies", lambda dtype: dtype == torch.bfloat16)
        found = few_sizes(number, like=torch.empty(0, dtype=torch.bfloat16))
        assert number <= found <= number + number // 16 and few_sizes(found, like=torch.empty(0).bfloat16()) == found
        for like in (torch.empty(0), torch.empty(0).half(), torch.empty(0, dtype=torch.bfloat16, device="meta")):
            assert few_sizes(number, like=like) == number
        if number & (number - 1) == 0:
            sizes = {few_sizes(n, like=torch.empty(0).bfloat16()) for n in range(number, 2 * number)}
            assert len(sizes) <= 17


@pytest.fixture
def unable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that multiplies no 16-bit type, whichever this one is."""
    monkeypatch.setattr(product, "multiplies", lambda dtype: dtype not in HALVES)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")


class Turned(TorchDispatchMode):
    """The number of products whose right side is a few rows, transposed."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ == "mm":
            self.count += args[1].stride(0) == 1 and args[1].shape[1] < args[0].shape[0]
        return func(*args, **(kwargs or {}))


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(found: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    """As near as the type allows: half of its last digit, and float32's rounding of the sum."""
    assert found.dtype == dtype and found.shape == exact.shape
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps / 2 * 1.001, atol=2e-4)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("part", [7, 50, 2**20])
@given(n=st.integers(0, 20), k=st.integers(1, 20), m=st.integers(1, 20), by_column=st.booleans(), biased=st.booleans())
def test_mm(part: int, dtype: torch.dtype, n: int, k: int, m: int, by_column: bool, biased: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(product, "widens", lambda x: x.dtype in HALVES)
        patch.setattr(product, "_PART", part)
        a, bias = draw(n, k, seed=1, dtype=dtype), draw(m, seed=3, dtype=dtype) if biased else None
        b = draw(m, k, seed=2, dtype=dtype).T if by_column else draw(k, m, seed=2, dtype=dtype)
        exact = a.double() @ b.double()
        found = mm(a, b, bias)
        wide = n >= product._FEW or b.stride(0) != 1
        if wide:
            check(found, exact if bias is None else exact + bias.double(), dtype)
        else:
            assert torch.equal(found, a @ b if bias is None else torch.addmm(bias, a, b))
        place = torch.full((n, m), 9.0, dtype=dtype)
        assert mm(a, b, bias, out=place) is place and torch.equal(place, found)
        y = draw(n, m, seed=4, dtype=dtype)
        check(addmm_(y.clone(), a, b), y.double() + exact, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_types_are_torchs_own(unable: None, dtype: torch.dtype) -> None:
    a, b, bias = draw(9, 4, seed=1, dtype=dtype), draw(5, 4, seed=2, dtype=dtype), draw(5, seed=3, dtype=dtype)
    assert not widens(a) and torch.equal(mm(a, b.T, bias), torch.addmm(bias, a, b.T))
    assert torch.equal(mm(a, b.T), a @ b.T)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("by_column", [True, False])
@pytest.mark.parametrize("n", [1, 2, 3, 15, 16, 128, 129])
def test_few_rows_are_turned(
    unable: None, monkeypatch: pytest.MonkeyPatch, n: int, by_column: bool, dtype: Any
) -> None:
    monkeypatch.setattr(product, "turns", lambda x: x.dtype == torch.float32)
    a, bias = draw(n, 140, seed=1, dtype=dtype), draw(200, seed=3, dtype=dtype)
    b = draw(200, 140, seed=2, dtype=dtype).T if by_column else draw(140, 200, seed=2, dtype=dtype)
    with Turned() as products:
        found = [mm(a, b), mm(a, b, bias), mm(a, b, bias, out=torch.empty(n, 200, dtype=dtype))]
    own = dtype in HALVES and by_column and n < product._FEW
    assert products.count == (3 if (2 if by_column else 16) <= n <= 128 and not own else 0)
    for each, plus in zip(found, (0, bias.double(), bias.double()), strict=True):
        assert each.is_contiguous() and each.dtype == dtype
        error = torch.finfo(dtype).eps * (1 if own else 0.51)
        torch.testing.assert_close(
            each.double(), a.double() @ b.double() + plus, rtol=error, atol=2e-4 if not own else 0.1
        )


@pytest.mark.parametrize("shape", [(8, 140, 64), (8, 64, 140)])
def test_a_narrow_product_is_not_turned(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int]) -> None:
    """An adapter's factors: that was measured to be slower."""
    monkeypatch.setattr(product, "turns", lambda x: x.dtype == torch.float32)
    n, k, m = shape
    a, b = draw(n, k, seed=1, dtype=torch.float32), draw(m, k, seed=2, dtype=torch.float32).T
    with Turned() as products:
        assert torch.equal(mm(a, b), a @ b)
        mm(draw(k, n, seed=1, dtype=torch.float32).T, b)  # nor one of a transpose, of which a gradient of A is made
    assert products.count == 0


def test_where_it_is_not_known_nothing_is_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = draw(8, 140, seed=1, dtype=torch.float32), draw(140, 140, seed=2, dtype=torch.float32)
    for capability in ("AVX2", "AVX512", "DEFAULT"):
        able = capability == "AVX2" and torch.backends.mkl.is_available()
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert turns(a) == able == improves(a)
        assert not improves(a.double()) and not improves(a.to("meta"))
        with Turned() as products:
            mm(a, b.T)
        assert products.count == able


def test_what_the_processor_can(monkeypatch: pytest.MonkeyPatch) -> None:
    for able, expected in (
        ({"amx_bf16": True}, [True, False]),
        ({"avx512_fp16": True}, [False, True]),
        ({}, [False] * 2),
    ):
        multiplies.cache_clear()
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able)
        assert [multiplies(dtype) for dtype in HALVES] == expected and multiplies(torch.float32)
    multiplies.cache_clear()


def test_where_nothing_was_measured_nothing_is_widened(unable: None, monkeypatch: pytest.MonkeyPatch) -> None:
    x = draw(2, 2, seed=1)
    assert widens(x) and not widens(x.float()) and not widens(x.to("meta"))
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert not widens(x)


@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 12), (12,), (0, 12)])
def test_a_frozen_layer_and_its_gradient(unable: None, shape: tuple[int, ...]) -> None:
    weight, bias = draw(10, 12, seed=1), draw(10, seed=2)
    x = draw(*shape, seed=3).requires_grad_()
    y = linear(x, weight, bias)
    exact = x.detach().double() @ weight.double().T + bias.double()
    torch.testing.assert_close(y.detach().double(), exact, rtol=2**-7, atol=2e-2)
    g = draw(*y.shape, seed=4)
    linear(x, weight, bias).mul_(2)  # some layers add to a result in place
    check(torch.autograd.grad(y, x, g)[0], g.double() @ weight.double(), torch.bfloat16)


# -- whole models ------------------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """The number of 16-bit matrix products of more than a few rows that torch is asked for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = func.overloadpacket.__name__
        if named in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"):
            tensors = [a for a in args if isinstance(a, torch.Tensor)]
            self.count += tensors[-1].dtype in HALVES and tensors[-2].shape[-2] >= product._FEW
        return func(*args, **(kwargs or {}))


def step(kind: str, dtype: torch.dtype, cast: bool = False) -> tuple[dict[str, torch.Tensor], int]:
    """(gradients, 16-bit products) of a step, with its forward pass under an autocast or not."""
    model = attach(base(kind).to(dtype), lora_rank=4).train()
    for index, layer in enumerate(adapted_layers(model)):
        layer.B.data.normal_(std=0.2, generator=torch.Generator().manual_seed(index))
    with Products() as products:
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            loss = training_loss(model, *data(model), task=task(kind))
        found = gradients(model, loss)
    return found, products.count


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "bart", "bert"])
def test_no_16_bit_product_is_left_in_a_step(unable: None, kind: str) -> None:
    found, count = step(kind, torch.bfloat16)
    assert count == 0 == step(kind, torch.bfloat16, cast=True)[1]
    exact, _ = step(kind, torch.float32)
    assert found.keys() == exact.keys()
    error = sum(float((found[n].float() - exact[n]).square().sum()) for n in exact)
    assert error <= 0.03**2 * sum(float(g.square().sum()) for g in exact.values())


def test_products_are_counted() -> None:
    """Without the widening there are many, else the test above could not fail."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(product, "multiplies", lambda dtype: True)
        patch.setattr(product.tile_product, "works", lambda x: False)  # those are not torch's
        assert step("llama", torch.bfloat16)[1] > 50


@pytest.mark.parametrize("conv", [False, True], ids=["Linear", "Conv1D"])
def test_layers_of_a_model(unable: None, conv: bool) -> None:
    """Frozen 16-bit ones are replaced, a copy that learns has torch's own pass, and adapters keep theirs."""
    layer = (Conv1D(10, 12) if conv else nn.Linear(12, 10)).bfloat16().requires_grad_(False)
    nn.init.normal_(layer.bias)
    model = nn.Sequential(layer, nn.Linear(10, 4).bfloat16())
    model.config = type("Config", (), {"_attn_implementation": "eager"})()
    speed_up(model)
    assert "forward" in vars(layer) and "forward" not in vars(model[1])
    x = draw(9, 12, seed=1).requires_grad_()
    y = layer(x)
    assert y.grad_fn.name() == "_LinearBackward"
    exact = x.double() @ (layer.weight.double() if conv else layer.weight.double().T) + layer.bias.double()
    torch.testing.assert_close(y.double(), exact, rtol=2**-7, atol=2e-2)
    twin = copy.deepcopy(layer).requires_grad_(True)
    twin(x).sum().backward()
    assert twin.weight.grad is not None and layer.weight.grad is None
    assert layer(x.float().bfloat16().detach()).dtype == torch.bfloat16


def test_an_adapter_over_a_replaced_layer_stays_fused(unable: None) -> None:
    model = attach(base("llama").bfloat16(), lora_rank=4).train()
    layers = [module for module in model.modules() if isinstance(module, FastLinear)]
    x = draw(9, 32, seed=1).requires_grad_()
    assert layers and "forward" in vars(layers[0].get_base_layer())
    assert layers[0](x).grad_fn.name() == "_AdaptedLinearBackward"
    with model.disable_adapter():
        assert layers[0](x).grad_fn.name() == "_LinearBackward"
