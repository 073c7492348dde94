"""What a benchmark was run with, and on."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def versions(*optional: str) -> dict[str, str]:
    """Of python and packages, the `optional` ones where installed; trivet's is its commit in a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    out = {"python": platform.python_version(), "trivet": commit or version("trivet")}
    out |= {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")}
    for name in optional:
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            continue
    return out


def processor(device: str = "cpu") -> str:
    """What the GPU is called; or the CPU, and what it computes with."""
    import torch

    from trivet.kernels.product import multiplies

    if device == "cuda":
        return torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    name = next(named, platform.processor() or platform.machine())
    halves = "bfloat16 instructions" if multiplies(torch.bfloat16) else "no bfloat16 instructions"
    return f"{name} with {torch.backends.cpu.get_cpu_capability()} and {halves}"
