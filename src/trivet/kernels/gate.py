"""The gated activation of Llama's and its relatives' feed-forward layers (Shazeer 2020, arXiv 2002.05202), on GPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from trivet.kernels import fused


def silu_gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """SiLU(gate) · up, computed in float32. Both of one shape, on a GPU; they alone are kept for the backward pass.

    The result says in `made_of` what it is made of, so that who would keep it can keep these, which are kept anyway;
    and its version then, as it may be changed in place.
    """
    gate, up = gate.contiguous(), up.contiguous()
    out = _SiLUGate.apply(gate, up)
    out.made_of = gate.detach(), up.detach(), out._version
    return out


class _SiLUGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Any, up: Any) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return fused.silu_gate(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        return fused.silu_gate_backward(grad.contiguous(), *ctx.saved_tensors)
