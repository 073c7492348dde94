"""C kernels for CPUs: norms, gated activations, rotations, softmax and cross-entropy, each in one pass over memory, and
attention within rows.

The counterpart of `trivet.kernels.fused`, with its functions and arguments. torch takes several operations for each of
these, rounds what lies between them to 16 bits, or copies all of it to float32 and back. `native.c` and `low_rank.c`, of
`trivet.kernels.low_rank`, are compiled once a machine, by the C compiler that is found there, into trivet's cache (Triton does so with its launchers). Where there is
none, torch's operations stay. Arithmetic is in float32, sums of long rows in float64.
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
from typing import NamedTuple

import torch

from trivet.demo import cache_dir
from trivet.kernels.heap import empty

#: Of native.c.
_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_SOURCES = tuple(Path(__file__).with_name(name) for name in ("native.c", "low_rank.c"))
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
    """Whether these kernels take x: float32 or bfloat16 on a CPU, with a compiler there."""
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
    key = repr((command, _FLAGS, _CHOICES, _processor())).encode() + b"".join(source.read_bytes() for source in _SOURCES)
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


def ready(part: str) -> bool:
    """Whether a source's functions are there and its `…_ready` says that this machine can run them."""
    return missing() is None and bool(getattr(_library(), f"{part}_ready")())


def call(name: str, x: torch.Tensor, *arguments: Argument) -> None:
    """A C function, which takes x's type first and the number of threads last."""
    threads = torch.get_num_threads() if x.numel() >= _ALONE else 1
    given = (_argument(each) for each in arguments)
    getattr(_library(), name)(ctypes.c_int(_TYPES[x.dtype]), *given, ctypes.c_int(threads))


def _argument(value: Argument) -> object:
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, float):
        return ctypes.c_float(value)
    return ctypes.c_int64(value) if isinstance(value, int) else value


