"""The GPU's kernels: torch's own operations in float64. On CPUs Triton's interpreter runs them, if it is installed."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed (it comes with torch for CUDA)")


import exact
from exact import both, check_chunks, check_cross_entropy, check_rotation, close

from conftest import tiny_model
from trivet import fast
from trivet.adapter import fast_gpu
from trivet.adapter.attach import attach
from trivet.adapter.layers import adapted_layers
from trivet.kernels import fused, gate, norm, rotation
from trivet.kernels.cross_entropy import Head, linear_cross_entropy
from trivet.loss import training_loss

pytestmark = pytest.mark.gpu if torch.cuda.is_available() else []
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def fusing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes a CPU's tensors, which are otherwise not given to it."""
    if DEVICE == "cpu":
        for module in (fused, fast):
            monkeypatch.setattr(module, "fuses", lambda x: x.numel() > 0)
        monkeypatch.setattr(fast_gpu, "wanted", lambda x: True)


draw = functools.partial(exact.draw, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 7), (5, 64), (2, 3, 100)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = 1 + draw(shape[-1], seed=2, dtype=dtype) / 2

    def exact(x: torch.Tensor) -> torch.Tensor:
        return weight.double() * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    both(lambda x: norm.rms_norm(x, weight, 1e-5), exact, draw(*shape, seed=1, dtype=dtype))


def test_rms_norm_of_what_is_not_contiguous() -> None:
    x, weight = draw(4, 6, 5, seed=1).transpose(0, 1), 1 + draw(5, seed=2)
    close(norm.rms_norm(x, weight, 1e-5), norm.rms_norm(x.contiguous(), weight, 1e-5))


def test_rows_that_are_too_long_and_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = draw(3, 33, seed=1), draw(33, seed=2)
    wanted = norm.rms_norm(x, weight, 1e-5)
    monkeypatch.setattr(fused, "LONGEST", 32)
    monkeypatch.delattr(fused, "_norm")
    close(norm.rms_norm(x, weight, 1e-5), wanted)
    assert norm.rms_norm(x[:0], weight, 1e-5).shape == (0, 33)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (4096,), (3, 5, 333)])
