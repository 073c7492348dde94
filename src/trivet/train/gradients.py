"""Gradients of what is trained, without a walk through the whole model in every step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from trivet import processes

Parameters = Sequence[torch.nn.Parameter]


def sum_over_processes(trained: Parameters, device: torch.device) -> None:
    """Make every process's gradients those of the whole step. One that has none anywhere stays without."""
    there = torch.tensor([float(p.grad is not None) for p in trained], device=device)
    parts = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in trained]
    there, *sums = processes.total(torch.cat([there, *parts])).split([len(trained), *map(len, parts)])
    for p, anywhere, total in zip(trained, there.tolist(), sums, strict=True):
        p.grad = total.view_as(p).to(p.dtype) if anywhere else None


@contextlib.contextmanager
def cleared_fast(model: Any, trained: Callable[[], Parameters]) -> Iterator[None]:
    """Meanwhile `model.zero_grad()`, which transformers calls after each step, only looks at what is trained."""

    def zero_grad() -> None:
        for parameter in trained():
            parameter.grad = None

    model.zero_grad = zero_grad
    try:
        yield
    finally:
        del model.zero_grad
