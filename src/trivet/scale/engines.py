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
        gpus: all of them; each takes its share of the rows.
        sharded: whether the blocks' frozen weights are shared out over them (FSDP2); else each has a copy.
        checkpointing: whether activations are computed again in the backward pass.
    """

    gpus: int
    sharded: bool
    checkpointing: bool

    @property
    def name(self) -> str:
        if self.gpus == 1:
            return "one GPU"
        return "FSDP2" if self.sharded else "data parallel"


@dataclass(frozen=True)
class Cost:
    """What a setting costs each GPU.

    Attributes:
        held: bytes by what for.
        sent: bytes that leave each GPU in an optimizer step, by what for.
        compute: seconds of an optimizer step's matrix products.
        gathering: seconds of gathering weights, were it alone.
        reducing: seconds of summing the adapter's gradients, once a step, after the last backward pass.
        fits: whether `held` is at most the usable memory.
        tokens: of a step, on all GPUs.
        room: rows of a micro-batch that would fit.
    """

    setting: Setting
    held: dict[str, int]
    sent: dict[str, int]
    compute: float
    gathering: float
    reducing: float
    fits: bool
    tokens: int
    room: int

    @property
    def total(self) -> int:
        """Bytes held."""
        return sum(self.held.values())

    @property
    def step(self) -> float:
        """Seconds of an optimizer step where gathering hides behind computing as far as it can."""
        return max(self.compute, self.gathering) + self.reducing

    @property
    def longest(self) -> float:
        """Seconds of an optimizer step where nothing hides."""
        return self.compute + self.gathering + self.reducing

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
    activations = trace.activations(setting.checkpointing)
    if setting.sharded:  # and gathered: the block under way and the next one
        inside = trace.weights - trace.outer_weights
        held = {
            "weights": trace.outer_weights + -(-inside // setting.gpus),
            "gathered weights": min(2 * trace.block_weights, inside),
        }
    else:
        held = {"weights": trace.weights}
    held |= {"adapter": adapter.factors, "gradients": adapter.gradients, "optimizer": adapter.optimizer}
    usable = USABLE * gpu.memory
    room = usable - sum(held.values()) - trace.working
    held["activations"] = activations
    sent = traffic(setting, trace, adapter, accumulation)
    gathering, reducing = seconds(setting, trace, sent, gpu, accumulation)
    return Cost(
        setting=setting,
        held=held,
        sent=sent,
        compute=accumulation * trace.flops(setting.checkpointing) / (mfu * gpu.flops),
        gathering=gathering,
        reducing=reducing,
        fits=sum(held.values()) <= usable,
        tokens=trace.tokens * accumulation * setting.gpus,
        room=max(0, int(room * rows / (activations - trace.working))),
    )


def traffic(setting: Setting, trace: Trace, adapter: AdapterSize, accumulation: int) -> dict[str, int]:
    """Bytes that leave each GPU in an optimizer step, by what for.

    Sharded weights are gathered twice a micro-step, for the forward and for the backward pass. Frozen weights have no
    gradients, so only the adapter's are summed, once a step.
    """
    others = (setting.gpus - 1) / setting.gpus
    sent = {}
    if setting.sharded:
        sent["weights"] = int(2 * accumulation * others * (trace.weights - trace.outer_weights))
    if setting.gpus > 1:
        sent["gradients"] = int(2 * others * adapter.gradients)
    return sent


def seconds(setting: Setting, trace: Trace, sent: dict[str, int], gpu: Gpu, accumulation: int) -> tuple[float, float]:
    """Of gathering weights, and of summing gradients, in an optimizer step."""
    speed, collectives = ring_speed(setting.gpus, gpu), 2 * accumulation * trace.blocks if setting.sharded else 0
    gathering = sent.get("weights", 0) / speed + collectives * (setting.gpus - 1) * HOP
    return gathering, sent.get("gradients", 0) / speed + 2 * math.ceil(math.log2(setting.gpus)) * HOP


def ring_speed(members: int, gpu: Gpu) -> float:
    """Bytes/s that a ring over neighbouring GPUs reaches: across machines all network cards of a machine take part."""
    if members <= gpu.in_machine:
        return REACHED * gpu.link
    return REACHED * min(gpu.link, gpu.network * gpu.in_machine)


def settings(gpus: int, sharded: bool = True) -> list[Setting]:
    """What trivet offers, the simplest first; without weights that are `sharded` where they can't be."""
    return [
        Setting(gpus, share, checkpointing)
        for checkpointing in (False, True)
        for share in ((False, True) if gpus > 1 and sharded else (False,))
    ]


def best(costs: list[Cost]) -> Cost | None:
    """The fastest that fits; of those within 2% of it the simplest, which stands first."""
    fitting = [c for c in costs if c.fits]
    if not fitting:
        return None
    fastest = max(c.rate for c in fitting)
    return next(c for c in fitting if c.rate >= 0.98 * fastest)
