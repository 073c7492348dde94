"""The gated activation of Llama's and its relatives' feed-forward layers (Shazeer 2020, arXiv 2002.05202)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from trivet.kernels import compiled, fused, native
from trivet.kernels.heap import empty
from trivet.kernels.recipe import carries


def silu_gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """SiLU(gate) · up, both of one shape; they alone are kept for the backward pass.

    With Triton or a C compiler it is computed in float32 and rounded once, else as torch does, SiLU rounded too.
    """
    kernels = fused if fused.fuses(gate) else native
    if kernels is fused or (compiled.serves(gate) and up.dtype == gate.dtype):
        gate, up = gate.contiguous(), up.contiguous()
        return carries(_FusedSiLUGate.apply(gate, up, kernels), kernels.silu_gate, gate, up)
    again = _Again()
    return carries(_SiLUGate.apply(gate, up, again), again, gate, up)


class _FusedSiLUGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Any, up: Any, kernels: Any) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kernels = kernels
        return kernels.silu_gate(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        return *ctx.kernels.silu_gate_backward(grad.contiguous(), *ctx.saved_tensors), None


class _SiLUGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Any, up: Any, again: Any) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.again = again
        return torch.ops.aten.silu.out(gate, out=empty(*gate.shape, like=gate)).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), ctx.again.silu(gate).mul_(grad), None


class _Again:
    """SiLU(gate) · up made again for the layer that reads it, whose backward pass comes first: SiLU is then known."""

    def __init__(self) -> None:
        self.known: torch.Tensor | None = None

    def __call__(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        self.known = nn.functional.silu(gate)
        return self.known * up

    def silu(self, gate: torch.Tensor) -> torch.Tensor:
        """SiLU(gate), the caller's to change."""
        known, self.known = self.known, None
        return nn.functional.silu(gate) if known is None else known
