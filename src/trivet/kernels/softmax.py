"""Softmax over rows of any length, for CPUs.

torch's own works on 16 or 32 entries of a row at once, and on what is left over one after the other: rows of 13 cost as
much as rows of 64. Here rows below a vector's length are computed by operations that don't end with a row, and 16-bit
rows in 32 bits, which has a shorter rest and no conversion in it.
"""

from __future__ import annotations

import torch

#: Entries of a row that torch's float32 softmax takes at once, and its gradient in 16 bits.
_VECTOR, _WIDE = 16, 32


def softmax(x: torch.Tensor) -> torch.Tensor:
    """softmax(x) over the last axis, in x's type, computed in float32 at least; a row must have a finite entry."""
    wide = x.float() if x.element_size() < 4 else x
    if x.shape[-1] >= _VECTOR:
        return torch.softmax(wide, -1).to(x.dtype)
    powers = (wide - wide.amax(-1, keepdim=True)).exp_()
    return powers.div_(powers.sum(-1, keepdim=True)).to(x.dtype)


def softmax_backward(grad: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """The gradient p (g − Σ p g) in the scores, from p = softmax(scores) and its gradient g, in their type."""
    narrow = p.element_size() < 4
    if p.shape[-1] >= (_WIDE if narrow else _VECTOR):
        return torch._softmax_backward_data(grad, p, -1, p.dtype)
    p, g = (p.float(), grad.float()) if narrow else (p, grad)
    if p.shape[-1] >= _VECTOR:
        return torch._softmax_backward_data(g, p, -1, p.dtype).to(grad.dtype)
    dot = p * g
    return dot.addcmul_(p, dot.sum(-1, keepdim=True), value=-1).to(grad.dtype)
