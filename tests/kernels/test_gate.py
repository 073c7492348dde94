"""The gated activation on CPUs: torch's operations, in float64 too, and how often SiLU is computed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from trivet.kernels.gate import silu_gate

pytestmark = pytest.mark.usefixtures("without_a_compiler")  # test_native.py has the C kernels


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 64), (0, 4)])
def test_output_and_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate, up = (draw(*shape, seed=s, dtype=dtype).requires_grad_() for s in (1, 2))
    weights = draw(*shape, seed=3, dtype=dtype)
    ours, theirs = silu_gate(gate, up), F.silu(gate) * up
    assert ours.dtype == dtype and torch.equal(ours, theirs)
    found, wanted = (torch.autograd.grad(y, (gate, up), weights) for y in (ours, theirs))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_the_gradient_is_that_of_finite_differences() -> None:
    pair = [draw(3, 5, seed=s, dtype=torch.float64).requires_grad_() for s in (1, 2)]
    assert torch.autograd.gradcheck(silu_gate, pair)


class Counted(TorchDispatchMode):
    """Counts passes of SiLU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func in (torch.ops.aten.silu.default, torch.ops.aten.silu.out)
        return func(*args, **(kwargs or {}))


def test_silu_is_computed_once_more_in_a_backward_pass_and_not_twice() -> None:
    gate, up = (draw(3, 5, seed=s).requires_grad_() for s in (1, 2))
    y = silu_gate(gate, up)
    recipe = y.recipe  # type: ignore[attr-defined]
    with Counted() as counted:
        made = recipe.maker(*recipe.inputs)
        first = torch.autograd.grad(y.sum(), (gate, up), retain_graph=True)
    assert counted.count == 1 and torch.equal(made, y)
    with Counted() as counted:
        again = torch.autograd.grad(y.sum(), (gate, up))
    assert counted.count == 1  # nobody has made the product meanwhile
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
