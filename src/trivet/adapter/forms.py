"""Factors that are not plain matrices: what stands in for `lora_A` or `lora_B` inside PEFT's layer.

Each has a differentiable `weight` and a forward pass, which is all that PEFT's layer asks of its factors, so forward,
merging and saving as plain LoRA work as they do for plain matrices.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

#: What only training reads of a form's state; `weight` says it all to others.
TRAINING_KEYS = frozenset({"basis", "core", "free", "fixed"})


class Written(nn.Module):
    """A factor whose state also holds its `weight`, written out: plain PEFT reads that and passes over the rest."""

    weight: Any

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight.detach().contiguous()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict({k: v for k, v in state_dict.items() if k != f"{prefix}weight"}, prefix, *rest)


class Frozen(nn.Module):
    """A factor that is not trained: a buffer, so that nothing which makes parameters trainable can reach it."""

    weight: torch.Tensor

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach().clone(memory_format=torch.contiguous_format))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


class Core(Written):
    """B = basis · core with a frozen basis (out, p): only the core (p, r) is trained."""

    basis: torch.Tensor

    def __init__(self, basis: torch.Tensor, core: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("basis", basis.detach().clone(memory_format=torch.contiguous_format))
        self.core = nn.Parameter(core.detach().clone(memory_format=torch.contiguous_format))

    def matrix(self) -> torch.Tensor:
        """The core, (p, r)."""
        return self.core

    @property
    def weight(self) -> torch.Tensor:
        """B, (out, r)."""
        return self.basis @ self.matrix()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x, self.matrix()), self.basis)


class TensorCore(Core):
    """A core that several layers share: layer l's matrix is made of blocks core[(l - a - b) mod p].

    It is the t-product C * U * R along a stack of p layers, written out for one of them: ΔW_l = Σ C_a U_b R_c over
    a + b + c = l (mod p), with basis [C_0 … C_{p-1}] and A = [R_0; …; R_{p-1}].
    """

    blocks: torch.Tensor

    def __init__(self, basis: torch.Tensor, core: nn.Parameter, index: int) -> None:
        """`core` is the shared U, (p, columns, rows); `index` is the layer's place in the stack."""
        nn.Module.__init__(self)
        self.register_buffer("basis", basis)  # shared, not copied
        self.core = core
        p = core.shape[0]
        a, c = torch.arange(p)[:, None], torch.arange(p)[None, :]
        self.register_buffer("blocks", (index - a - c) % p, persistent=False)

    def matrix(self) -> torch.Tensor:
        p, columns, rows = self.core.shape
        return self.core[self.blocks].permute(0, 2, 1, 3).reshape(p * columns, p * rows)


class Offset(Written):
    """A trained factor beside a frozen one: s (B A − B0 A0) as one product of twice the rank."""

    fixed: torch.Tensor

    def __init__(self, free: torch.Tensor, fixed: torch.Tensor, dim: int) -> None:
        """`free` and `fixed` are joined along `dim`: 0 for A, 1 for B."""
        super().__init__()
        self.free = nn.Parameter(free.detach().clone(memory_format=torch.contiguous_format))
        self.register_buffer("fixed", fixed.detach().clone(memory_format=torch.contiguous_format))
        self.dim = dim

    @property
    def weight(self) -> torch.Tensor:
        """(2 r, in) for A, (out, 2 r) for B."""
        return torch.cat([self.free, self.fixed], self.dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)
