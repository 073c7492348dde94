"""What `trivet.fast` asks of modules, and how it compares what they compute."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
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


def forwards(parts: Sequence[Any]) -> list[Any]:
    """What each part's forward pass was replaced by."""
    return [_function(getattr(part, "__dict__", {}).get("forward")) for part in parts]


def _function(forward: Any) -> Any:
    """The function of a method, or what it was made of."""
    function = getattr(forward, "__func__", None)
    return getattr(function, "func", function)


def own_pass(layer: nn.Module) -> Callable[..., Any]:
    """The forward pass of a layer's class, which takes it first, without what is around it."""
    return inspect.unwrap(type(layer).forward)


def whole(layer: Any, inside: Callable[[torch.Tensor], Any], x: torch.Tensor, cached: bool) -> torch.Tensor:
    """inside(x), checkpointed where transformers would: its layers wrap their forward pass in what does it."""
    wrapped = type(layer).forward is not own_pass(layer)
    if wrapped and layer.gradient_checkpointing and layer.training and not cached:
        return layer._gradient_checkpointing_func(inside, x)  # type: ignore[no-any-return]
    return inside(x)  # type: ignore[no-any-return]


def names(function: Any) -> set[str]:
    """What a function's code speaks of."""
    return set(getattr(getattr(inspect.unwrap(function), "__code__", None), "co_names", ()))


@torch.enable_grad()
def as_the_parts(layer: nn.Module, together: Callable[[], Any], parts: Callable[[], Any]) -> bool:
    """Whether two passes of a layer, without dropout, give the same; False too where the first gives nothing."""
    training = [part for part in layer.modules() if part.training]
    layer.eval()
    try:
        ours = together()
        theirs = None if ours is None else parts()
    finally:
        for part in training:
            part.training = True
    return isinstance(theirs, torch.Tensor) and close(theirs, ours, float(theirs.detach().abs().max()))


def drawn(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """Random numbers, the same whatever torch's global state, of another tensor's type and on its device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like)


def close(theirs: torch.Tensor, ours: torch.Tensor, size: float = 1.0) -> bool:
    """Whether two results, as large as `size`, are the same but for rounding."""
    tolerance = 4 * torch.finfo(theirs.dtype).eps
    return theirs.dtype == ours.dtype and torch.allclose(theirs, ours, rtol=tolerance, atol=tolerance * size)
