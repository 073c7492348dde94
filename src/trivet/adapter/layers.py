"""The vocabulary of the three legs: `AdaptedLayer`, one layer's low-rank update without a word of PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trivet.adapter.forms import Core, Frozen, Offset, TensorCore


@dataclass(frozen=True)
class AdaptedLayer:
    """One adapted layer: it computes x W^T + s (x A^T) B^T.

    A view, not a copy: after a change of rank the same object shows the new factors.

    Attributes:
        name: the layer's path in the base model, e.g. "model.layers.0.self_attn.q_proj".
        scale: s = alpha / r; it never changes.
        module: PEFT's layer; only `trivet.adapter` looks inside.
        adapter: PEFT's name of the adapter.
    """

    name: str
    scale: float
    module: Any
    adapter: str = "default"

    @property
    def embedding(self) -> bool:
        """Whether inputs are token ids: x is one-hot, in_features the number of tokens."""
        return self.adapter in getattr(self.module, "lora_embedding_A", ())

    def _factor(self, side: str) -> Any:
        if self.embedding:
            return getattr(self.module, f"lora_embedding_{side}")[self.adapter]
        return getattr(self.module, f"lora_{side}")[self.adapter]

    def _read(self, side: str) -> torch.Tensor:
        factor = self._factor(side)
        if isinstance(factor, torch.Tensor):
            return factor
        return factor.free if isinstance(factor, Offset) else factor.weight

    @property
    def A(self) -> torch.Tensor:  # noqa: N802 - the field's name
        """(r, in_features): a Parameter where it is trained, else a plain tensor."""
        return self._read("A")

    @property
    def B(self) -> torch.Tensor:  # noqa: N802
        """(out_features, r): a Parameter where it is trained itself; basis · core (differentiable) where a core is."""
        return self._read("B")

    @property
    def core(self) -> nn.Parameter | None:
        """The trained core of `core`-like decompositions, (r, r), or (layers, columns, rows) where it is shared."""
        factor = self._factor("B")
        return factor.core if isinstance(factor, Core) else None

    @property
    def basis(self) -> torch.Tensor:
        """The frozen left basis of a core, (out_features, r): B = basis · core."""
        return self._factor("B").basis

    @property
    def form(self) -> str:
        """`plain`, `core`, `tensor-core` (shared between layers) or `offset` (B A − B0 A0)."""
        factor = self._factor("B")
        kinds = {TensorCore: "tensor-core", Core: "core", Offset: "offset"}
        return kinds.get(type(factor), "plain")

    @property
    def rank(self) -> int:
        """r, the number of directions that are trained."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of W."""
        factor = self._factor("B")
        out = factor.basis.shape[0] if isinstance(factor, Core) else self._read("B").shape[0]
        return out, self.A.shape[1]

    @property
    def weight(self) -> torch.Tensor:
        """The base layer's W, (out_features, in_features); a quantised one is dequantised."""
        from peft.utils.integrations import dequantize_module_weight

        base = self.module.get_base_layer()
        w = dequantize_module_weight(base).detach()
        transposed = self.embedding or bool(getattr(self.module, "fan_in_fan_out", False))
        return w.T if transposed else w

    def trained(self) -> list[nn.Parameter]:
        """The parameters of this layer's factors that are trained (not DoRA's magnitude, which is no factor)."""
        parts = [self._factor(side) for side in "AB"]
        found = [p for part in parts for p in ([part] if isinstance(part, nn.Parameter) else part.parameters())]
        return [p for p in found if p.requires_grad]

    def tensors(self) -> list[torch.Tensor]:
        """All that the factors hold, trained or frozen."""
        parts = [self._factor(side) for side in "AB"]
        return [t for p in parts for t in ([p] if isinstance(p, nn.Parameter) else [*p.parameters(), *p.buffers()])]

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(A, B) of the whole update ΔW = s B A, detached: of rank 2 r for an offset."""
        parts = [self._factor(side) for side in "AB"]
        a, b = (p if isinstance(p, torch.Tensor) else p.weight for p in parts)
        return a.detach(), b.detach()

    def delta(self) -> torch.Tensor:
        """ΔW = s B A, (out_features, in_features) in float32."""
        a, b = self.factors()
        return self.scale * (b.float() @ a.float())

    # -- starts: only `trivet.decompose` calls these, once, before anything is trained -----------------------

    def set_factors(self, a: torch.Tensor, b: torch.Tensor | None = None) -> None:
        """Copy values into plain factors; b = None is zero."""
        with torch.no_grad():
            self.A.copy_(a)
            self.B.zero_() if b is None else self.B.copy_(b)

    def set_core(self, left: torch.Tensor, right: torch.Tensor, core: torch.Tensor | None = None) -> None:
        """ΔW = s · left · core · right with left (out, r) and right (r, in) frozen; core = None is zero."""
        left, right = left.to(self.A), right.to(self.A)
        start = left.new_zeros(left.shape[1], right.shape[0]) if core is None else core.to(self.A)
        self._replace(Frozen(right), Core(left, start))

    def share_core(self, left: torch.Tensor, right: torch.Tensor, core: nn.Parameter, index: int) -> None:
        """As `set_core`, with a core (p, columns, rows) shared by the p layers of a stack; see `TensorCore`."""
        shared = Frozen(right[:0])
        shared.weight = right  # one tensor for the whole stack
        self._replace(shared, TensorCore(left, core, index))

    def set_offset(self, a0: torch.Tensor, b0: torch.Tensor) -> None:
        """Train B A − B0 A0 from A = A0, B = B0: the base model is unchanged at the start."""
        a, b = a0.to(self.A), b0.to(self.A)
        self._replace(Offset(a, a, 0), Offset(b, -b, 1))

    def freeze_A(self) -> None:  # noqa: N802
        """Train B alone."""
        if self.embedding:
            self._factor("A").requires_grad_(False)
        elif isinstance(self._factor("A"), nn.Linear):
            self.module.lora_A[self.adapter] = Frozen(self.A)
        elif isinstance(self._factor("A"), Offset):
            self._factor("A").free.requires_grad_(False)

    def _replace(self, a: nn.Module, b: nn.Module) -> None:
        if self.embedding:
            raise ValueError(f"layer {self.name}: an embedding's factors are plain matrices")
        self.module.lora_A[self.adapter], self.module.lora_B[self.adapter] = a, b


@dataclass(frozen=True)
class Change:
    """New factors of one layer, as maps of the old ones: B' = B left, A' = rightᵀ A, and then `rows` below A.

    Attributes:
        left: (r, k); left @ right.T is the identity where nothing is dropped (k = r), else a projector.
        right: (r, k).
        rows: (j, in_features), new directions: appended to A, with zeros in B, so that ΔW stays as it is.
    """

    left: torch.Tensor
    right: torch.Tensor
    rows: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """The new rank; 0 makes the layer leave."""
        return self.left.shape[1] + (0 if self.rows is None else self.rows.shape[0])


def adapted_layers(model: nn.Module, adapter: str = "default") -> list[AdaptedLayer]:
    """Every layer with a LoRA update named `adapter`, in the model's order."""

    def found() -> Iterator[AdaptedLayer]:
        module: Any  # PEFT's layers carry dictionaries by adapter name
        for path, module in model.named_modules():
            if adapter in getattr(module, "lora_A", ()) or adapter in getattr(module, "lora_embedding_A", ()):
                name = path.removeprefix("base_model.model.")
                yield AdaptedLayer(name, float(module.scaling[adapter]), module, adapter)

    return list(found())
