"""The dropout of trivet.kernels against its definition."""

from __future__ import annotations

import pytest
import torch

from trivet.kernels.dropout import dropout, keep, zero


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_it_drops_its_share_and_scales_the_rest(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x = torch.randn(301, 333).to(dtype)
    y = dropout(x, p)
    dropped = y == 0
    assert y.dtype == dtype and y.shape == x.shape
    assert dropped.double().mean().item() == pytest.approx(p, abs=5 * (p * (1 - p) / x.numel()) ** 0.5)
    torch.testing.assert_close(y[~dropped], (x / (1 - p))[~dropped])


def test_choices_are_independent() -> None:
    """Of entries that share a random number, of neighbours, rows and columns: correlations are those of chance."""
    kept = keep((4096, 64), 0.25, torch.Generator().manual_seed(3)).neg().double() - 0.75
    chance = 5 * 0.25 * 0.75 / kept.numel() ** 0.5
    for lag in (1, 2, 3, 4, 5, 64):
        flat = kept.flatten()
        assert abs((flat[lag:] * flat[:-lag]).mean().item()) < chance, lag
    for place in range(4):  # each of a number's four parts drops the share
        part = kept.flatten()[place::4]
        assert abs(part.mean().item()) < 5 * (0.25 * 0.75 / len(part)) ** 0.5, place


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 7])
def test_any_number_of_entries(count: int) -> None:
    assert keep((count,), 0.5).shape == (count,)
    assert dropout(torch.ones(count), 0.5).shape == (count,)


def test_next_to_nothing_and_next_to_all() -> None:
    assert (keep((10_000,), 1e-9) == -1).all()  # to the nearest multiple of 2⁻¹⁶
    assert not keep((10_000,), 1 - 1e-9).neg().float().mean() > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_zero_keeps_every_bit_of_what_stays(dtype: torch.dtype) -> None:
    x = torch.randn(301, 64).T.to(dtype)  # not contiguous
    x[0, 0], x[0, 1], x[0, 2] = torch.nan, torch.inf, -0.0
    kept = keep(x.shape, 0.3)
    assert set(kept.unique().tolist()) == {-1, 0}
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    assert torch.equal(zero(x, kept).view(bits), torch.where(kept == -1, x, 0).view(bits))


def test_the_gradient_goes_where_the_entries_stayed() -> None:
    x = torch.randn(17, 5, dtype=torch.float64, requires_grad=True)
    y = dropout(x, 0.4)
    (grad,) = torch.autograd.grad(y, x, torch.full_like(y, 3.0))
    torch.testing.assert_close(grad, torch.where(y == 0, 0.0, 3.0 / 0.6).to(grad))


def test_it_follows_torchs_seed() -> None:
    def drawn(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return dropout(torch.ones(50), 0.5)

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))
