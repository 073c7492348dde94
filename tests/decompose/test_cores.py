"""`core` and `cur`: bases as documented, and the size of a step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import qr
from started import adapted, begin, observe, same_span

from trivet.adapter.layers import AdaptedLayer, adapted_layers
from trivet.decompose.bases import core_step, pivots
from trivet.decompose.tensor_cur import stacks

kinds = pytest.mark.parametrize("kind", ["llama", "gpt2"])


@kinds
def test_core_lies_between_the_weights_singular_vectors(kind: str) -> None:
    for layer in begin("core", adapted(kind)):
        u, sigma, vt = torch.linalg.svd(layer.weight)
        assert layer.form == "core" and layer.core is not None and layer.core.shape == (4, 4)
        assert same_span(layer.basis.T, u[:, :4].T) > 1 - 1e-6
        torch.testing.assert_close(layer.basis.T @ layer.basis, torch.eye(4), rtol=0, atol=1e-5)
        expected = sigma[:4, None] * vt[:4]
        sizes = layer.A.norm(dim=1)
        assert same_span(layer.A, expected) > 1 - 1e-6
        torch.testing.assert_close(sizes / sizes[0], sigma[:4] / sigma[0], rtol=1e-4, atol=0)
        cosines = torch.nn.functional.cosine_similarity(layer.A, expected).abs()
        torch.testing.assert_close(cosines, torch.ones(4), rtol=0, atol=1e-4)


@kinds
def test_core_between_the_gradients_singular_vectors(kind: str) -> None:
    model = adapted(kind)
    seen = observe(model)
    for layer in begin("core", model, bases="gradient"):
        u, _, vt = torch.linalg.svd((seen[layer.name].g.T @ seen[layer.name].x).double())
        assert same_span(layer.basis.T, u[:, :4].T) > 0.999
        assert same_span(layer.A, vt[:4]) > 0.999
        gram = layer.A @ layer.A.T
        torch.testing.assert_close(gram, gram[0, 0] * torch.eye(4), rtol=0, atol=1e-4 * gram[0, 0].item())


@kinds
def test_cur_spans_the_columns_and_rows_of_pivoted_qr(kind: str) -> None:
    for layer in begin("cur", adapted(kind)):
        w = layer.weight
        columns, rows = (qr(m.numpy(), mode="r", pivoting=True)[1][:4].copy() for m in (w, w.T))
        assert same_span(layer.basis.T, w[:, columns].T) > 1 - 1e-6
        assert same_span(layer.A, w[rows]) > 1 - 1e-6
        torch.testing.assert_close(layer.basis.T @ layer.basis, torch.eye(4), rtol=0, atol=1e-5)
        gram = layer.A @ layer.A.T
        torch.testing.assert_close(gram, gram[0, 0] * torch.eye(4), rtol=0, atol=1e-4 * gram[0, 0].item())


def test_pivots_of_a_sketch_are_nearly_as_good_as_of_the_matrix() -> None:
    rng = np.random.default_rng(0)
    sizes = 1 / np.arange(1, 301) ** 1.0
    w = (np.linalg.qr(rng.normal(size=(400, 300)))[0] * sizes @ np.linalg.qr(rng.normal(size=(300, 300)))[0]).astype(
        "f4"
    )

    def left_over(columns: np.ndarray) -> float:
        q = np.linalg.qr(w[:, columns])[0]
        return float(np.linalg.norm(w - q @ (q.T @ w)))

    exact = left_over(qr(w, mode="r", pivoting=True)[1][:10])
    sketched = pivots(torch.from_numpy(w), 10, torch.Generator().manual_seed(0))
    assert len(set(sketched.tolist())) == 10
    assert left_over(sketched.numpy()) < 1.15 * exact
    assert exact < left_over(np.arange(10))  # so that the bound says something


def rms_step(layers: list[AdaptedLayer], draws: int = 100) -> torch.Tensor:
    """Root mean square of ‖ΔW / s‖ for cores of random signs, over draws and layers."""
    squares = []
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)
        for core in {id(layer.core): layer.core for layer in layers}.values():
            core.data = torch.randint(2, core.shape, generator=generator).float() * 2 - 1
        squares.append(torch.stack([(layer.delta() / layer.scale).square().sum() for layer in layers]))
    return torch.stack(squares).mean().sqrt()


@pytest.mark.parametrize(
    ("name", "options"), [("core", {}), ("core", {"bases": "gradient"}), ("cur", {}), ("tensor_cur", {})]
)
@kinds
def test_a_step_on_a_core_is_as_long_as_plain_loras(name: str, options: dict, kind: str) -> None:
    plain = adapted(kind)
    layers = begin("zero", plain)
    lr = 1e-3
    optimizer = torch.optim.AdamW([layer.B for layer in layers], lr=lr)
    for layer in layers:
        signs = torch.randint(2, layer.B.shape, generator=torch.Generator().manual_seed(4)) * 2.0 - 1
        layer.B.grad = signs
    optimizer.step()
    for same, cores in zip(stacks(layers), stacks(begin(name, adapted(kind), **options)), strict=True):
        expected = core_step(same[0].shape[0], 4)
        theirs = torch.stack([(layer.delta() / layer.scale).square().sum() for layer in same]).mean().sqrt() / lr
        assert theirs.item() == pytest.approx(expected, rel=0.2)
        assert rms_step(cores).item() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("name", ["core", "cur"])
def test_a_layer_of_zeros_can_still_learn(name: str) -> None:
    model = adapted("llama")
    adapted_layers(model)[0].module.get_base_layer().weight.data.zero_()
    layer = begin(name, model)[0]
    assert layer.core is not None
    layer.core.data.fill_(1.0)
    assert torch.isfinite(layer.delta()).all() and torch.linalg.matrix_rank(layer.delta()) >= 1
    assert (layer.basis.norm(dim=0) > 0).all() and (layer.A.norm(dim=1) > 0).all()
