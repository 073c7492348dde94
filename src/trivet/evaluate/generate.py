"""Answers written by the model, in batches of similar length."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from trivet.data.batch import Collator, to_device
from trivet.data.encode import Encoded
from trivet.evaluate.score import batches, evaluating
from trivet.head import unwrapped


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int = 128,
    batch_size: int = 16,
    temperature: float = 0.0,
    top_p: float = 1.0,
    streamer: Any = None,
    progress: Callable[[int], None] | None = None,
    read: Callable[[list[int], int], dict[str, Any]] | None = None,
) -> list[str]:
    """Continue each prompt (token ids) until a stop token or `max_new_tokens`; greedy at temperature 0.

    An answer also ends at the last position that the model knows. `read` has the model read prompts in its own way: of
    those that make a batch, padded to a length, it gives what `model.generate` takes in place of reading them.

    Returns the new text only, special tokens left out, in the order of `prompts`.
    """
    from transformers import GenerationConfig

    seq2seq = bool(model.config.is_encoder_decoder)
    holder = unwrapped(model)
    own = holder.generation_config
    start = getattr(own, "decoder_start_token_id", None) if seq2seq else None
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        eos_token_id=list(stop_ids),
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=start if start is not None else getattr(model.config, "decoder_start_token_id", None),
        forced_bos_token_id=own.forced_bos_token_id if seq2seq else None,  # a translator's target language
        use_cache=True,
        **({"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}),
    )
    positions = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    collate = Collator(tokenizer.pad_token_id, side="right" if seq2seq else "left")
    answers = [""] * len(prompts)
    rows = [Encoded(input_ids=prompt) for prompt in prompts]
    # In place of the checkpoint's own settings (beams, penalties, lengths), which transformers would mix in.
    holder.generation_config = settings
    try:
        with evaluating(model):
            for indices in batches(rows, batch_size):
                batch = to_device(collate([rows[i] for i in indices]), model.device)
                taken = 1 if seq2seq else len(prompts[indices[0]])
                settings.max_new_tokens = min(max_new_tokens, positions - taken)
                known = read(indices, batch["input_ids"].shape[1]) if read is not None else {}
                out = model.generate(**batch, **known, generation_config=settings, streamer=streamer)
                new = out if seq2seq else out[:, batch["input_ids"].shape[1] :]
                for index, text in zip(indices, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                    answers[index] = text.strip()
                if progress is not None:
                    progress(len(indices))
    finally:
        holder.generation_config = own
    return answers
