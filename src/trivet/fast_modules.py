"""What `trivet.fast` asks of modules, and how it compares what they compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def eps(norm: Any) -> Any:
    """The norm's epsilon, by whichever name it has it; None where it has none."""
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def hooked(module: nn.Module) -> bool:
    """Whether somebody wants to know when the module is called."""
    of_backward = module._backward_hooks or module._backward_pre_hooks
    return bool(module._forward_hooks or module._forward_pre_hooks or of_backward)


def drawn(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """Random numbers, the same whatever torch's global state, of another tensor's type and on its device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like)


def close(theirs: torch.Tensor, ours: torch.Tensor, size: float = 1.0) -> bool:
    """Whether two results, as large as `size`, are the same but for rounding."""
    tolerance = 4 * torch.finfo(theirs.dtype).eps
    return theirs.dtype == ours.dtype and torch.allclose(theirs, ours, rtol=tolerance, atol=tolerance * size)