# -- norms and gated activations ---------------------------------------------------------------------------------


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """As `fused.rms_norm`."""
    width = x.shape[-1]
    y, inverse = empty(*x.shape, like=x), x.new_empty(x.numel() // width, dtype=torch.float32)
    call("rms_norm", x, x, weight, y, inverse, len(inverse), width, float(eps))
    return y, inverse


def rms_norm_backward(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """As `fused.rms_norm_backward`."""
    out = empty(*x.shape, like=x)
    call("rms_norm_backward", x, grad, x, weight, inverse, out, len(inverse), x.shape[-1])
    return out


def silu_gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """As `fused.silu_gate`."""
    out = empty(*gate.shape, like=gate)
    call("silu_gate", gate, gate, up, out, gate.numel())
    return out


def silu_gate_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `fused.silu_gate_backward`."""
    in_gate, in_up = empty(*gate.shape, like=gate), empty(*up.shape, like=up)
    call("silu_gate_backward", gate, grad, gate, up, in_gate, in_up, gate.numel())
    return in_gate, in_up


# -- rotary positions ----------------------------------------------------------------------------------------------


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, back: bool = False) -> torch.Tensor:
    """As `fused.rotate`, of angles that both halves share.

    Returns:
        x's shape, laid out by head, as attention on CPUs reads it; with `back` as (batch, length, heads, width).
    """
    batch, heads, length, width = x.shape
    out = empty(batch, length, heads, width, like=x).transpose(1, 2) if back else empty(*x.shape, like=x)
    each = 0 if len(cos) == 1 else length * width
    strides = _strides(x), _strides(out)
    call("rotate", x, x, cos, sin, out, batch, heads, length, width, *strides, each, -1.0 if back else 1.0)
    return out


# -- softmax ---------------------------------------------------------------------------------------------------------


def softmax_(scores: torch.Tensor, queries: int = 0, before: int = 0) -> torch.Tensor:
    """softmax(scores) over the last axis, in place.

    Args:
        scores: (…, keys), bfloat16, contiguous; a row must have a finite entry.
        queries: where rows are query after query of `queries`, over and over, and causal: the first of them sees
            `before` keys and one more, the next another one; what a query does not see becomes 0. 0: all is seen.

    Raises:
        TypeError: scores of another type.
    """
    if scores.dtype != torch.bfloat16:
        raise TypeError(f"scores are {scores.dtype}; torch's own softmax is as fast but for bfloat16")
    keys = scores.shape[-1]
    call("softmax", scores, scores, scores.numel() // keys, keys, queries, before)
    return scores


# -- attention within rows -----------------------------------------------------------------------------------------

#: Numbers of a head.
WIDEST = 1024
#: Of native.c, where COLUMNS are 16 or 32.
_COLUMNS, _QUERIES = 32, 32


class Weights(NamedTuple):
    """How scores become weights: their scale, the probability that a weight is dropped, and the seed of the choice."""

    scale: float
    dropout: float
    seed: int


def row_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor, rows: torch.Tensor, weights: Weights
) -> None:
    """Into `out`, (batch, heads, queries, width): see `trivet.kernels.row_attention`."""
    sizes, scratch = _sizes(query, key, rows, weights, kept=2)
    tensors = (part for each in (query, key, value, out) for part in (each, _strides(each)))
    call("row_attention", query, *tensors, rows, sizes, scratch, weights.scale)


def row_attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    in_query: torch.Tensor,
    in_key: torch.Tensor,
    in_value: torch.Tensor,
    rows: torch.Tensor,
    weights: Weights,
) -> torch.Tensor:
    """The gradients, into the tensors given for them.

    Returns:
        (rows, key heads, 2, most before, width) float32: what each causal row adds to the gradients of the keys and
        values of what is before it. The tensors have what it adds to its own.
    """
    sizes, scratch = _sizes(query, key, rows, weights, kept=5)
    begun = scratch.new_zeros(len(rows), key.shape[1], 2, sizes[5], query.shape[-1])
    given = (grad, query, key, value, in_query, in_key, in_value)
    tensors = (part for each in given for part in (each, _strides(each)))
    call("row_attention_backward", query, *tensors, rows, sizes, begun, scratch, weights.scale)
    return begun


def _sizes(
    query: torch.Tensor, key: torch.Tensor, rows: torch.Tensor, weights: Weights, kept: int
) -> tuple[ctypes.Array[ctypes.c_int64], torch.Tensor]:
    """What native.c has to know, and memory for its threads, of which each keeps so many of a row's keys and values."""
    most, before = int((rows[:, 3] + rows[:, 4]).max()), int((rows[:, 3] * (rows[:, 4] > 0)).max())
    keys, width = (-(-n // _COLUMNS) * _COLUMNS for n in (most, query.shape[-1]))
    each = kept * keys * width + _QUERIES * (2 * keys + 3 * width)
    heads = query.shape[1], key.shape[1]
    dropped = round(weights.dropout * 2**32)
    sizes = len(rows), *heads, query.shape[-1], most, before, each, key.shape[2], dropped, weights.seed
    scratch = query.new_empty(torch.get_num_threads() * each, dtype=torch.float32)
    return (ctypes.c_int64 * len(sizes))(*sizes), scratch


def _strides(x: torch.Tensor) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * 3)(*x.stride()[:3])


# -- cross-entropy -----------------------------------------------------------------------------------------------------


def cross_entropy_(
    products: torch.Tensor, targets: torch.Tensor, *, scale: float = 1.0, cap: float | None = None, z_loss: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `fused.cross_entropy_`."""
    n, vocabulary = products.shape
    losses, right = products.new_empty(n, dtype=torch.float32), products.new_empty(n, dtype=torch.bool)
    settings = float(scale), float(cap or 0), float(z_loss)
    call("cross_entropy", products, products, targets, losses, right, n, vocabulary, *settings)
    return losses, right
