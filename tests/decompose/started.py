"""Tiny adapted models for the decompositions' tests, and exact statistics of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from conftest import tiny_model
from trivet.adapter.layers import AdaptedLayer, adapted_layers
from trivet.adapter.statistics import LayerStatistics
from trivet.parts import PARTS

#: Every decomposition with the choices of its options: name, options.
STARTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in PARTS["decompose"]),
    ("core", {"bases": "gradient"}),
    ("tensor_cur", {"choose": "gradient"}),
]


def adapted(kind: str, rank: int = 4, **config: Any) -> Any:
    """A tiny llama or gpt2 with PEFT's own LoRA of all linear layers, at a scale of 2."""
    options = {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | config
    return get_peft_model(tiny_model(kind, 64), LoraConfig(**options)).eval()


def token_ids(rows: int = 6, length: int = 20) -> torch.Tensor:
    """Random token ids, alike in every call."""
    return torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(3))


def begin(name: str, model: Any, seed: int = 1, **options: Any) -> list[AdaptedLayer]:
    """Start the model's layers by the decomposition `name`, with exact statistics of it."""
    layers = adapted_layers(model)
    statistics = {name: probe.statistics for name, probe in observe(model).items()}
    PARTS["decompose"][name].load()(layers, torch.Generator().manual_seed(seed), statistics, **options)
    return layers


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


def fit(model: Any, steps: int, lr: float) -> tuple[float, float]:
    """AdamW on the tiny model's language-model loss of fixed rows; the loss before and after."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    losses = []
    for _ in range(steps + 1):
        loss = model(input_ids=token_ids(), labels=token_ids()).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses[0], losses[-1]


@dataclass(frozen=True)
class Observed:
    """A layer's inputs x (tokens, in), the mean loss's gradients g (tokens, out), and statistics of these alone."""

    x: torch.Tensor
    g: torch.Tensor

    @property
    def statistics(self) -> LayerStatistics:
        """With Ω and Ψ the identity, so that the sketches are the whole matrices."""
        x, g = self.x, self.g
        gradient = g.T @ x
        return LayerStatistics(
            inputs=x.square().mean(0),
            outputs=g.square().sum(0) * len(token_ids()),
            input_mean=x.mean(0),
            input_sketch=x.T @ x / len(x),
            gradient_right=gradient,
            gradient_left=gradient.T,
            omega=torch.eye(x.shape[1]),
            psi=torch.eye(g.shape[1]),
        )


def observe(model: Any) -> dict[str, Observed]:
    """What every layer takes in and is told by one backward pass, by the layer's name."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def hook(name: str) -> Any:
        def keep(module: Any, inputs: Any, output: torch.Tensor) -> None:
            output.retain_grad()
            seen[name] = (inputs[0].detach(), output)

        return keep

    handles = [layer.module.register_forward_hook(hook(layer.name)) for layer in adapted_layers(model)]
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return {name: Observed(x.flatten(0, -2), y.grad.flatten(0, -2)) for name, (x, y) in seen.items()}


def same_span(rows: torch.Tensor, others: torch.Tensor) -> float:
    """The cosine of the largest angle between two row spaces of one dimension: 1 where they are the same."""
    p, q = (torch.linalg.qr(m.detach().double().T).Q for m in (rows, others))
    return torch.linalg.svdvals(p.T @ q).min().item()
