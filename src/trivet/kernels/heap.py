"""Memory for large results on CPUs, of the kind that glibc's heap can give out again once it is free."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import torch

#: torch's tensors begin at a multiple of so many bytes, a cache line. Below `_LARGE` bytes its own memory does.
_ALIGNMENT, _LARGE = 64, 2**18
_workspaces = threading.local()


def empty(*shape: int, like: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor of `like`'s type and device, not filled.

    torch asks glibc for aligned memory. glibc takes 96 bytes more than that, and frees what is left over at the ends as
    small blocks. Where a small request gets one of these, the freed block is too short for the next tensor of its size,
    and lies idle until its neighbours are free too: in a forward pass, which keeps most of what it makes, the heap grew
    to almost twice what was kept. Here the leftovers stay part of the block.
    """
    size = math.prod(shape) * like.element_size()
    plain = like.device.type == "cpu" and type(like) is torch.Tensor and not torch.compiler.is_compiling()
    if size < _LARGE or not plain:
        return like.new_empty(shape)
    try:
        block = np.empty(size + _ALIGNMENT, np.uint8)
    except MemoryError:
        return like.new_empty(shape)  # torch says it in words that trainers know
    start = -block.__array_interface__["data"][0] % _ALIGNMENT
    flat = torch.frombuffer(block, dtype=like.dtype, count=math.prod(shape), offset=start)
    return flat.resize_(shape)  # in place: a view could not be changed in place where a function of autograd returns it


def workspace(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory on the CPU for a C function while it runs: at least `count` numbers, not filled.

    It is a thread's own, of which there is one for each type: the next call has the same. So it stays in cache, and no
    function waits for memory of its own.
    """
    kept: Any = vars(_workspaces)
    found = kept.get(dtype)
    if found is None or len(found) < count:
        found = kept[dtype] = empty(count, like=torch.empty(0, dtype=dtype))
    return found
