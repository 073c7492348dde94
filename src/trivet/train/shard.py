"""FSDP2 for the frozen base model: each process keeps a part of every transformer block, and the adapter as a whole.

What FSDP saves is memory for weights, and an adapter has few: left out of it, its gradients are summed as they always
are, ranks may change, and a checkpoint is the same file whatever number of processes wrote it.
"""

from __future__ import annotations

from typing import Any

from trivet.errors import ConfigError
from trivet.four_bit import in_four_bit


def shard(model: Any) -> None:
    """Share the blocks' frozen weights out over the processes, in place; all others stay whole in each.

    Raises:
        ConfigError: the model's class does not say what its blocks are, or its weights are in 4 bits.
    """
    from torch.distributed.fsdp import fully_shard

    base = model.get_base_model()
    if in_four_bit(base):
        raise ConfigError(
            "FSDP: weights in 4 bits can't be shared out yet; set model.load_in_4bit: false, or leave FSDP"
        )
    kinds = set(base._no_split_modules or ())
    blocks = [module for module in base.modules() if type(module).__name__ in kinds]
    if not blocks:
        raise ConfigError(f"FSDP: {type(base).__name__} does not say what its blocks are; train it without FSDP")
    learned = {p for p in model.parameters() if p.requires_grad}
    for block in blocks:
        fully_shard(block, reshard_after_forward=True, ignored_params=learned)
