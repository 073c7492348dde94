"""Dropout of a transformers model by `trivet.kernels.dropout`, on CPUs: its layers, and calls in other modules' passes.

It drops the same share, but other entries than torch's would for the same seed.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from trivet.kernels.dropout import dropout as drop


def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """`torch.nn.functional.dropout`, by its signature."""
    here = input.device.type in ("cpu", "meta")  # a plan, which has no data, counts what is kept
    if training and 0 < p < 1 and not inplace and here and input.is_floating_point():
        return drop(input, p)
    return nn.functional.dropout(input, p, training, inplace)


def dropout_layer(self: nn.Dropout, input: torch.Tensor) -> torch.Tensor:
    """The forward pass of a dropout layer that was replaced."""
    return _dropout(input, self.p, self.training, self.inplace)


def calls_dropout(module: nn.Module) -> bool:
    """Whether a module's own forward pass calls `nn.functional.dropout`, as BART's does."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and {"functional", "dropout"} <= {*code.co_names}


class _FastDropout(TorchFunctionMode):
    """While it is on, `nn.functional.dropout` is `_dropout`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_dropout if func is nn.functional.dropout else func)(*args, **(kwargs or {}))


def _computed_again(module: nn.Module) -> bool:
    """Whether gradient checkpointing computes the module, or a part of it, anew in the backward pass."""
    return any(getattr(part, "gradient_checkpointing", False) for part in module.modules())


#: Whether an outer module has switched it on: twice would cost twice.
_ON: ContextVar[bool] = ContextVar("fast dropout", default=False)


def with_fast_dropout(own: Callable[..., Any]) -> Callable[..., Any]:
    """A forward pass that finds the faster dropout while training.

    Not under gradient checkpointing, which would compute a layer again without passing here, and draw otherwise.
    """

    @functools.wraps(own)  # generation reads the signature
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.training or _ON.get() or _computed_again(self):
            return own(self, *args, **kwargs)
        before = _ON.set(True)
        try:
            with _FastDropout():
                return own(self, *args, **kwargs)
        finally:
            _ON.reset(before)

    return forward
