"""What a direction is worth: against a full SVD, and against the loss that it models."""

from __future__ import annotations

import pytest
import torch

from conftest import tiny_model
from trivet.adapter.attach import attach
from trivet.adapter.layers import AdaptedLayer, adapted_layers
from trivet.adapter.resize import resize
from trivet.adapter.statistics import LayerStatistics
from trivet.rank.score import Directions, costs, directions


def moments(layer: AdaptedLayer, seed: int = 0) -> LayerStatistics:
    """Random second moments, spread over three orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    out, inside = layer.shape
    c, s = (torch.exp(3 * torch.randn(n, generator=generator)) for n in (inside, out))
    none = torch.zeros(0)
    return LayerStatistics(c, s, torch.zeros(inside), *[none] * 5)


def trained(decompose: str = "zero", rank: int = 5) -> tuple[object, list[AdaptedLayer]]:
    model = attach(tiny_model("gpt2", 64), lora_rank=rank, method={"decompose": decompose})
    generator = torch.Generator().manual_seed(3)
    layers = adapted_layers(model)
    for layer in layers:
        for p in layer.trained():
            with torch.no_grad():
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model, layers


def whitened(layer: AdaptedLayer, known: LayerStatistics) -> torch.Tensor:
    return known.outputs.double().sqrt()[:, None] * layer.delta().double() * known.inputs.double().sqrt()


@pytest.mark.parametrize("decompose", ["zero", "core", "principal"])
def test_worths_are_half_the_squares_of_the_whitened_singular_values(decompose: str) -> None:
    _, layers = trained(decompose)
    known = {layer.name: moments(layer, i) for i, layer in enumerate(layers)}
    found = directions(layers, known)
    for layer in layers:
        size = len(found[layer.name].worth)
        sigma = torch.linalg.svdvals(whitened(layer, known[layer.name]))[:size]
        torch.testing.assert_close(found[layer.name].worth, 0.5 * sigma**2, rtol=1e-4, atol=1e-4 * float(sigma[0]) ** 2)
    plain = directions(layers, None)
    for layer in layers:
        sigma = torch.linalg.svdvals(layer.delta().double())[: len(plain[layer.name].worth)]
        torch.testing.assert_close(plain[layer.name].worth, 0.5 * sigma**2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("keep", [1, 3])
def test_dropping_costs_what_was_promised_on_a_quadratic(keep: int) -> None:
    """L(ΔW) = ½ Σ s_i c_j (ΔW − ΔW*)_ij², at its minimum: exactly the loss that the worths model."""
    model, layers = trained()
    known = {layer.name: moments(layer, i) for i, layer in enumerate(layers)}
    before = {layer.name: layer.delta().double() for layer in layers}
    found = directions(layers, known)
    resize(model, {name: d.keep(keep) for name, d in found.items()})  # type: ignore[arg-type]
    for layer in layers:
        stats = known[layer.name]
        gap = (layer.delta().double() - before[layer.name]) ** 2
        increase = 0.5 * float((stats.outputs.double()[:, None] * gap * stats.inputs.double()).sum())
        assert increase == pytest.approx(float(found[layer.name].worth[keep:].sum()), rel=1e-3)


def test_keeping_everything_is_the_identity_and_balances() -> None:
    model, layers = trained()
    before = {layer.name: layer.delta() for layer in layers}
    known = {layer.name: moments(layer, i) for i, layer in enumerate(layers)}
    changes = {name: d.keep(5) for name, d in directions(layers, known).items()}
    for change in changes.values():
        torch.testing.assert_close(change.left @ change.right.T, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-8)
    resize(model, changes)  # type: ignore[arg-type]
    for layer in layers:
        torch.testing.assert_close(layer.delta(), before[layer.name], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.B.T @ layer.B, layer.A @ layer.A.T, rtol=1e-3, atol=1e-4)


def test_a_truncation_is_the_best_there_is_in_the_whitened_norm() -> None:
    model, layers = trained()
    layer = layers[0]
    known = {x.name: moments(x, i) for i, x in enumerate(layers)}
    u, sigma, v = torch.linalg.svd(whitened(layer, known[layer.name]), full_matrices=False)
    best = (u[:, :2] * sigma[:2]) @ v[:2]
    resize(model, {layer.name: directions(layers, known)[layer.name].keep(2)})  # type: ignore[arg-type]
    torch.testing.assert_close(whitened(layer, known[layer.name]), best, rtol=1e-3, atol=1e-3 * float(sigma[0]))


def test_directions_that_have_learned_nothing_can_still_learn() -> None:
    """B = 0: the update is zero, but no row of A may become zero with it."""
    model = attach(tiny_model("gpt2", 64), lora_rank=4)
    layers = adapted_layers(model)
    found = directions(layers, {layer.name: moments(layer) for layer in layers})
    resize(model, {name: d.keep(2) for name, d in found.items()})
    assert all(layer.A.norm(dim=1).min() > 1e-3 and not layer.B.any() for layer in layers)


def test_dead_inputs_are_worth_nothing() -> None:
    _, layers = trained()
    known = {}
    for layer in layers:
        stats = moments(layer)
        stats.inputs.zero_()
        known[layer.name] = stats
    found = directions(layers, known)
    assert all(d.worth.max() < 1e-30 and torch.isfinite(d.left).all() for d in found.values())
    assert all(isinstance(d, Directions) for d in found.values())


def test_costs_are_trained_numbers() -> None:
    _, layers = trained("core")
    assert sum(costs(layers[0], 5)) == 25 == layers[0].core.numel()  # type: ignore[union-attr]
    _, layers = trained()
    assert sum(costs(layers[0], 5)) == layers[0].A.numel() + layers[0].B.numel()
