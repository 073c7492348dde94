"""NF4: weights as 4-bit codes, 64 of them to a scale (Dettmers et al. 2023, arXiv 2305.14314, section 3).

The sixteen values are quantiles of a normal distribution, so that each is met about as often where weights are drawn
from one. A scale is the largest magnitude of its block, in bfloat16: 4.25 bits a weight, no second quantisation needed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F

from trivet.kernels.heap import empty

#: Weights to a scale.
BLOCK = 64
#: Blocks that are quantised at a time, and bytes of codes that CPUs make weights of: what is made on the way is small.
_BLOCKS, _PART = 2**12, 2**20


@functools.cache
def values() -> torch.Tensor:
    """The sixteen values (16,) float32, rising from -1 to 1 with an exact 0 (appendix E of the paper)."""
    edge = 1 - (1 / 30 + 1 / 32) / 2
    above, below = (torch.special.ndtri(torch.linspace(edge, 0.5, count, dtype=torch.float64))[:-1] for count in (9, 8))
    found = torch.cat([-below, above.new_zeros(1), above.flip(0)])
    return (found / found[-1]).float()


@functools.cache
def _pairs(device: torch.device) -> torch.Tensor:
    """(256,) int64: what a byte's two codes stand for, as the bits of two float32 values.

    It stays in a core's nearest cache. One for two bytes at a time is faster alone, and slower between matrix products.
    """
    table = torch.stack([values().repeat_interleave(16), values().repeat(16)], dim=1)
    return table.view(torch.int64).flatten().to(device)


@torch.no_grad()
def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scales) of a weight: uint8 with two codes a byte, the first one in the upper half, and bfloat16.

    Each entry gets the value nearest to it, relative to the scale. A last block that is not full is filled with zeros.
    """
    blocks = -(-weight.numel() // BLOCK)
    if weight.is_meta:
        return weight.new_empty(blocks * BLOCK // 2, dtype=torch.uint8), weight.new_empty(blocks, dtype=torch.bfloat16)
    flat = F.pad(weight.detach().reshape(-1), (0, blocks * BLOCK - weight.numel())).view(blocks, BLOCK)
    scales = flat.abs().amax(dim=1).to(torch.bfloat16)
    between = ((values()[1:] + values()[:-1]) / 2).tolist()
    codes = []
    for part, scale in zip(flat.split(_BLOCKS), scales.split(_BLOCKS), strict=True):
        relative = part.float() / torch.where(scale == 0, 1, scale.float())[:, None]
        nearest = torch.zeros(part.shape, dtype=torch.uint8, device=part.device)
        for middle in between:  # a quarter of the time that a search in them takes
            nearest += relative > middle
        pairs = nearest.view(-1, 2)
        codes.append(pairs[:, 0] * 16 + pairs[:, 1])
    return torch.cat(codes), scales


@torch.no_grad()
def dequantise(codes: torch.Tensor, scales: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """The weight (of `shape`) that `quantise` returned these for, in `dtype`: value times scale, rounded once."""
    if codes.is_meta:
        return torch.empty(tuple(shape), dtype=dtype, device="meta")
    table, part = _pairs(codes.device), _PART if codes.device.type == "cpu" else len(codes)
    whole = empty(len(scales), BLOCK, like=torch.empty(0, dtype=dtype, device=codes.device))
    step = 2 * part // BLOCK
    for some, scale, out in zip(codes.split(part), scales.split(step), whole.split(step), strict=True):
        exact = out if dtype == torch.float32 else out.new_empty(out.shape, dtype=torch.float32)
        torch.index_select(table, 0, some.int(), out=exact.view(torch.int64).view(-1))
        exact.mul_(scale.float()[:, None])
        if exact is not out:
            out.copy_(exact)
    return whole.view(-1)[: prod(shape)].view(tuple(shape))
