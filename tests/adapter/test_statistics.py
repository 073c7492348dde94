"""`LayerStatistics` against exact decompositions of the matrices that were sketched."""

from __future__ import annotations

import pytest
import torch

from trivet.adapter.statistics import LayerStatistics
from trivet.errors import TrivetError


def measured(x: torch.Tensor, g: torch.Tensor, k: int, seed: int = 0) -> LayerStatistics:
    """By definition, from inputs (tokens, in) and gradients (tokens, out) of a mean over those tokens."""
    generator = torch.Generator().manual_seed(seed)
    omega = torch.randn(x.shape[1], k, generator=generator, dtype=x.dtype)
    psi = torch.randn(g.shape[1], k, generator=generator, dtype=x.dtype)
    gradient, n = g.T @ x, len(x)
    fields = (
        x.square().mean(0), n * g.square().sum(0), x.mean(0),
        x.T @ (x @ omega) / n, gradient @ omega, gradient.T @ psi, omega, psi,
    )  # fmt: skip
    return LayerStatistics(*(f.float() for f in fields))


def tokens(rank: int, n: int = 60, inner: int = 24, out: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    """x and g of very unequal scales, whose G = gᵀ x has the given rank."""
    generator = torch.Generator().manual_seed(rank)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    latent = torch.linalg.qr(draw(n, n))[0]
    x = latent[:, :inner] @ draw(inner, inner) * torch.logspace(-2, 1, inner, dtype=torch.float64)
    u = torch.linalg.qr(torch.linalg.lstsq(x.T, draw(inner, rank)).solution)[0]  # so that uᵀ x has full rank
    return x, u @ draw(rank, out) * torch.logspace(-4, -2, out, dtype=torch.float64)


def whiten(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    scale = (len(x) * g.square().sum(0)).sqrt()
    return (g.T @ x) / scale[:, None] / x.square().mean(0).sqrt()


@pytest.mark.parametrize("whitened", [True, False])
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_the_gradient_is_exact_where_its_rank_is_at_most_the_sketch(rank: int, whitened: bool) -> None:
    x, g = tokens(rank)
    exact = whiten(x, g) if whitened else g.T @ x
    u, sigma, v = (t.double() for t in measured(x, g, k=8).gradient(rank, whitened))
    assert u.shape == (30, rank) and sigma.shape == (rank,) and v.shape == (24, rank)
    torch.testing.assert_close(u @ sigma.diag() @ v.T, exact, rtol=0, atol=2e-3 * float(exact.abs().max()))
    torch.testing.assert_close(sigma, torch.linalg.svdvals(exact)[:rank], rtol=2e-3, atol=0)


@pytest.mark.parametrize("whitened", [True, False])
def test_the_largest_directions_of_a_decaying_gradient(whitened: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    g, x = torch.randn(400, 80, generator=generator), torch.randn(400, 120, generator=generator)
    common = torch.randn(400, 40, generator=generator) * 0.75 ** torch.arange(40)  # directions of falling strength
    x = x * 0.02 + common @ torch.randn(40, 120, generator=generator)
    g = g * 0.02 + common @ torch.randn(40, 80, generator=generator)
    x, g = x.double(), 1e-5 * g.double()
    exact = whiten(x, g) if whitened else g.T @ x
    u0, sigma0, v0t = torch.linalg.svd(exact, full_matrices=False)
    u, sigma, v = (t.double() for t in measured(x, g, k=32).gradient(4, whitened))
    torch.testing.assert_close(sigma, sigma0[:4], rtol=0.02, atol=0)
    for found, true in ((u, u0[:, :2]), (v, v0t[:2].T)):
        torch.testing.assert_close(found.T @ found, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-5)
        assert torch.linalg.svdvals(true.T @ found).min() > 0.99  # cosines of the angles between the subspaces
    assert min(torch.linalg.norm(u.T @ exact), torch.linalg.norm(exact @ v)) > 0.99 * torch.linalg.norm(sigma0[:4])
    assert (u * (exact @ v)).sum(0).min() > 0  # U and V belong together, with one sign


def test_fewer_columns_than_asked_for() -> None:
    x, g = tokens(3)
    assert measured(x, g, k=8).gradient(6)[1].shape == (3,)
    x, g = tokens(20)
    assert measured(x, g, k=8).gradient(12)[1].shape == (8,)
    assert measured(x, g, k=8).input_components(12).shape == (24, 8)
    u, sigma, v = measured(x, torch.zeros_like(g), k=8).gradient(4)
    assert u.shape == (30, 0) and sigma.shape == (0,) and v.shape == (24, 0)


def test_dead_inputs_and_outputs_have_no_part_in_the_whitened_gradient() -> None:
    x, g = tokens(4)
    x[:, 5], g[:, 7] = 0, 0
    u, sigma, v = measured(x, g, k=8).gradient(4)
    assert all(t.isfinite().all() for t in (u, sigma, v)) and len(sigma)
    assert float(v[5].abs().max()) == 0 and float(u[7].abs().max()) == 0
    alive = [i for i in range(24) if i != 5], [i for i in range(30) if i != 7]
    smaller = whiten(x[:, alive[0]], g[:, alive[1]])
    torch.testing.assert_close(sigma.double(), torch.linalg.svdvals(smaller)[: len(sigma)], rtol=2e-3, atol=0)


def test_scales_are_roots_of_the_moments_and_never_zero() -> None:
    x, g = tokens(4)
    x[:, 0] = 0
    outputs, inputs = measured(x, g, k=0).scales()
    torch.testing.assert_close(inputs[1:].double(), x.square().mean(0).sqrt()[1:])
    torch.testing.assert_close(outputs.double(), (60 * g.square().sum(0)).sqrt())
    assert 0 < float(inputs[0]) < 1e-2 * float(inputs[1:].mean())
    assert all(float(s.min()) > 0 for s in measured(0 * x, 0 * g, k=0).scales())


@pytest.mark.parametrize("shift", [0.0, 10.0])
def test_input_components_are_exact_where_the_covariance_has_small_rank(shift: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 6, generator=generator, dtype=torch.float64) * torch.tensor([6.0, 5, 4, 3, 2, 1])
    basis = torch.linalg.qr(torch.randn(40, 6, generator=generator, dtype=torch.float64))[0]
    x = x @ basis.T + shift * torch.randn(40, generator=generator, dtype=torch.float64)
    v = measured(x, x, k=12).input_components(6).double()
    exact = torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:6].T
    torch.testing.assert_close((exact.T @ v).abs(), torch.eye(6, dtype=torch.float64), rtol=0, atol=2e-3)


def test_input_components_explain_nearly_as_much_as_the_best() -> None:
    generator = torch.Generator().manual_seed(0)
    scales = 0.9 ** torch.arange(100, dtype=torch.float64)
    x = torch.randn(1000, 100, generator=generator, dtype=torch.float64) * scales + 3
    v = measured(x, x, k=32).input_components(8).double()
    torch.testing.assert_close(v.T @ v, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-5)
    covariance = torch.cov(x.T, correction=0)
    variances = torch.diag(v.T @ covariance @ v)
    assert variances.sum() > 0.95 * torch.linalg.eigvalsh(covariance)[-8:].sum()
    assert (variances[:-1] > 0.8 * variances[1:]).all()  # largest first, up to the sketch's error


def test_constant_inputs_have_no_components() -> None:
    x = torch.ones(50, 20, dtype=torch.float64) * torch.arange(1, 21)
    assert measured(x, x, k=8).input_components(4).shape == (20, 0)


def test_directions_need_a_sketch() -> None:
    statistics = measured(*tokens(4), k=0)
    for ask in (statistics.gradient, statistics.input_components):
        with pytest.raises(TrivetError, match="measure with a sketch"):
            ask(4)
