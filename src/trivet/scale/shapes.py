"""Model shapes that can be planned without their files: published sizes, as transformers' configs."""

from __future__ import annotations

import re
from typing import Any

from trivet.errors import ConfigError
from trivet.model import explained, locate

#: hidden_size, layers, heads, key-value heads, intermediate_size, vocabulary, whether embeddings are tied.
_LLAMA: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "llama-3.2-1b": (2048, 16, 32, 8, 8192, 128256, True),
    "llama-3.2-3b": (3072, 28, 24, 8, 8192, 128256, True),
    "llama-3-8b": (4096, 32, 32, 8, 14336, 128256, False),
    "llama-3-70b": (8192, 80, 64, 8, 28672, 128256, False),
    "llama-3.1-8b": (4096, 32, 32, 8, 14336, 128256, False),
    "llama-3.1-70b": (8192, 80, 64, 8, 28672, 128256, False),
    "llama-3.1-405b": (16384, 126, 128, 8, 53248, 128256, False),
    "mistral-7b-v0.3": (4096, 32, 32, 8, 14336, 32768, False),
}
_QWEN2 = {
    "qwen2.5-0.5b": (896, 24, 14, 2, 4864, 151936, True),
    "qwen2.5-7b": (3584, 28, 28, 4, 18944, 152064, False),
    "qwen2.5-14b": (5120, 48, 40, 8, 13824, 152064, False),
    "qwen2.5-32b": (5120, 64, 40, 8, 27648, 152064, False),
    "qwen2.5-72b": (8192, 80, 64, 8, 29568, 152064, False),
}
#: Names that need no files: the sizes in the models' public configs.
PUBLIC = (*_LLAMA, *_QWEN2)


def public_shape(name: str) -> Any:
    """transformers' config of a public shape, by its name or hub id; None where it is unknown."""
    key = re.sub(r"^meta-|-(instruct|chat|base)$", "", name.rpartition("/")[2].lower())
    if key not in PUBLIC:
        return None
    from transformers import LlamaConfig, Qwen2Config

    build, table = (LlamaConfig, _LLAMA) if key in _LLAMA else (Qwen2Config, _QWEN2)
    width, layers, heads, shared, inner, vocabulary, tied = table[key]
    return build(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        intermediate_size=inner,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=131072,
    )


def model_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """A model's transformers config: a public shape, or read as `trivet train` would, without the weights.

    Raises:
        ConfigError: no such model.
    """
    if (known := public_shape(name)) is not None:
        return known
    try:
        where, gguf = locate(name)
        options = {"revision": revision, "gguf_file": gguf}
        with explained(name):
            from transformers import AutoConfig

            given = {key: value for key, value in options.items() if value}
            return AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code, **given)
    except ConfigError as error:
        raise ConfigError(f"{error}. Shapes that need no files: {', '.join(PUBLIC)}") from error
