"""Each rule against the formula of its paper, written out in float64, or another implementation."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from update_toys import Toy, product

from trivet.adapter.layers import AdaptedLayer, adapted_layers
from trivet.update.muon import orthogonalise
from trivet.update.preconditioned import precondition
from trivet.update.pro import project
from trivet.update.solve import batched, damped, gram, inverse


def gradients(layer: AdaptedLayer) -> tuple[torch.Tensor, torch.Tensor]:
    assert layer.A.grad is not None and layer.B.grad is not None
    return layer.A.grad.clone(), layer.B.grad.clone()


def mean(k: torch.Tensor) -> torch.Tensor:
    return torch.trace(k) / k.shape[0]


def test_lora_plus_takes_peft_s_steps() -> None:
    ours, theirs = Toy(), Toy()
    one = ours.optimizer("lora_plus", learning_rate=1e-3, weight_decay=0.1, ratio=8.0)
    two = create_loraplus_optimizer(
        theirs.model, torch.optim.AdamW, lr=1e-3, fused=True, loraplus_lr_ratio=8.0, loraplus_weight_decay=0.1
    )
    ours.train(one, 5)
    theirs.train(two, 5)
    assert all(torch.equal(p, ours.trained()[name]) for name, p in theirs.trained().items())
    assert not torch.equal(ours.layers[0].B, Toy().layers[0].B)


def test_lora_plus_takes_peft_s_steps_for_embeddings() -> None:
    def made() -> tuple[nn.Module, torch.Tensor]:
        torch.manual_seed(0)
        body = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 5))
        return get_peft_model(body, LoraConfig(r=2, target_modules=["0", "1"])), torch.arange(8)

    from trivet.update.lora_plus import optimizer

    (ours, x), (theirs, _) = made(), made()
    one = optimizer(adapted_layers(ours), [], learning_rate=1e-3, ratio=8.0)
    two = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, fused=True, loraplus_lr_ratio=8.0)
    for model, stepper in ((ours, one), (theirs, two)):
        for _ in range(3):
            (model(x) ** 2).sum().backward()
            stepper.step()
            stepper.zero_grad()
    pairs = list(zip(ours.parameters(), theirs.parameters(), strict=True))
    assert all(torch.equal(p, q) for p, q in pairs)


def test_frozen_a_trains_b_alone() -> None:
    toy = Toy()
    before = [layer.A.detach().clone() for layer in toy.layers]
    optimizer = toy.optimizer("frozen_a")
    toy.train(optimizer, 5)
    for layer, a in zip(toy.layers, before, strict=True):
        assert torch.equal(layer.A, a) and not layer.A.requires_grad and layer.B.abs().sum() > 0
    counted = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert counted == sum(layer.B.numel() for layer in toy.layers) + sum(p.numel() for _, p in toy.rest)


@pytest.mark.parametrize("damping", [1e-6, 0.1])
def test_preconditioned_gradients_are_the_paper_s(damping: float) -> None:
    toy = Toy(dtype=torch.float64, b=0.3)
    toy.backward()
    plain = [gradients(layer) for layer in toy.layers]
    precondition(toy.layers, damping)
    for layer, (g_a, g_b) in zip(toy.layers, plain, strict=True):
        k_a, k_b, eye = layer.A @ layer.A.T, layer.B.T @ layer.B, torch.eye(4, dtype=torch.float64)
        torch.testing.assert_close(layer.B.grad, g_b @ torch.linalg.inv(k_a / mean(k_a) + damping * eye))
        torch.testing.assert_close(layer.A.grad, torch.linalg.inv(k_b / mean(k_b) + damping * eye) @ g_a)


def test_preconditioned_descent_of_one_factor_does_not_depend_on_the_gauge() -> None:
    """Without damping G_B K⁻¹ A is the plain gradient projected on A's row space, however A is written."""
    toy = Toy(dtype=torch.float64, b=0.3)
    turned = Toy(dtype=torch.float64, b=0.3)
    torch.manual_seed(5)
    turn = torch.randn(4, 4, dtype=torch.float64)
    with torch.no_grad():
        for layer in turned.layers:
            layer.B.copy_(layer.B @ turn)
            layer.A.copy_(torch.linalg.inv(turn) @ layer.A)
    steps = []
    for each in (toy, turned):
        each.backward()
        precondition(each.layers, 0.0)
        steps.append([layer.B.grad @ layer.A / mean(layer.A @ layer.A.T) for layer in each.layers])
    for one, two in zip(*steps, strict=True):
        torch.testing.assert_close(one, two)


def test_preconditioned_core() -> None:
    toy = Toy(dtype=torch.float64, cores=True)
    toy.backward()
    plain = [layer.core.grad.clone() for layer in toy.layers]
    precondition(toy.layers, 1e-9)
    for layer, g in zip(toy.layers, plain, strict=True):
        k_l, k_r = layer.basis.T @ layer.basis, layer.A @ layer.A.T
        wanted = torch.linalg.inv(k_l) @ g @ torch.linalg.inv(k_r) * mean(k_l) * mean(k_r)
        torch.testing.assert_close(layer.core.grad, wanted, rtol=1e-6, atol=1e-9)


