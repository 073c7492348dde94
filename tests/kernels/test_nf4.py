"""Weights in 4 bits: the published values, the nearest of them for every entry, and what comes back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trivet.kernels import nf4

#: Appendix E of arXiv 2305.14314.
PUBLISHED = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype) * 0.05


def test_the_values_are_the_published_ones() -> None:
    torch.testing.assert_close(nf4.values(), torch.tensor(PUBLISHED), rtol=0, atol=2e-7)


@given(rows=st.integers(1, 9), columns=st.integers(1, 70), scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e20]))
def test_every_entry_gets_the_nearest_value(rows: int, columns: int, scale: float) -> None:
    w = draw(rows, columns) * scale
    codes, scales = nf4.quantise(w)
    found = nf4.dequantise(codes, scales, w.shape, torch.float32)
    assert found.shape == w.shape
    each = scales.float().repeat_interleave(nf4.BLOCK)[: w.numel()]
    choices = nf4.values()[None, :] * each[:, None]
    nearest = (choices - w.reshape(-1, 1)).abs().min(dim=1).values
    torch.testing.assert_close((found - w).flatten().abs(), nearest, rtol=1e-4, atol=1e-5 * float(w.abs().max()))


def test_a_scale_is_the_largest_magnitude_of_its_64() -> None:
    w = draw(3, 64)
    assert torch.equal(nf4.quantise(w)[1], w.abs().amax(dim=1).bfloat16())


def test_what_is_in_4_bits_already_comes_back_to_the_bit() -> None:
    once = nf4.dequantise(*nf4.quantise(draw(50, 37)), (50, 37), torch.float32)
    assert torch.equal(nf4.dequantise(*nf4.quantise(once), (50, 37), torch.float32), once)
    assert torch.equal(nf4.dequantise(*nf4.quantise(torch.zeros(4, 16)), (4, 16), torch.float32), torch.zeros(4, 16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_the_exact_weight_rounded_once(dtype: torch.dtype) -> None:
    packed = nf4.quantise(draw(1500, 1600, dtype=dtype))  # several parts
    exact = nf4.dequantise(*packed, (1500, 1600), torch.float32)
    assert torch.equal(nf4.dequantise(*packed, (1500, 1600), dtype), exact.to(dtype))


def test_a_weight_that_is_not_finite_stays_so() -> None:
    w = draw(2, 64)
    w[0, 3] = torch.nan
    found = nf4.dequantise(*nf4.quantise(w), w.shape, torch.float32)
    assert found[0].isnan().all() and found[1].isfinite().all()


def test_it_takes_four_and_a_quarter_bits_a_weight() -> None:
    codes, scales = nf4.quantise(draw(128, 64))
    assert codes.numel() * 8 + scales.numel() * 16 == 4.25 * 128 * 64
    for real, meta in zip((codes, scales), nf4.quantise(draw(128, 64).to("meta")), strict=True):
        assert meta.is_meta and (meta.shape, meta.dtype) == (real.shape, real.dtype)
