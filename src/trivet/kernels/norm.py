"""Root-mean-square norm (Zhang & Sennrich 2019, arXiv 1910.07467) of a frozen weight: x and a number a row are kept."""

from __future__ import annotations

from typing import Any

import torch

from trivet.kernels import fused


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight · x / √(mean(x²) + eps) over the last dimension, computed in float32 (float64 in float64); x's type.

    Args:
        x: (…, n).
        weight: (n,), without gradient.
    """
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, eps: float) -> torch.Tensor:
        ctx.fused = fused.fuses(x) and x.shape[-1] <= fused.LONGEST
        if ctx.fused:
            x = x.contiguous()
            y, inverse = fused.rms_norm(x.view(-1, x.shape[-1]), weight, eps)
            ctx.save_for_backward(x, weight, inverse)
            return y.view_as(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        inverse = size.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x.to(wide) * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, weight, inverse = ctx.saved_tensors
        if ctx.fused:
            g, rows = (t.contiguous().view(-1, x.shape[-1]) for t in (grad, x))
            return fused.rms_norm_backward(g, rows, weight, inverse).view_as(x), None, None
        g, wide = grad.to(inverse.dtype) * weight, x.to(inverse.dtype)
        along = torch.linalg.vecdot(g, wide).unsqueeze(-1).mul_(inverse * inverse / x.shape[-1])
        return g.addcmul_(wide, along, value=-1).mul_(inverse).to(x.dtype), None, None
