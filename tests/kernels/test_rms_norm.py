"""The norm with a gradient of its own: Llama's module under autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from trivet.kernels.norm import rms_norm

pytestmark = pytest.mark.usefixtures("without_a_compiler")  # test_native.py has the C kernels


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def module(width: int, eps: float, dtype: torch.dtype = torch.float32) -> LlamaRMSNorm:
    """Llama's norm with a frozen random weight."""
    norm = LlamaRMSNorm(width, eps).to(dtype)
    norm.weight.data.copy_(1 + draw(width, seed=2) / 2)
    return norm.requires_grad_(False)


def written_out(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def with_gradient(y: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
    return [y.detach(), torch.autograd.grad(y, x, draw(*x.shape, seed=3, dtype=x.dtype))[0]]


@pytest.mark.parametrize("eps", [1e-6, 0.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 64), (2, 4, 3, 16), (0, 7)])
def test_output_and_gradient(shape: tuple[int, ...], dtype: torch.dtype, eps: float) -> None:
    x, norm = draw(*shape, seed=1, dtype=dtype).requires_grad_(), module(shape[-1], eps, dtype)
    found = with_gradient(rms_norm(x, norm.weight, eps), x)
    for wanted in (with_gradient(norm(x), x), with_gradient(written_out(x, norm.weight, eps), x)):
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours.dtype == theirs.dtype == dtype
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # computed in float32, as Llama's is


def test_the_gradient_is_that_of_finite_differences() -> None:
    x, weight = draw(3, 5, seed=1, dtype=torch.float64).requires_grad_(), draw(5, seed=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, weight, 0.1), x)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 5),
    width=st.integers(1, 40),
    eps=st.sampled_from([1e-12, 1e-5, 1.0]),
    size=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_any_shape_and_size(rows: int, width: int, eps: float, size: float) -> None:
    x, norm = (size * draw(rows, width, seed=1)).requires_grad_(), module(width, eps)
    wide = x.detach().double().requires_grad_()
    wanted = with_gradient(written_out(wide, norm.weight.double(), eps), wide)
    for ours, w in zip(with_gradient(rms_norm(x, norm.weight, eps), x), wanted, strict=True):
        torch.testing.assert_close(ours.double(), w, rtol=1e-4, atol=1e-5 * max(1.0, 1 / size))


def test_views_that_are_not_contiguous() -> None:
    """As norms of queries get them: heads and positions swapped."""
    x, norm = draw(2, 5, 3, 8, seed=1).transpose(1, 2).requires_grad_(), module(8, 1e-6)
    for ours, theirs in zip(with_gradient(rms_norm(x, norm.weight, 1e-6), x), with_gradient(norm(x), x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_row_of_zeros_is_finite() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    y, gradient = with_gradient(rms_norm(x, torch.ones(8), 1e-6), x)
    assert not y.any() and bool(gradient.isfinite().all())


def test_only_the_input_and_a_number_a_row_are_kept() -> None:
    x, weight = draw(6, 8, seed=1).bfloat16().requires_grad_(), torch.ones(8).bfloat16()
    saved = rms_norm(x, weight, 1e-6).grad_fn.saved_tensors
    assert [(t.shape, t.dtype) for t in saved] == [
        ((6, 8), torch.bfloat16), ((8,), torch.bfloat16), ((6, 1), torch.float32),
    ]  # fmt: skip


def test_the_error_of_16_bits_is_no_larger_than_the_modules() -> None:
    norm = module(256, 1e-6, torch.bfloat16)
    x = draw(100, 256, seed=1).bfloat16().requires_grad_()
    wide = x.detach().double().requires_grad_()
    wanted = with_gradient(written_out(wide, norm.weight.double(), 1e-6), wide)
    for ours, theirs, w in zip(
        with_gradient(rms_norm(x, norm.weight, 1e-6), x), with_gradient(norm(x), x), wanted, strict=True
    ):
        assert ours.dtype == torch.bfloat16
        assert float((ours.double() - w).norm()) <= float((theirs.double() - w).norm())
