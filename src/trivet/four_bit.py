"""Frozen linear layers with their weights in 4 bits (QLoRA's base model; Dettmers et al. 2023, arXiv 2305.14314).

A layer holds codes and scales, and makes its weight anew for every product: an eighth of float32's memory for about a
tenth of a training step's time. What is trained, saved, proved and merged is relative to these weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from trivet.kernels.nf4 import dequantise, quantise
from trivet.kernels.product import linear


class FourBitLinear(nn.Linear):
    """y = x Wᵀ + bias with W (out_features, in_features) in NF4; the gradient reaches x alone.

    Attributes:
        like: (0,), of the type and on the device that `weight` is made in; it follows `.to()` and `.float()`.
        codes, scales: of W, see `trivet.kernels.nf4`; the bits of the scales, as whole numbers, which are never cast.
    """

    def __init__(self, weight: torch.Tensor, bias: nn.Parameter | None, kind: type[nn.Module] = nn.Linear) -> None:
        """`kind` is the layer's own class, Linear or Conv1D."""
        nn.Module.__init__(self)  # a Linear's own would make a weight
        self.kind = kind
        self.out_features, self.in_features = weight.shape
        codes, scales = quantise(weight)
        self.like = nn.Parameter(weight.new_empty(0), requires_grad=False)  # first: what looks for a type finds it
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scales = nn.Parameter(scales.view(torch.int16), requires_grad=False)
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """W, made anew each time: changing it changes nothing."""
        return self.weight_in(self.like.dtype)

    def weight_in(self, dtype: torch.dtype) -> torch.Tensor:
        """W in `dtype`."""
        scales = self.scales.view(torch.bfloat16)
        return dequantise(self.codes, scales, (self.out_features, self.in_features), dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return linear(input, self.weight_in, self.bias)

    def plain(self) -> nn.Module:
        """A layer of the original class that computes the same."""
        conv = self.kind is Conv1D
        with torch.device("meta"):  # a Conv1D's arguments stand the other way round
            sizes = (self.out_features, self.in_features) if conv else (self.in_features, self.out_features)
            layer: Any = self.kind(*sizes)
        weight = self.weight.T.contiguous() if conv else self.weight
        layer.weight, layer.bias = nn.Parameter(weight, requires_grad=False), self.bias
        return layer


def to_four_bit(model: Any, left: Iterable[str] = (), device: torch.device | None = None) -> None:
    """Put the linear layers of a loaded model into 4 bits, in place and one after the other, on `device`.

    Left as they are: the output head, a layer that shares its weight with another module (tied embeddings), and the
    parts named in `left` with all that is in them. So are embeddings, and experts that are one tensor a layer. They are
    copied: on CPUs all weights of a model may lie in one mapped file, which stays in memory while any of it is in use.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    apart = tuple(left)
    for parent_name, parent in list(model.named_modules()):
        for name, module in list(parent.named_children()):
            path = f"{parent_name}.{name}".lstrip(".")
            if type(module) not in (nn.Linear, Conv1D) or module is head or users[id(module.weight)] > 1:
                continue
            if any(path == part or path.startswith(f"{part}.") for part in apart):
                continue
            weight: Any = module.weight.to(device)
            upright = weight.T if isinstance(module, Conv1D) else weight
            setattr(parent, name, FourBitLinear(upright, module.bias, type(module)))
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


def to_plain(model: nn.Module) -> None:
    """Put ordinary layers that compute the same in the place of those in 4 bits."""
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, FourBitLinear):
                setattr(parent, name, module.plain())


def in_four_bit(model: nn.Module) -> list[FourBitLinear]:
    """The layers in 4 bits."""
    return [module for module in model.modules() if isinstance(module, FourBitLinear)]


def count_parameters(model: nn.Module) -> int:
    """How many numbers a model has; a weight in 4 bits counts as the numbers that it stands for."""
    stored = sum(p.numel() for p in model.parameters())
    layers = in_four_bit(model)
    return stored + sum(x.out_features * x.in_features - x.codes.numel() - x.scales.numel() for x in layers)
