"""What `trivet.fast` asks of modules."""

from __future__ import annotations

from typing import Any

from torch import nn


def eps(norm: Any) -> Any:
    """The norm's epsilon, by whichever name it has it; None where it has none."""
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def hooked(module: nn.Module) -> bool:
    """Whether somebody wants to know when the module is called."""
    of_backward = module._backward_hooks or module._backward_pre_hooks
    return bool(module._forward_hooks or module._forward_pre_hooks or of_backward)
