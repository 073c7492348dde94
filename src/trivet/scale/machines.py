"""GPUs: what a plan takes for their memory, speed and links. Figures of the makers' data sheets."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from trivet.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU in the machines it usually comes in.

    Attributes:
        memory: bytes.
        flops: dense 16-bit FLOP/s at its peak.
        link: bytes/s, one way, to the other GPUs of its machine (NVLink, or PCIe).
        network: bytes/s, one way, to other machines: its share of its machine's network.
        in_machine: GPUs of a machine.
    """

    memory: float
    flops: float
    link: float
    network: float
    in_machine: int = 8


GPUS = {
    "rtx4090-24gb": Gpu(24e9, 165e12, 25e9, 3e9),
    "l40s-48gb": Gpu(48e9, 362e12, 25e9, 12.5e9),
    "a100-40gb": Gpu(40e9, 312e12, 300e9, 25e9),
    "a100-80gb": Gpu(80e9, 312e12, 300e9, 25e9),
    "h100-80gb": Gpu(80e9, 989e12, 450e9, 50e9),
    "h200-141gb": Gpu(141e9, 989e12, 450e9, 50e9),
    "b200-180gb": Gpu(180e9, 2250e12, 900e9, 50e9),
}

#: Share of a GPU's memory that a plan fills: the rest is for CUDA's context and for fragments.
USABLE = 0.9
#: Share of a link's speed that large collectives reach.
REACHED = 0.8
#: Seconds that each hop of a collective costs, however little is sent.
HOP = 5e-6


def find_gpu(name: str) -> Gpu:
    """The GPU of that name; `ConfigError` with the nearest one otherwise."""
    if name not in GPUS:
        near = difflib.get_close_matches(name.lower(), GPUS, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"--gpu {name}: is not known; {hint}there are: {', '.join(GPUS)}")
    return GPUS[name]