def test_preconditioned_where_a_is_frozen() -> None:
    toy = Toy(dtype=torch.float64, b=0.3)
    for layer in toy.layers:
        layer.freeze_A()
    toy.backward()
    plain = [layer.B.grad.clone() for layer in toy.layers]
    for rule in (precondition, project):
        for layer, g_b in zip(toy.layers, plain, strict=True):
            layer.B.grad.copy_(g_b)
        rule(toy.layers, 1e-6)
        for layer, g_b in zip(toy.layers, plain, strict=True):
            k_a = layer.A @ layer.A.T
            eye = torch.eye(4, dtype=torch.float64)
            torch.testing.assert_close(layer.B.grad, g_b @ torch.linalg.inv(k_a / mean(k_a) + 1e-6 * eye))


def test_pro_is_the_projection_of_the_full_gradient_nearest_to_the_plain_one() -> None:
    toy = Toy(dtype=torch.float64, b=0.3)
    toy.backward()
    plain = [gradients(layer) for layer in toy.layers]
    project(toy.layers, 0.0)
    for layer, (g_a, g_b) in zip(toy.layers, plain, strict=True):
        a, b, s = layer.A.detach(), layer.B.detach(), layer.scale
        k_a, k_b = a @ a.T, b.T @ b
        found_a, found_b = layer.A.grad / mean(k_b), layer.B.grad / mean(k_a)
        # G is known through s BᵀG and s G Aᵀ only, and that is all that its projection needs.
        full = (b @ torch.linalg.inv(k_b) @ g_a) / s
        full = full + (g_b / s - full @ a.T) @ torch.linalg.inv(k_a) @ a
        torch.testing.assert_close(s * b.T @ full, g_a)
        torch.testing.assert_close(s * full @ a.T, g_b)
        # Least squares: s (B g_A + g_B A) = full, and of all solutions the one nearest to (g_A, g_B).
        out, inside, r = b.shape[0], a.shape[1], a.shape[0]
        on_a = torch.kron(b, torch.eye(inside, dtype=b.dtype))  # on g_A's rows, one after the other
        on_b = torch.kron(torch.eye(out, dtype=a.dtype), a.T.contiguous())
        operator = s * torch.cat([on_a, on_b], 1)
        start = torch.cat([g_a.flatten(), g_b.flatten()])
        best = start + torch.linalg.pinv(operator) @ (full.flatten() - operator @ start)
        torch.testing.assert_close(found_a.flatten(), best[: r * inside], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(found_b.flatten(), best[r * inside :], rtol=1e-6, atol=1e-8)


def test_pro_is_theorem_2_1() -> None:
    toy = Toy(dtype=torch.float64, b=0.3)
    toy.backward()
    plain = [gradients(layer) for layer in toy.layers]
    project(toy.layers, 0.0)
    scipy = pytest.importorskip("scipy.linalg")
    for layer, (g_a, g_b) in zip(toy.layers, plain, strict=True):
        a, b, s = layer.A.detach(), layer.B.detach(), layer.scale
        k_a, k_b = a @ a.T, b.T @ b
        p, q = torch.linalg.inv(k_b), torch.linalg.inv(k_a)
        x = torch.from_numpy(scipy.solve_sylvester(k_b.numpy(), k_a.numpy(), (-p @ g_a @ a.T / s**2).numpy()))
        torch.testing.assert_close(layer.A.grad / mean(k_b), p @ g_a / s**2 + x @ a)
        complement = torch.eye(b.shape[0], dtype=b.dtype) - b @ p @ b.T
        torch.testing.assert_close(layer.B.grad / mean(k_a), complement @ g_b @ q / s**2 - b @ x)


def test_pro_starts_from_b_zero() -> None:
    toy = Toy(dtype=torch.float64)
    toy.backward()
    plain = [gradients(layer)[1] for layer in toy.layers]
    project(toy.layers, 1e-6)
    for layer, g_b in zip(toy.layers, plain, strict=True):
        k_a = layer.A @ layer.A.T
        assert layer.A.grad is not None and not layer.A.grad.any()
        wanted = mean(k_a) * g_b @ torch.linalg.inv(k_a) / layer.scale**2
        torch.testing.assert_close(layer.B.grad, wanted, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("shape", [(4, 30), (30, 4), (6, 6)])
def test_orthogonalised_like_torch_s_muon(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    g = torch.randn(shape)
    ours = g.clone()
    orthogonalise([ours])
    values = torch.linalg.svdvals(ours) / (0.2 * max(shape) ** 0.5)
    assert values.min() > 0.5 and values.max() < 1.3
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(ours.flatten(), (u @ v).flatten(), dim=0) > 0.95


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon to compare with")
def test_muon_takes_torch_s_steps() -> None:
    """torch iterates in bfloat16, we don't: a step is within 2%."""
    toy = Toy(b=0.3)
    optimizer = toy.optimizer("muon", learning_rate=1e-2, momentum=0.9)
    matrices = [p for layer in toy.layers for p in (layer.A, layer.B)]
    copies = [nn.Parameter(p.detach().clone()) for p in matrices]
    reference = torch.optim.Muon(copies, lr=1e-2, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    start = [p.detach().clone() for p in matrices]
    for _ in range(4):
        for p, q in zip(matrices, copies, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step()
        reference.step()
    for p, q, old in zip(matrices, copies, start, strict=True):
        assert (p - q).norm() < 0.02 * (q - old).norm()
        assert torch.equal(optimizer.state[p]["momentum_buffer"], reference.state[q]["momentum_buffer"])


def test_solved_in_stacks_as_one_by_one() -> None:
    torch.manual_seed(0)
    grams = [gram(torch.randn(r, 9)) for r in (3, 5, 3, 1, 5)]
    calls = []

    def solve(k: torch.Tensor) -> torch.Tensor:
        calls.append(k.shape)
        return inverse(damped(k, 1e-3))

    for k, found in zip(grams, batched(solve, grams), strict=True):
        eye = torch.eye(len(k), dtype=k.dtype)
        torch.testing.assert_close(found, torch.linalg.inv(k + 1e-3 * mean(k) * eye))
    assert sorted(calls) == [(1, 1, 1), (2, 3, 3), (2, 5, 5)]
    assert batched(solve, []) == []


def gauged(toy: Toy, turn: torch.Tensor) -> Toy:
    with torch.no_grad():
        for layer in toy.layers:
            layer.B.copy_(layer.B @ turn)
            layer.A.copy_(torch.linalg.inv(turn) @ layer.A)
    return toy


@pytest.mark.parametrize(("rule", "same"), [("equivariant", True), ("adamw", False)])
@pytest.mark.parametrize("size", [1e-3, 0.3])
def test_the_path_of_the_product_and_the_gauge(rule: str, same: bool, size: float) -> None:
    torch.manual_seed(3)
    turn = torch.randn(4, 4, dtype=torch.float64) + torch.diag(torch.tensor([3.0, 1.0, 0.1, 10.0], dtype=torch.float64))
    plain, turned = Toy(dtype=torch.float64, b=size), gauged(Toy(dtype=torch.float64, b=size), turn)
    optimizers = [toy.optimizer(rule, learning_rate=3e-3) for toy in (plain, turned)]
    start = [product(layer) for layer in plain.layers]
    worst = 0.0
    for _ in range(20):
        for toy, optimizer in zip((plain, turned), optimizers, strict=True):
            toy.train(optimizer, 1)
        for one, two, old in zip(plain.layers, turned.layers, start, strict=True):
            worst = max(worst, float((product(one) - product(two)).norm() / (product(one) - old).norm()))
    assert worst < 1e-6 if same else worst > 1e-2


def test_equivariant_first_step_is_the_geometric_mean_s() -> None:
    """(K # V)⁻¹ by its definition as the solution of X V X = K⁻¹; A rests while B is 0."""
    toy = Toy(dtype=torch.float64)
    optimizer = toy.optimizer("equivariant", learning_rate=1e-2, weight_decay=0.0)
    toy.backward()
    a = [layer.A.detach().clone() for layer in toy.layers]
    g = [gradients(layer)[1] for layer in toy.layers]
    optimizer.step()
    for layer, a0, g_b in zip(toy.layers, a, g, strict=True):
        assert torch.equal(layer.A, a0)
        k, v = a0 @ a0.T, g_b.T @ g_b / len(g_b)
        x = torch.linalg.lstsq(g_b, -layer.B.detach() / 1e-2).solution  # B = −η G X
        torch.testing.assert_close(x @ v @ x, torch.linalg.inv(k), rtol=1e-4, atol=1e-6)
        step = layer.B.detach() @ a0 @ torch.linalg.qr(a0.T).Q / 1e-2  # as if A's rows were orthonormal
        assert step.square().mean().sqrt().item() == pytest.approx(1.0, rel=1e-3)


def test_equivariant_keeps_a_within_reach_while_b_is_tiny() -> None:
    toy = Toy(dtype=torch.float64, b=1e-9)
    before = copy.deepcopy([layer.A.detach() for layer in toy.layers])
    toy.train(toy.optimizer("equivariant", learning_rate=1e-3, weight_decay=0.0), 1)
    for layer, a in zip(toy.layers, before, strict=True):
        in_units = torch.linalg.inv(torch.linalg.cholesky(a @ a.T)) @ (layer.A.detach() - a)
        assert 0 < torch.linalg.matrix_norm(in_units, 2) < 0.31
