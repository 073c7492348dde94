"""What the sides of `bench/speed.py` train, the same for all of them: models, and random tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

#: Llama architectures with random weights, for GPUs, with the shapes of SmolLM2 135M (0.1b), Llama 3.2 1B and 3.1 8B.
SIZES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True},
    "0.1b": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    "0.5b": {"hidden_size": 1280, "intermediate_size": 3584, "num_hidden_layers": 24, "num_attention_heads": 20,
             "num_key_value_heads": 4, "vocab_size": 49152, "tie_word_embeddings": True},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
}  # fmt: skip


def causal_model(spec: dict[str, Any], dtype: str) -> Any:
    """The language model that every side trains: demo's weights, or random ones of GPT-2's or another size."""
    from trivet.model import load_base, pick_dtype

    if spec.get("random") == "gpt2":
        return gpt2(spec, pick_dtype(dtype, torch.device(spec["device"])))
    if not spec["size"]:
        return load_base(spec["base"], task="causal-lm", dtype=dtype, device=spec["device"]).model
    return llama(spec, pick_dtype(dtype, torch.device(spec["device"])))


def llama(spec: dict[str, Any], dtype: torch.dtype) -> Any:
    """Random weights of a size."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SIZES[spec["size"]], max_position_embeddings=8192, use_cache=False, dtype=dtype)
    return random_model(LlamaForCausalLM, config, dtype, spec["device"])


def save_llama(spec: dict[str, Any], dtype: torch.dtype, folder: str) -> None:
    """Random weights of a size, as files."""
    llama(spec, dtype).save_pretrained(folder)


def gpt2(spec: dict[str, Any], dtype: torch.dtype) -> Any:
    """Random weights of GPT-2's size (124M), with its dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    small = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 512} if spec["size"] == "tiny" else {}
    return random_model(GPT2LMHeadModel, GPT2Config(**small, use_cache=False), dtype, spec["device"])


def random_model(kind: Any, config: Any, dtype: torch.dtype, device: str) -> Any:
    """A model with random weights, the same for one seed, made where it will be."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return kind(config)
    finally:
        torch.set_default_dtype(before)


def numbers(model: nn.Module) -> dict[str, int]:
    """Weights that are multiplied by every token: frozen ones (with the head, without embeddings), and trained ones."""
    linear = [m.weight for m in model.modules() if isinstance(m, (nn.Linear, Conv1D))]
    return {
        "frozen": sum(w.numel() for w in linear if not w.requires_grad),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def random_ids(step: int, rows: int, length: int, vocabulary: int, device: str) -> torch.Tensor:
    """(rows, length) token ids, the same for every side in the same step."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(5, vocabulary, (rows, length), generator=generator).to(device)
