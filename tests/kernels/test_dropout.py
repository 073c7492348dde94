"""The dropout of trivet.kernels against its definition."""

from __future__ import annotations

import pytest
import torch

from trivet.kernels import compiled
from trivet.kernels.dropout import _Hashed, dropout, dropped, keep, zero


@pytest.fixture(params=["in C", "drawn"])
def way(request: pytest.FixtureRequest) -> str:
    """How it is decided what is dropped."""
    if request.param == "drawn":
        request.getfixturevalue("without_a_compiler")
    elif compiled.missing():
        pytest.skip(compiled.missing())
    return request.param


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_it_drops_its_share_and_scales_the_rest(p: float, dtype: torch.dtype, way: str) -> None:
    torch.manual_seed(1)
    x = torch.randn(301, 333).to(dtype)
    y = dropout(x, p)
    dropped = y == 0
    assert y.dtype == dtype and y.shape == x.shape
    assert dropped.double().mean().item() == pytest.approx(p, abs=5 * (p * (1 - p) / x.numel()) ** 0.5)
    torch.testing.assert_close(y[~dropped], (x / (1 - p))[~dropped])
    assert (type(dropout(x.requires_grad_(), p).grad_fn).__name__ == "_HashedBackward") == (
        way == "in C" and dtype != torch.float64
    )


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


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 7, 1025])
def test_any_number_of_entries(count: int, way: str) -> None:
    assert keep((count,), 0.5).shape == (count,)
    assert dropout(torch.ones(count), 0.5).shape == (count,)


@pytest.mark.skipif(compiled.missing() is not None, reason="no C compiler is on this machine")
def test_hashes_are_independent() -> None:
    """Of neighbours, of entries a piece apart, and of one seed and the next."""
    x = torch.ones(2**18)
    kept = [_Hashed.apply(x, 0.25, seed).sign().double() - 0.75 for seed in (0, 1, 2**32, 2**61)]
    chance = 5 * 0.25 * 0.75 / x.numel() ** 0.5
    for lag in (1, 2, 3, 16, 64, 1024, 4096):
        assert abs((kept[0][lag:] * kept[0][:-lag]).mean().item()) < chance, lag
    for other in kept[1:]:
        assert abs((kept[0] * other).mean().item()) < chance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_what_is_dropped_for_a_seed_is_dropped_again(dtype: torch.dtype, way: str) -> None:
    x = torch.randn(40, 60).to(dtype)
    y = dropped(x, 0.3, 11)
    assert torch.equal(y, dropped(x, 0.3, 11)) and torch.equal(y[y != 0], x[y != 0])
    assert 0.25 < (y == 0).double().mean() < 0.35 and not torch.equal(y, dropped(x, 0.3, 12))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_goes_where_the_entries_stayed(way: str, dtype: torch.dtype) -> None:
    x = torch.randn(5, 17, dtype=dtype).T.requires_grad_()  # not contiguous
    y = dropout(x, 0.4)
    (grad,) = torch.autograd.grad(y, x, torch.full_like(y, 3.0))
    torch.testing.assert_close(grad, torch.where(y == 0, 0.0, 3.0 / 0.6).to(grad))


def test_it_follows_torchs_seed(way: str) -> None:
    def drawn(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return dropout(torch.ones(50), 0.5)

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))
