"""What the kernels of GPUs and of CPUs are both held to: torch's own operations in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from trivet.kernels import cross_entropy
from trivet.kernels.cross_entropy import Head, linear_cross_entropy
from trivet.kernels.rotation import rotate


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    """Random numbers, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def close(found: torch.Tensor, exact: torch.Tensor) -> None:
    """Within the rounding of a result in `found`'s type."""
    eps = torch.finfo(found.dtype).eps
    torch.testing.assert_close(
        found.double(), exact.double(), rtol=2 * eps, atol=2 * eps * float(exact.detach().abs().max())
    )


def both(ours: Any, theirs: Any, *inputs: torch.Tensor) -> None:
    """Results and gradients of two functions, of which the second computes in float64."""
    mine = [x.detach().clone().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    found, wanted = ours(*mine), theirs(*exact)
    close(found, wanted)
    weights = draw(*found.shape, seed=9, dtype=found.dtype, device=found.device.type)
    got = torch.autograd.grad(found, mine, weights)
    for one, other in zip(got, torch.autograd.grad(wanted, exact, weights.double()), strict=True):
        close(one, other)


def check_rotation(heads: tuple[int, int], width: int, shared: bool, dtype: torch.dtype, device: str) -> None:
    """Angles are one row's for all, or each row's own; queries and keys lie as a model's projections leave them."""
    angles = draw(1 if shared else 2, 5, width // 2, seed=3, device=device).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    inputs = [draw(2, 5, n, width, seed=n, dtype=dtype, device=device).transpose(1, 2) for n in heads]
    for place in (0, 1):
        both(
            lambda q, k, i=place: rotate(q, k, cos, sin)[i] + 0 * (q.sum() + k.sum()),
            lambda q, k, i=place: apply_rotary_pos_emb(q, k, cos.double(), sin.double())[i] + 0 * (q.sum() + k.sum()),
            *inputs,
        )


def check_cross_entropy(
    kernel: Any, vocabulary: int, head: dict[str, Any], z_loss: float, dtype: torch.dtype, device: str
) -> None:
    """Losses, whether they are right, and the gradients that take the products' place."""
    products = draw(6, vocabulary, seed=1, dtype=dtype, device=device)
    products[0, 7], products[1, 3] = 20.0, -20.0
    targets = torch.tensor([7, 3, 0, vocabulary - 1, 5, 11], device=device)
    exact = products.double().requires_grad_()
    logits = exact * head.get("scale", 1.0)
    if "cap" in head:
        logits = head["cap"] * torch.tanh(logits / head["cap"])
    wanted = F.cross_entropy(logits, targets, reduction="none") + z_loss * logits.logsumexp(1).square()
    losses, right = kernel(products, targets, z_loss=z_loss, **head)
    torch.testing.assert_close(losses.double(), wanted.detach(), rtol=1e-5, atol=1e-5)
    assert right.tolist() == (logits.argmax(1) == targets).tolist()
    close(products, torch.autograd.grad(wanted.sum(), exact)[0])


def check_chunks(n: int, device: str) -> None:
    """A head whose chunks hold 16 positions."""
    weight, targets = draw(23, 8, seed=1, device=device), torch.arange(n, device=device) % 23
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CHUNK", "GPU_CHUNK"):
            patch.setattr(cross_entropy, name, 16 * 23)
        both(
            lambda hidden: linear_cross_entropy(hidden, targets, Head(weight))[0],
            lambda hidden: F.cross_entropy(hidden @ weight.T.double(), targets, reduction="none"),
            draw(n, 8, seed=2, device=device),
        )
