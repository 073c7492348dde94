"""C functions for CPUs: compiled once a machine, and called.

`native.c` is for every processor, `low_rank.c` and `tile_attention.c` for those with AMX. They are compiled by the C
compiler that is found, into trivet's cache (Triton does so with its launchers). Where there is none, torch's operations
stay.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from trivet.demo import cache_dir

#: As the sources number them.
_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_SOURCES = tuple(sorted(Path(__file__).parent.glob("*.c")))
_HEADERS = tuple(sorted(Path(__file__).parent.glob("*.h")))
_FLAGS = (
    "-std=c11",
    "-O3",
    "-ffp-contract=fast",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-shared",
)
#: The first that the compiler takes: all of this processor's instructions, and torch's threads (it has loaded OpenMP).
_CHOICES = (
    ("-march=native", "-fopenmp"),
    ("-mcpu=native", "-fopenmp"),
    ("-march=native",),
    ("-mcpu=native",),
    (),
)
#: Fewer numbers than that are not worth waking another thread.
_ALONE = 2**15


def serves(x: torch.Tensor) -> bool:
    """Whether these functions take x: float32 or bfloat16 on a CPU, with a compiler there."""
    plain = type(x) in (torch.Tensor, torch.nn.Parameter) and x.device.type == "cpu" and x.dtype in _TYPES
    return plain and x.numel() > 0 and not torch.compiler.is_compiling() and missing() is None


def compiler() -> list[str] | None:
    """The command of the C compiler: `$CC` (empty for none), else the first of cc, gcc and clang that is there."""
    if (named := os.environ.get("CC")) is not None:
        words = shlex.split(named)
        return words if words and shutil.which(words[0]) else None
    return next(([found] for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)


def missing() -> str | None:
    """Why this machine has no kernels; None where it has."""
    found = _library()
    return found if isinstance(found, str) else None


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The compiled kernels, or why they can't be had."""
    command = compiler()
    if command is None:
        return "no C compiler was found (install gcc or clang, or name one in CC)"
    try:
        return ctypes.CDLL(str(_compiled(command)))
    except (OSError, subprocess.SubprocessError) as error:
        return f"trivet's C kernels could not be compiled: {error}"


def _compiled(command: Sequence[str]) -> Path:
    """The library's file, made if this processor and this compiler have not made it yet."""
    key = repr((command, _FLAGS, _CHOICES, _processor())).encode() + b"".join(
        each.read_bytes() for each in (*_SOURCES, *_HEADERS)
    )
    folder = cache_dir() / "kernels"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    state = folder.stat()
    if hasattr(os, "getuid") and (state.st_uid != os.getuid() or state.st_mode & 0o022):
        raise OSError(f"others than you can write to {folder}, which holds code")
    target = folder / f"{hashlib.sha256(key).hexdigest()[:20]}.so"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=folder) as temporary:  # the rename is atomic: others may compile too
        made = Path(temporary, "kernels.so")
        for choice in _CHOICES:
            words = [*command, *_FLAGS, *choice, *map(str, _SOURCES), "-o", str(made), "-lm"]
            done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)  # noqa: S603
            if done.returncode == 0:
                return made.replace(target)
        raise OSError(f"{shlex.join(words)} ended with {done.returncode}: {done.stderr.strip()[-500:]}")


def _processor() -> str:
    """What "native" means here: homes of a cluster are shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "".join(dict.fromkeys(line for line in lines if line.startswith(("model name", "flags", "CPU", "Features"))))


#: What C functions are given.
Argument = torch.Tensor | int | float | ctypes.Array[ctypes.c_int64] | None


@functools.cache
def multiplies_tiles() -> bool:
    """Whether this processor has AMX for 16-bit numbers, and its system lets us use it."""
    library = _library()
    return not isinstance(library, str) and bool(library.tiles_ready())


def call(name: str, x: torch.Tensor, *arguments: Argument) -> None:
    """A C function, which takes x's type first and the number of threads last."""
    function = getattr(_library(), name)
    if function.argtypes is None:  # an argument is of the same kind in every call
        function.argtypes = [ctypes.c_int, *map(_kind, arguments), ctypes.c_int]
    threads = torch.get_num_threads() if x.numel() >= _ALONE else 1
    given = (each.data_ptr() if isinstance(each, torch.Tensor) else each for each in arguments)
    function(_TYPES[x.dtype], *given, threads)


def _kind(value: Argument) -> type:
    if isinstance(value, float):
        return ctypes.c_float
    return ctypes.c_int64 if isinstance(value, int) else ctypes.c_void_p
