"""Forward and backward passes as CUDA graphs: recorded once for batches of one shape, replayed for all later ones.

Starting a kernel costs the processor longer than many of a small model's kernels take, and a step has thousands of
them. A graph is started whole (NVIDIA's CUDA C++ Programming Guide, "CUDA Graphs"; torch's `make_graphed_callables`
does the same for one shape).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from trivet.fast_attention import idle_masks
from trivet.head import Batch, Compute

log = logging.getLogger("trivet")

#: How often a shape comes before it is recorded, which takes about as long as two or three steps; and how many are.
SEEN, KEPT = 2, 64


class Recorder:
    """Calls a function of a batch; where a shape has come before, by a recording of its passes.

    A replay runs the same kernels on the same memory: weights and factors are read as they are by then, and what was a
    number in Python is as it was. So a recording holds for the parameters that it was made with, as long as they stay
    where they are in memory; others are recorded anew. Whoever changes anything else that the function reads, or has
    hooks that are to see a pass, calls the function itself.

    What a backward pass finds is added to the parameters' `grad`, past autograd and its hooks. Recordings take as much
    memory again as a step, so they are made where a GPU has twice what was needed so far. A function that looks at
    numbers on the GPU can't be recorded, and is called as ever.

    Args:
        learned: gives the parameters that have gradients, always in one order.
        on: whether anything is recorded at all; never on other devices than GPUs.
    """

    def __init__(self, learned: Callable[[], Sequence[nn.Parameter]], *, on: bool = True) -> None:
        self.learned = learned
        #: Whether anything is recorded from now on: no more, where that has failed.
        self.on = on and torch.cuda.is_available()
        self._seen: dict[Any, int] = {}
        self._masks: dict[Any, list[bool]] = {}
        self._recordings: dict[Any, _Recording] = {}
        self._places: tuple[Any, ...] = ()
        self._pool: Any = None
        self._sums: list[torch.Tensor] = []

    def __call__(self, compute: Compute, batch: Batch) -> torch.Tensor:
        """`compute(batch)`, with gradients in what is learned. It is to be read before the next one is asked for."""
        shape = self._shape(batch)
        if shape is None:
            return compute(batch)
        learned = [p for p in self.learned() if p.requires_grad]
        self._stay(learned)
        if shape not in self._recordings:
            count = self._seen[shape] = self._seen.get(shape, 0) + 1
            if count == SEEN:
                with idle_masks() as self._masks[shape]:
                    return compute(batch)
            if count < SEEN or not self._record(shape, compute, batch, learned):
                return compute(batch)
        return self._recordings[shape].replay(batch, partial(self._add, learned))

    def stop(self) -> None:
        """Record nothing from now on."""
        self.clear()
        self.on = False

    def clear(self) -> None:
        """Let go of all recordings, and of their memory."""
        self._seen.clear()
        self._masks.clear()
        self._recordings.clear()
        self._pool, self._sums = None, []

    def _shape(self, batch: Batch) -> Any:
        """What tells recordings apart; None where there is none."""
        if not self.on or not torch.is_grad_enabled():
            return None
        if not all(isinstance(value, torch.Tensor) and value.is_cuda for value in batch.values()):
            return None  # packed rows have numbers too, and their borders are looked at
        return tuple((name, value.shape, value.dtype) for name, value in batch.items())

    def _stay(self, learned: Sequence[nn.Parameter]) -> None:
        """Recordings are of parameters that are where they were."""
        places = tuple((p.data_ptr(), p.shape) for p in learned)
        if places != self._places:
            self.clear()
            self._places = places

    def _record(self, shape: Any, compute: Compute, batch: Batch, learned: Sequence[nn.Parameter]) -> bool:
        device = next(iter(batch.values())).device
        room = torch.cuda.get_device_properties(device).total_memory
        if len(self._recordings) >= KEPT or 2 * torch.cuda.max_memory_allocated(device) > room:
            return False
        stream = torch.cuda.current_stream(device)
        try:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            known = () if "attention_mask" in batch else self._masks[shape]  # whose entries say what is masked
            self._recordings[shape] = _Recording(compute, batch, learned, known, self._pool)
        except Exception as error:  # noqa: BLE001 - of whatever the model does that can't be recorded
            torch.cuda.set_stream(stream)  # a recording that failed leaves its own
            log.info("steps can't be recorded as CUDA graphs, and take longer: %s", str(error).partition("\n")[0])
            self.stop()
        return self.on

    @torch.no_grad()
    def _add(self, learned: Sequence[nn.Parameter], found: Sequence[torch.Tensor | None]) -> None:
        """Add to the parameters' gradients; what is `found` is written over by the next replay."""
        pairs = [(p, g) for p, g in zip(learned, found, strict=True) if g is not None]
        if not self._sums:
            self._sums = [torch.empty_like(p) for p in learned]
        if all(p.grad is None for p, _ in pairs):
            fresh = [total for total, g in zip(self._sums, found, strict=True) if g is not None]
            torch._foreach_copy_(fresh, [g for _, g in pairs])
            for (p, _), total in zip(pairs, fresh, strict=True):
                p.grad = total
            return
        for p, _ in pairs:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        before: Any = [p.grad for p, _ in pairs]
        torch._foreach_add_(before, [g for _, g in pairs])


class _Recording:
    """The passes of one shape."""

    def __init__(
        self, compute: Compute, batch: Batch, learned: Sequence[nn.Parameter], known: Sequence[bool], pool: Any
    ) -> None:
        """`known`: which of the masks are none, as `idle_masks` has noted."""
        self.batch = {name: value.clone() for name, value in batch.items()}
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self.turn = 0
        # Other threads may copy a batch meanwhile, which only fails where the mode is stricter.
        options = {"pool": pool, "capture_error_mode": "thread_local"}
        with idle_masks(known), torch.cuda.graph(self.forward, **options):
            y = compute(self.batch)
        self.grad = torch.empty_like(y)
        with torch.cuda.graph(self.backward, **options):
            self.found = torch.autograd.grad(y, learned, self.grad, allow_unused=True)
        self.y = y.detach()
        self.anchor = torch.empty(0, device=y.device, requires_grad=True)

    def replay(self, batch: Batch, add: Callable[[Sequence[torch.Tensor | None]], None]) -> torch.Tensor:
        """The result for a batch; its backward pass gives what is found to `add`."""
        for name, value in batch.items():
            self.batch[name].copy_(value)
        self.forward.replay()
        self.turn += 1
        return _Replayed.apply(self.anchor, self, add)  # type: ignore[no-any-return]


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, recording: _Recording, add: Any) -> torch.Tensor:
        ctx.recording, ctx.turn, ctx.add = recording, recording.turn, add
        return recording.y.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        recording: _Recording = ctx.recording
        if ctx.turn != recording.turn:
            raise RuntimeError("the backward pass of a recorded batch comes after the next one's forward pass")
        recording.grad.copy_(grad)
        recording.backward.replay()
        ctx.add(recording.found)
        return None, None, None
