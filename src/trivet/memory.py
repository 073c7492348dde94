"""How much memory this process holds and held: of the GPU where there is one, else resident memory."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import psutil
import torch


def current_memory() -> int:
    """Bytes held now."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.memory_allocated())
    return int(psutil.Process().memory_info().rss)


def gib(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / 2**30:.1f} GiB"


def peak_memory() -> int:
    """The most bytes held since the process began."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)  # macOS counts bytes, Linux KiB


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on `device` now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


@dataclass(frozen=True)
class Estimate:
    """Bytes that training will hold, by what for."""

    weights: int
    adapter: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.adapter + self.activations

    def __str__(self) -> str:
        parts = (("weights", self.weights), ("adapter and optimizer", self.adapter), ("activations", self.activations))
        return ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in parts)


def estimate(model: Any, *, rows: int, length: int, checkpointing: bool) -> Estimate:
    """A rough estimate for `rows` rows of `length` tokens in one micro-step.

    Activations: 34 bytes a token, layer and hidden unit in 16 bits (Korthikanti et al. 2022, arXiv 2205.05198,
    section 4.1, without the attention matrix, which is never stored), doubled in 32 bits, and the logits. Adapter
    parameters cost 16 bytes each: fp32 value, gradient and Adam's two moments.
    """
    config = model.config
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    width = int(getattr(config, "hidden_size", 0) or getattr(config, "d_model", 0))
    layers = getattr(config, "num_hidden_layers", 0) * (2 if config.is_encoder_decoder else 1)
    size = 2 if model.dtype in (torch.bfloat16, torch.float16) else 4
    per_token = (2 if checkpointing else 17) * size * width * layers + (34 * width if checkpointing else 0)
    head = model.get_output_embeddings()
    per_token += 3 * size * head.out_features if isinstance(head, torch.nn.Linear) else 0
    return Estimate(weights, 16 * trained, rows * length * per_token)
