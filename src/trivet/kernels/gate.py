"""The gated activation of Llama's and its relatives' feed-forward layers (Shazeer 2020, arXiv 2002.05202), on GPUs."""

from __future__ import annotations

from typing import Any

import torch

from trivet.kernels import fused


def silu_gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """SiLU(gate) · up, computed in float32. Both of one shape, on a GPU; they alone are kept for the backward pass."""
    return _SiLUGate.apply(gate, up)


class _SiLUGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Any, up: Any) -> torch.Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return fused.silu_gate(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return fused.silu_gate_backward(grad.contiguous(), *ctx.saved_tensors)
