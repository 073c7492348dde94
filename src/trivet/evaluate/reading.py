"""One reading of a row for its score and for an answer, which goes on from what the model has kept of the prompt."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutput

from trivet.data.encode import Encoded
from trivet.evaluate.score import Scorer
from trivet.head import unwrapped

#: Rotary positions that are turned otherwise in longer texts: what was kept while reading an answer would not fit.
_BY_LENGTH = ("dynamic", "longrope")


def reads_once(model: Any, rows: Sequence[Encoded], prompts: Sequence[list[int]]) -> bool:
    """Whether answers to `prompts` can go on from what `model` keeps of `rows`, one each, that it has scored.

    A row has to begin with its prompt. An encoder sees all of it at each token, so there it has to be no longer.
    """
    whole = bool(model.config.is_encoder_decoder)
    begin = (row["input_ids"][: None if whole else len(prompt)] for row, prompt in zip(rows, prompts, strict=True))
    return (whole or _new_cache(model) is not None) and all(map(operator.eq, begin, prompts))


def read(scorer: Scorer, indices: Sequence[int], lengths: Sequence[int], room: int) -> dict[str, Any]:
    """Score a batch of rows, and give what the model takes in place of reading their prompts once more.

    Args:
        indices: the batch's rows.
        lengths: tokens of each row's prompt, with which the row begins.
        room: the length to which prompts are padded on the left for what follows; those of an encoder-decoder are
            padded as they are scored.

    Returns:
        What its encoder made of them, or a cache of all but their last tokens.
    """
    held: dict[str, Any] = {}
    if not scorer.model.config.is_encoder_decoder:
        cache = held["past_key_values"] = _new_cache(scorer.model)
        scorer.score(indices, lambda batch: {**batch, "past_key_values": cache, "use_cache": True})
        _move_to_end(cache, [length - 1 for length in lengths], room - 1)
        return held
    encode = unwrapped(scorer.model).get_encoder()

    def encoded(batch: dict[str, Any]) -> dict[str, Any]:
        prompt = {name: batch[name] for name in ("input_ids", "attention_mask")}
        held["encoder_outputs"] = encode(**prompt, return_dict=True)
        return {**batch, **held}

    scorer.score(indices, encoded)
    return held


def score_endings(
    scorer: Scorer, indices: Sequence[int], lengths: Sequence[int], others: Sequence[Sequence[Encoded]]
) -> list[np.ndarray]:
    """Score a batch of rows, and for each of them others that begin with the same prompt, which is read once.

    Args:
        indices: the batch's rows.
        lengths: tokens of each row's prompt.
        others: the other rows of each.

    Returns:
        The negative log-likelihoods of each row's others, in nats.
    """
    room, whole = max(lengths), scorer.model.config.is_encoder_decoder
    held = read(scorer, indices, lengths, room)
    owner = torch.tensor([place for place, rows in enumerate(others) for _ in rows])
    starts = [0 if whole else lengths[place] - 1 for place in owner.tolist()]
    flat = [row for rows in others for row in rows]
    ends = [
        row if whole else Encoded(input_ids=row["input_ids"][start:], labels=row["labels"][start:])
        for row, start in zip(flat, starts, strict=True)
    ]

    def going_on(batch: dict[str, Any]) -> dict[str, Any]:
        device = batch["input_ids"].device
        if whole:
            states = held["encoder_outputs"].last_hidden_state
            return {**batch, "encoder_outputs": BaseModelOutput(last_hidden_state=states[owner.to(states.device)])}
        cache, first = held["past_key_values"], torch.tensor(starts, device=device)[:, None]
        cache.batch_select_indices(owner.to(device))
        known = torch.arange(room - 1, device=device) >= room - 1 - first
        return {
            **batch,
            "past_key_values": cache,
            "use_cache": True,
            "attention_mask": torch.cat([known.long(), batch["attention_mask"]], 1),
            "position_ids": first + torch.arange(batch["input_ids"].shape[1], device=device),
        }

    found = Scorer(scorer.model, ends, scorer.collator, scorer.task)
    found.score(range(len(ends)), going_on)
    return np.split(found.out[0], np.cumsum([len(rows) for rows in others])[:-1])


def _new_cache(model: Any) -> DynamicCache | None:
    """An empty cache for a key and a value of every token in every layer; None for models that keep other things.

    Those look back through windows or keep states, or don't take a token's position as an argument, so that what they
    have kept of a padded batch could not be moved.
    """
    inner = unwrapped(model)
    config = inner.config.get_text_config(decoder=True)
    if not {"past_key_values", "position_ids"} <= inspect.signature(inner.forward).parameters.keys():
        return None
    if any(name in repr(getattr(config, "rope_parameters", None)) for name in _BY_LENGTH):
        return None
    cache = DynamicCache(config=config)
    return cache if cache.layers and all(type(layer) is DynamicLayer for layer in cache.layers) else None


def _move_to_end(cache: Any, lengths: Sequence[int], room: int) -> None:
    """Keep each row's first entries only, at the end of `room` places, as if its prompt had been padded on the left.

    Args:
        cache: of rows that were read with padding on the right.
        lengths: how many entries to keep of each row, at most `room`; what is before them afterwards has to be masked.
    """
    places = (torch.arange(room) + torch.tensor(lengths)[:, None] - room).clamp(min=0)[:, None, :, None]
    for layer in cache.layers:
        for name in ("keys", "values"):
            kept = getattr(layer, name)
            index = places.to(kept.device).expand(-1, kept.shape[1], -1, kept.shape[3])
            setattr(layer, name, kept.gather(2, index))