def test_silu_gate(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    both(gate.silu_gate, lambda g, u: F.silu(g) * u, *(3 * draw(*shape, seed=s, dtype=dtype) for s in (1, 2)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "width"), [((4, 2), 16), ((3, 3), 24), ((9, 1), 2)])
@pytest.mark.parametrize("shared", [True, False])
def test_rotate(heads: tuple[int, int], width: int, shared: bool, dtype: torch.dtype) -> None:
    check_rotation(heads, width, shared, dtype, DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("head", [{}, {"scale": 0.25}, {"cap": 3.0}, {"scale": 2.5, "cap": 2.0}])
@pytest.mark.parametrize("vocabulary", [23, 5000])
def test_cross_entropy(vocabulary: int, head: dict[str, Any], z_loss: float, dtype: torch.dtype) -> None:
    check_cross_entropy(fused.cross_entropy_, vocabulary, head, z_loss, dtype, DEVICE)


@pytest.mark.parametrize("n", [1, 16, 17, 50])
def test_a_head_in_chunks(n: int) -> None:
    check_chunks(n, DEVICE)


def adapted(fast_path: bool, **settings: Any) -> Any:
    model: Any = attach(tiny_model("llama", 64).to(DEVICE), lora_rank=4, fast=fast_path, **settings)
    for layer in adapted_layers(model):
        layer.B.data.copy_(torch.randn(layer.B.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return model


def test_a_model_uses_them_and_learns_the_same() -> None:
    """Loss and gradients are transformers' own."""
    ours, theirs = adapted(True), adapted(False)
    own = {type(m).__name__ for m in ours.modules() if "forward" in vars(m)}
    assert {"LlamaMLP", "LlamaAttention", "LlamaRMSNorm"} <= own
    ids = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    results = []
    for model in (ours, theirs):
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        loss = training_loss(model, batch, ids, task="causal-lm") if model is ours else model(**batch, labels=ids).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_what_a_gated_layer_keeps() -> None:
    """Of the three tensors as wide as its inner layer two: their product is made again, for its factors' gradients."""
    model = adapted(True)
    layer = model.base_model.model.model.layers[0].mlp
    width = layer.down_proj.in_features
    x = draw(3, layer.gate_proj.in_features, seed=4).requires_grad_()
    kept: dict[int, tuple[int, ...]] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tuple(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = layer(x)
    assert sum(shape == (3, width) for shape in kept.values()) == 2
    factors = [p for p in layer.parameters() if p.requires_grad]
    found = torch.autograd.grad(y.sum(), [x, *factors])
    wanted = torch.autograd.grad(type(layer).forward(layer, x).sum(), [x, *factors])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradient_checkpointing(dropout: float) -> None:
    ids = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def gradients(checkpointing: bool) -> tuple[list[torch.Tensor], int]:
        model = adapted(True, lora_dropout=dropout).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        kept: set[int] = set()
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.add(t.data_ptr()) or t, lambda t: t):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad], len(kept)

    (plain, many), (again, few) = gradients(False), gradients(True)
    assert few < many / 2
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_second_derivative_is_refused() -> None:
    x = draw(2, 8, seed=1).requires_grad_()
    for y in (norm.rms_norm(x, draw(8, seed=2), 1e-5), gate.silu_gate(x, x)):
        first = torch.autograd.grad(y.square().sum(), x, create_graph=True)[0]
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()


def test_outputs_may_be_changed_in_place() -> None:
    angles = draw(1, 5, 4, seed=3).repeat(1, 1, 2)
    q, k = (draw(2, 5, 2, 8, seed=s).transpose(1, 2).requires_grad_() for s in (1, 2))
    x = draw(3, 8, seed=4).requires_grad_()
    for make, given in (
        (lambda x: norm.rms_norm(x, draw(8, seed=5), 1e-5), (x,)),
        (lambda q, k: rotation.rotate(q, k, angles.cos(), angles.sin())[1], (q, k)),
        (gate.silu_gate, (x, x)),
    ):
        weights = draw(*make(*given).shape, seed=6)
        plain = torch.autograd.grad(make(*given) * 2 + 1, given[-1], weights)[0]
        assert torch.equal(torch.autograd.grad(make(*given).mul_(2).add_(1), given[-1], weights)[0], plain)


def test_a_product_that_was_changed_is_kept() -> None:
    layer = adapted(True).base_model.model.model.layers[0].mlp.down_proj
    g, u = (draw(3, layer.in_features, seed=s).requires_grad_() for s in (1, 2))
    factor = layer.lora_A["default"].weight
    found = torch.autograd.grad(layer(gate.silu_gate(g, u).mul_(3)).sum(), factor)[0]
    torch.testing.assert_close(found, torch.autograd.grad(layer(F.silu(g) * u * 3).sum(), factor)[0])


def test_a_target_that_is_no_token_gives_no_number() -> None:
    losses, _ = fused.cross_entropy_(draw(3, 23, seed=1), torch.tensor([5, -100, 23], device=DEVICE))
    assert losses.isnan().tolist() == [False, True, True]


def test_targets_that_do_not_lie_together() -> None:
    weight, hidden = draw(23, 8, seed=1), draw(6, 8, seed=2).requires_grad_()
    targets = torch.arange(12, device=DEVICE)
    wanted = F.cross_entropy(hidden @ weight.T, targets[::2], reduction="none")
    torch.testing.assert_close(linear_cross_entropy(hidden, targets[::2], Head(weight))[0], wanted)


def test_what_the_kernels_do_not_take_is_computed_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that was moved, or is in float64, after it was sped up."""
    model = adapted(True)
    for module in (fused, fast):
        monkeypatch.setattr(module, "fuses", lambda x: False)
    for name in ("silu_gate", "rotate", "rms_norm"):
        monkeypatch.setattr(fused, name, None)
    ids = torch.randint(1, 64, (2, 9)).to(DEVICE)
    model(input_ids=ids, labels=ids).loss.backward()
