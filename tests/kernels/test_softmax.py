"""The softmax of trivet.kernels and its gradient against torch's in float64."""

from __future__ import annotations

import pytest
import torch

from trivet.kernels.softmax import softmax, softmax_backward

#: Around the lengths at which the way of computing changes, 16 and 32.
LENGTHS = [1, 2, 13, 15, 16, 17, 31, 32, 33, 64, 100]
TYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def scores(length: int, dtype: torch.dtype) -> torch.Tensor:
    return (3 * torch.randn(5, 7, length, generator=torch.Generator().manual_seed(length))).to(dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("length", LENGTHS)
def test_rows_of_any_length(length: int, dtype: torch.dtype) -> None:
    x = scores(length, dtype)
    found = softmax(x)
    assert found.dtype == dtype and found.shape == x.shape
    rounding = torch.finfo(dtype).eps
    least = rounding * torch.finfo(dtype).smallest_normal
    torch.testing.assert_close(found.double(), torch.softmax(x.double(), -1), rtol=16 * rounding, atol=least)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("length", LENGTHS)
def test_gradient(length: int, dtype: torch.dtype) -> None:
    p, g = torch.softmax(scores(length, torch.float64), -1).to(dtype), scores(length + 1, dtype)[..., :length]
    p, g = p.contiguous(), g.contiguous()
    before = p.clone(), g.clone()
    found = softmax_backward(g, p)
    assert found.dtype == dtype and torch.equal(p, before[0]) and torch.equal(g, before[1])
    wide = p.double()
    wanted = wide * (g.double() - (wide * g.double()).sum(-1, keepdim=True))
    size = (wide * g.double().abs()).sum(-1, keepdim=True) + g.double().abs()
    least = torch.finfo(dtype).smallest_normal
    assert ((found.double() - wanted).abs() <= 4 * torch.finfo(dtype).eps * (wide * size + least)).all()


@pytest.mark.parametrize("length", [13, 20, 40])
def test_what_may_not_be_seen_gets_nothing(length: int) -> None:
    x = scores(length, torch.bfloat16)
    x[..., 1:] = -torch.inf
    x[0, ..., 1:] = torch.finfo(torch.bfloat16).min
    assert torch.equal(softmax(x)[..., 0], torch.ones(5, 7, dtype=torch.bfloat16))
    x[..., 0] = 1e38  # large scores overflow nothing
    assert softmax(x).isfinite().all()
