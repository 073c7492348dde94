"""Rotary positions on CPUs: transformers' own function, in several types and layouts."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from trivet.kernels.rotation import rotate

pytestmark = pytest.mark.usefixtures("without_a_compiler")  # test_native.py has the C kernels


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def angles(batch: int, length: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    half = 3 * draw(batch, length, width // 2, seed=3)
    both = half.repeat(1, 1, 2)
    return both.cos().to(dtype), both.sin().to(dtype)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 0.03)]
)
@pytest.mark.parametrize("by_place", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("heads", "width"), [((4, 2), 8), ((3, 3), 2)])
def test_outputs_and_gradients(
    heads: tuple[int, int], width: int, shared: bool, by_place: bool, dtype: torch.dtype, tolerance: float
) -> None:
    """`by_place`: heads side by side at each place, as a projection gives them."""
    length = 5
    cos, sin = angles(1 if shared else 2, length, width, dtype)
    pair = []
    for seed, count in enumerate(heads):
        x = draw(2, length, count, width, seed=seed, dtype=dtype).transpose(1, 2)
        pair.append((x if by_place else x.contiguous()).detach().requires_grad_())
    weights = [draw(*x.shape, seed=9, dtype=dtype) for x in pair]
    ours, theirs = rotate(*pair, cos, sin), apply_rotary_pos_emb(*pair, cos, sin)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == dtype and one.is_contiguous()
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    found, wanted = (torch.autograd.grad(y, pair, weights) for y in (ours, theirs))
    for one, other in zip(found, wanted, strict=True):
        assert one.transpose(1, 2).is_contiguous()  # as the projection's backward pass reads it
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_the_error_of_16_bits_is_no_larger_than_transformers() -> None:
    cos, sin = angles(1, 40, 64, torch.float64)
    q = draw(2, 4, 40, 64, seed=1, dtype=torch.bfloat16)
    given = q, q, cos.bfloat16(), sin.bfloat16()
    exact = apply_rotary_pos_emb(*(t.double() for t in given))[0]
    ours, theirs = (float((f(*given)[0].double() - exact).norm()) for f in (rotate, apply_rotary_pos_emb))
    assert 0 < ours <= theirs


def test_only_angles_are_kept() -> None:
    q, (cos, sin) = draw(1, 2, 5, 8, seed=1).requires_grad_(), angles(1, 5, 8, torch.float32)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        rotate(q, q, cos, sin)
    assert set(kept) == {cos.data_ptr(), sin.data_ptr()}
