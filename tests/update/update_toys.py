"""A two-layer linear regression whose solution is a low-rank change, adapted by PEFT, with a trained head and bias."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from trivet.adapter.layers import AdaptedLayer, adapted_layers
from trivet.methods import find_method

RULES = ("adamw", "lora_plus", "frozen_a", "preconditioned", "equivariant", "pro", "muon")


class Toy:
    """Model, layers, rest and a stream of losses, all from one seed."""

    def __init__(
        self, *, rank: int = 4, dtype: torch.dtype = torch.float32, cores: bool = False, b: float = 0.0
    ) -> None:
        torch.manual_seed(0)
        body = nn.Sequential(nn.Linear(12, 10, bias=False), nn.Linear(10, 14, bias=False), nn.Linear(14, 8)).to(dtype)
        wanted = nn.Sequential(*(nn.Linear(m.in_features, m.out_features, bias=False, dtype=dtype) for m in body))
        with torch.no_grad():
            for m, goal in zip(body, wanted, strict=True):
                out, inside = m.weight.shape
                goal.weight.copy_(
                    m.weight + 0.3 * torch.randn(out, 2, dtype=dtype) @ torch.randn(2, inside, dtype=dtype)
                )
        self.model = get_peft_model(
            body, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0", "1"], modules_to_save=["2"])
        )
        self.layers = adapted_layers(self.model)
        for layer in self.layers:
            if cores:
                out, inside = layer.shape
                layer.set_core(torch.randn(out, rank), torch.randn(rank, inside))
            elif b:
                with torch.no_grad():
                    layer.B.copy_(b * torch.randn_like(layer.B))
        self.wanted, self.dtype = wanted, dtype
        self.draw = torch.Generator().manual_seed(1)

    @property
    def rest(self) -> list[tuple[str, Any]]:
        named = self.model.named_parameters()
        return [(name, p) for name, p in named if p.requires_grad and "lora_" not in name]

    def optimizer(self, rule: str, **options: Any) -> torch.optim.Optimizer:
        part: Callable[..., torch.optim.Optimizer] = find_method({"update": rule}).part("update")
        return part(self.layers, self.rest, **{"learning_rate": 1e-2, "weight_decay": 0.1} | options)

    def loss(self) -> torch.Tensor:
        x = torch.randn(32, 12, dtype=self.dtype, generator=self.draw)
        return ((self.model(x) - self.wanted(x)) ** 2).mean()

    def backward(self) -> float:
        loss = self.loss()
        loss.backward()
        return loss.item()

    def train(self, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            losses.append(self.backward())
            optimizer.step()
            optimizer.zero_grad()
        return losses

    def trained(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}


def product(layer: AdaptedLayer) -> torch.Tensor:
    return layer.B.detach() @ layer.A.detach()
