"""What a model's tokenizer must have."""

from __future__ import annotations

from typing import Any

from trivet.errors import ModelError


def check_tokenizer(tokenizer: Any, name: str) -> None:
    """Where the files are missing, transformers makes up a tokenizer of special tokens alone."""
    if len(tokenizer) - len(tokenizer.added_tokens_decoder) < 2:
        raise ModelError(f"model {name}: has no tokenizer: its vocabulary (tokenizer.json) is missing; save it there")


def ensure_pad(tokenizer: Any, name: str) -> None:
    """Padding needs a token; the attention mask hides it and labels are masked apart, so any token does."""
    if tokenizer.pad_token_id is None:
        stand_in = tokenizer.eos_token or tokenizer.unk_token
        if stand_in is None:
            raise ModelError(f"model {name}: its tokenizer has no padding, end-of-sequence or unknown token; set one")
        tokenizer.pad_token = stand_in
