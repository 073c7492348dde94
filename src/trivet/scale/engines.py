"""What a way of spreading a run over GPUs holds on each, sends, and takes.

Rings and trees are counted as in Thakur et al. 2005 (https://doi.org/10.1177/1094342005051521): an all-gather or
reduce-scatter of S bytes over k GPUs sends S (k - 1) / k from each, an all-reduce twice as much.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trivet.scale.adapter import AdapterSize
from trivet.scale.machines import HOP, REACHED, USABLE, Gpu
from trivet.scale.trace import Trace


@dataclass(frozen=True)
class Setting:
    """A way of spreading a run.

    Attributes:
        gpus: all of them.
        shards: GPUs that share one copy of the weights; 1 for DDP and for one GPU.
        checkpointing: whether activations are computed again in the backward pass.
    """

    gpus: int
    shards: int
    checkpointing: bool

    @property
    def copies(self) -> int:
        """Copies of the weights."""
        return self.gpus // self.shards

    @property
    def name(self) -> str:
        if self.gpus == 1:
            return "one GPU"
        if self.shards == 1:
            return "DDP"
        return f"FSDP2 {self.shards:,}" + (f" x {self.copies:,}" if self.copies > 1 else "")


@dataclass(frozen=True)
class Cost:
    """What a setting costs each GPU.

    Attributes:
        held: bytes by what for.
        sent: bytes that leave each GPU in an optimizer step, by what for.
        compute: seconds of an optimizer step's matrix products.
        communication: seconds of a step's collectives, were they alone.
        fits: whether `held` is at most the usable memory.
        tokens: of a step, on all GPUs.
        room: rows of a micro-batch that would fit.
    """

    setting: Setting
    held: dict[str, int]
    sent: dict[str, int]
    compute: float
    communication: float
    fits: bool
    tokens: int
    room: int

    @property
    def total(self) -> int:
        """Bytes held."""
        return sum(self.held.values())

    @property
    def step(self) -> float:
        """Seconds of an optimizer step where communication hides behind computing as far as it can."""
        return max(self.compute, self.communication)

    @property
    def longest(self) -> float:
        """Seconds of an optimizer step where nothing hides."""
        return self.compute + self.communication

    @property
    def rate(self) -> float:
        """Tokens a second on all GPUs."""
        return self.tokens / self.step


def cost(
    setting: Setting, trace: Trace, adapter: AdapterSize, gpu: Gpu, *, rows: int, accumulation: int, mfu: float
) -> Cost:
    """What `setting` costs.

    Args:
        trace: one micro-step on one GPU, of `rows` rows.
        accumulation: micro-steps of an optimizer step.
        mfu: share of the GPU's peak that the counted products reach while they run.
    """
    k = setting.shards
    activations = trace.activations(setting.checkpointing)
    held = {"weights": -(-trace.weights // k)}
    if k > 1:  # what is gathered: the block under way, the next one, and for the whole step what is outside of blocks
        held["gathered weights"] = min(2 * trace.block_weights + trace.outer_weights, trace.weights)
    held |= {"adapter": -(-adapter.factors // k), "gradients": -(-adapter.gradients // k)}
    held |= {"optimizer": -(-adapter.optimizer // k), "activations": activations}
    usable = USABLE * gpu.memory
    fixed = sum(held.values()) - activations
    per_row = (activations - trace.working) / rows
    sent, seconds = communication(setting, trace, adapter, gpu, accumulation)
    return Cost(
        setting=setting,
        held=held,
        sent=sent,
        compute=accumulation * trace.flops(setting.checkpointing) / (mfu * gpu.flops),
        communication=seconds,
        fits=sum(held.values()) <= usable,
        tokens=trace.tokens * accumulation * setting.gpus,
        room=max(0, int((usable - fixed - trace.working) / per_row)),
    )


def communication(
    setting: Setting, trace: Trace, adapter: AdapterSize, gpu: Gpu, accumulation: int
) -> tuple[dict[str, int], float]:
    """Bytes that leave each GPU in an optimizer step by what for, and the collectives' seconds.

    Sharded weights are gathered twice a micro-step, for the forward and for the backward pass. Frozen weights have no
    gradients, so only the adapter's are reduced, once a step.
    """
    k, copies = setting.shards, setting.copies
    sent: dict[str, int] = {}
    seconds = 0.0
    if k > 1:
        passes = 2 * accumulation
        share = (k - 1) / k
        sent["weights"] = int(passes * share * (trace.weights + adapter.factors))
        sent["gradients"] = int(share * adapter.gradients)
        collectives = passes * (trace.blocks + 1) + trace.blocks
        seconds += (sent["weights"] + sent["gradients"]) / ring_speed(k, gpu) + collectives * (k - 1) * HOP
    if copies > 1:
        reduced = int(2 * (copies - 1) / copies * adapter.gradients / k)
        sent["gradients"] = sent.get("gradients", 0) + reduced
        one_each = REACHED * (gpu.link if setting.gpus <= gpu.in_machine else gpu.network)
        speed = ring_speed(copies, gpu) if k == 1 else one_each
        seconds += reduced / speed + 2 * math.ceil(math.log2(copies)) * HOP
    return sent, seconds


def ring_speed(members: int, gpu: Gpu) -> float:
    """Bytes/s that a ring over neighbouring GPUs reaches: across machines all network cards of a machine take part."""
    if members <= gpu.in_machine:
        return REACHED * gpu.link
    return REACHED * min(gpu.link, gpu.network * gpu.in_machine)


def settings(gpus: int, gpu: Gpu) -> list[Setting]:
    """What is worth comparing: one copy a GPU, one a machine, one in some machines, one in all; the simplest first."""
    shards = [1]
    size = min(gpu.in_machine, gpus)
    while 1 < size <= gpus:
        if gpus % size == 0:
            shards.append(size)
        size *= 2
    if gpus > 1 and gpus not in shards:
        shards.append(gpus)
    return [Setting(gpus, k, checkpointing) for checkpointing in (False, True) for k in shards]


def best(costs: list[Cost]) -> Cost | None:
    """The fastest that fits; of those within 2% of it the simplest, which stands first."""
    fitting = [c for c in costs if c.fits]
    if not fitting:
        return None
    fastest = max(c.rate for c in fitting)
    return next(c for c in fitting if c.rate >= 0.98 * fastest)
