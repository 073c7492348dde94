"""How rules are put together: gradients are rewritten before an optimizer's step, steps are scaled after it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from trivet.adapter.layers import AdaptedLayer
from trivet.update.adamw import adamw, decayed

#: Rewrites `.grad` of the optimizer's parameters. What it remembers of one of them is in `optimizer.state[parameter]`:
#: there `state_dict` finds it, and a change of rank transports it (keys ending in `_sq` and `gram` as such).
Transform = Callable[[torch.optim.Optimizer], None]


def chain(optimizer: torch.optim.Optimizer, *transforms: Transform) -> torch.optim.Optimizer:
    """`optimizer`, with `transforms` applied to the gradients, in this order, before every step.

    Gradients are there when `step()` is called, so a closure, which would compute them later, is refused.
    """

    def before(_: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(callable(given) for given in (*args[1:], *kwargs.values())):
            raise TypeError("step(closure): gradients are rewritten before the closure would compute them; call step()")
        with torch.no_grad():
            for transform in transforms:
                transform(optimizer)

    optimizer.register_step_pre_hook(before)
    return optimizer


def rank_step(
    optimizer: torch.optim.Optimizer, layers: Sequence[AdaptedLayer], reference: int = 8
) -> torch.optim.Optimizer:
    """Scale every step of a layer's factors by √(reference / r), r being its rank at that step.

    At a scale that doesn't fall with r more directions add up to a larger update, so that the best learning rate falls
    about as r^-½. Nothing is stored; any optimizer and any schedule will do. A core's r is its size. Weight decay is
    part of the step, so it is scaled too.
    """
    old: dict[nn.Parameter, tuple[float, torch.Tensor]] = {}

    def before(*_: Any) -> None:
        old.clear()
        for layer in layers:
            rank = layer.rank if layer.core is None else layer.core.shape[-1]
            if rank not in (0, reference):
                for p in layer.trained():
                    if p.grad is not None:
                        old[p] = (math.sqrt(reference / rank), p.detach().clone())

    def after(*_: Any) -> None:
        for p, (factor, start) in old.items():
            p.detach().copy_(torch.lerp(start, p.detach(), factor))
        old.clear()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    return optimizer


def rate_apart(
    optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], learning_rate: float
) -> torch.optim.Optimizer:
    """Let `parameters` learn at another rate, in groups at the end that keep the settings of those they leave."""
    theirs = {id(p) for p in parameters}
    kept: list[dict[str, Any]] = []
    apart: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        for groups, inside in ((kept, False), (apart, True)):
            if chosen := [p for p in group["params"] if (id(p) in theirs) is inside]:
                groups.append({**group, "params": chosen, **({"lr": learning_rate} if inside else {})})
    optimizer.param_groups[:] = [*kept, *apart]
    return optimizer


class Joint(torch.optim.Optimizer):
    """Several optimizers that look like one to schedulers, checkpoints and accelerate.

    Groups and state belong to the whole and are lent to each part for its step: `load_state_dict` replaces both.
    """

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        """`parts` have different parameters; their groups keep their settings, and say in `part` whose they are."""
        self.parts = parts
        super().__init__([{**group, "part": i} for i, part in enumerate(parts) for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """A step of every part. Closures are not supported."""
        if closure is not None:
            raise TypeError("step(closure) is not supported: compute the gradients, then call step()")
        for i, part in enumerate(self.parts):
            part.param_groups = [group for group in self.param_groups if group["part"] == i]
            part.state = self.state
            part.step()


def joint(
    matrices: Sequence[nn.Parameter], remaining: Sequence[nn.Parameter], learning_rate: float, weight_decay: float
) -> Joint:
    """Plain descent for `matrices`, whose gradients a transform makes into whole steps; AdamW for what remains.

    Without momentum SGD's decay is decoupled: p ← p − η (step + λ p).
    """
    parts: list[torch.optim.Optimizer] = []
    if matrices:
        parts.append(torch.optim.SGD(decayed(matrices, weight_decay), lr=learning_rate))
    if remaining:
        parts.append(adamw(decayed(remaining, weight_decay), learning_rate))
    return Joint(*parts)
