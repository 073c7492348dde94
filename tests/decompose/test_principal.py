"""`principal` against PEFT's PiSSA, and the singular vectors that it and `core` take."""

from __future__ import annotations

import math

import pytest
import torch
from started import adapted, begin, fit, logits, same_span

from trivet.adapter.layers import adapted_layers
from trivet.decompose.bases import truncated_svd


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_it_is_pefts_pissa_without_moving_the_base(kind: str) -> None:
    theirs = adapted(kind, init_lora_weights="pissa")
    model = adapted(kind)
    weights = [layer.weight.clone() for layer in adapted_layers(model)]
    for layer, other, w in zip(begin("principal", model), adapted_layers(theirs), weights, strict=True):
        assert layer.name == other.name and layer.form == "offset"
        assert torch.equal(layer.weight, w)
        assert same_span(layer.A, other.A) > 1 - 1e-6
        assert same_span(layer.B.T, other.B.T) > 1 - 1e-6
        torch.testing.assert_close(layer.scale * layer.B @ layer.A, other.delta(), rtol=0, atol=1e-5)
        a, b = layer.factors()
        assert (a.shape[0], b.shape[1]) == (8, 8)


def test_it_trains_as_pissa_does() -> None:
    """The offset form is the same function with the same gradients, so the same path."""
    theirs, mine = adapted("llama", init_lora_weights="pissa"), adapted("llama")
    begin("principal", mine)
    for layer, other in zip(adapted_layers(mine), adapted_layers(theirs), strict=True):  # the same signs
        flip = (layer.A.detach() * other.A.detach()).sum(1).sign()
        with torch.no_grad():
            other.A.mul_(flip[:, None])
            other.B.mul_(flip)
    assert fit(mine, 10, 1e-3) == pytest.approx(fit(theirs, 10, 1e-3), abs=1e-4)
    torch.testing.assert_close(logits(mine), logits(theirs), rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", [(300, 420), (420, 300)])
def test_random_range_finder_against_the_exact_svd(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(shape[0], 300, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(shape[1], 300, generator=generator)).Q
    sigma = 10 / torch.arange(1, 301) ** 0.7
    w = u * sigma @ v.T
    got_u, got_sigma, got_v = truncated_svd(w, 6, generator)
    torch.testing.assert_close(got_sigma, sigma[:6], rtol=1e-3, atol=0)
    assert same_span(got_u.T, u[:, :6].T) > 0.999
    assert same_span(got_v.T, v[:, :6].T) > 0.999
    torch.testing.assert_close(got_u.T @ got_u, torch.eye(6), rtol=0, atol=1e-5)
    best = (w - u[:, :6] * sigma[:6] @ v[:, :6].T).norm()
    assert (w - got_u * got_sigma @ got_v.T).norm() < best * 1.001


def test_a_layer_of_zeros_can_still_learn() -> None:
    model = adapted("llama")
    adapted_layers(model)[0].module.get_base_layer().weight.data.zero_()
    layer = begin("principal", model)[0]
    fit(model, 5, 1e-2)
    assert layer.delta().norm() > 1e-6 * math.prod(layer.shape)
