"""The processes of one run, one a device: torchrun or `accelerate launch` starts them, and here they meet.

In a run of one process nothing here does anything.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from trivet.errors import ConfigError, ProcessError, TrivetError

if TYPE_CHECKING:
    import torch

#: How long a process waits for the others in a step, or at the end of a phase that all go through.
TIMEOUT = timedelta(minutes=30)
#: How long it waits for what the first process does alone: its launcher ends it where that one ended.
FOREVER = timedelta(days=365)

_store: Any = None
_told = 0
_sharded = False


def count() -> int:
    """How many there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def index() -> int:
    """Which one this is, from 0."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def first() -> bool:
    """Whether this is the one that writes and speaks."""
    return index() == 0


def first_here() -> bool:
    """Whether this is the first on its machine."""
    return count() == 1 or int(os.environ.get("LOCAL_RANK", "0")) == 0


def sharded() -> bool:
    """Whether the base model's weights are shared out (`accelerate launch --use_fsdp`): forward passes need all."""
    return _sharded


def join(device: torch.device) -> None:
    """Meet the others; `device` is the kind that each has one of.

    Of what `accelerate launch` asks for, FSDP is done by `train.shard` and precision is `model.dtype`'s affair: from
    here on accelerate and transformers, which would wrap the model themselves, are not told of either.

    Raises:
        ConfigError: the launcher gave no place to meet, started more processes than there are GPUs, or wants DeepSpeed
            or FSDP's first version.
    """
    global _store, _sharded
    import torch
    import torch.distributed as dist

    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    _sharded = os.environ.pop("ACCELERATE_USE_FSDP", str(_sharded)).lower() == "true" and count() > 1
    if _sharded and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError("FSDP: only its version 2 is supported; add --fsdp_version 2 to accelerate launch")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ConfigError(
            "DeepSpeed is not supported: its engine owns optimizer and gradients, which update rules and changes of "
            "rank work on. To share a large base model out, use accelerate launch --use_fsdp --fsdp_version 2"
        )
    if count() == 1:
        if int(os.environ.get("OMPI_COMM_WORLD_SIZE", os.environ.get("PMI_SIZE", "1"))) > 1:
            raise ConfigError("several processes are started with torchrun or accelerate launch, not with mpirun")
        return
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(f"WORLD_SIZE is {count()}, but {', '.join(missing)} not set; start it with torchrun")
    backend = "gloo"
    if device.type == "cuda":
        here, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if here >= there:
            raise ConfigError(f"each process needs a GPU of its own: this machine has {there}; start no more processes")
        torch.cuda.set_device(here)
        backend = "cpu:gloo,cuda:nccl"
    elif device.type != "cpu":
        raise ConfigError(f"several processes train on CUDA GPUs or on CPUs, not on {device.type}")
    if _store is None:
        _store = _meet(TIMEOUT)
    if not dist.is_initialized():
        group = dist.PrefixStore("group", _store)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=group, rank=index(), world_size=count(), timeout=TIMEOUT)


def _meet(timeout: timedelta) -> Any:
    """The launcher's key-value store, with keys of this attempt alone."""
    import torch.distributed as dist

    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))  # type: ignore[attr-defined]
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"trivet/{attempt}", store)  # type: ignore[attr-defined]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What goes wrong in talking to the others, as what it means: one of them has ended, or is stuck."""
    try:
        yield
    except RuntimeError as error:
        import torch.distributed as dist

        if count() == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise ProcessError(
            f"another of the run's {count()} processes has ended, or is stuck, so process {index()} ends too; what it "
            "said stands above, or in the launcher's report. If the run has checkpoints, --resume goes on with it"
        ) from error


def wait() -> None:
    """Go on when every process is here."""
    if count() > 1:
        import torch

        total(torch.zeros(1))


def total(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, in place; the same to the bit in each."""
    if count() > 1:
        import torch.distributed as dist

        dist.all_reduce(tensor)
    return tensor


def largest(number: int) -> int:
    """The largest of every process's number."""
    if count() == 1:
        return number
    import torch
    import torch.distributed as dist

    tensor = torch.tensor(number)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def from_first(make: Callable[[], str]) -> str:
    """What the first process makes; the others wait for it, however long it takes."""
    global _told
    if count() == 1:
        return make()
    _told += 1
    key = f"told/{_told}"
    if first():
        made = make()
        _store.set(key, made)
        return made
    _store.wait([key], FOREVER)
    return str(_store.get(key).decode())


def copy_from_first(tensors: Sequence[torch.Tensor]) -> None:
    """Give every process the first one's values, in place; shapes are alike."""
    if count() > 1:
        import torch
        import torch.distributed as dist

        with torch.no_grad():
            for tensor in tensors:
                sent = tensor.contiguous()
                dist.broadcast(sent, src=0)
                tensor.copy_(sent)


def check_same(what: str, value: str) -> None:
    """`TrivetError` where the processes have come to different values: they would train different models."""
    if count() == 1:
        return
    import torch
    import torch.distributed as dist

    own = torch.tensor(list(hashlib.sha256(value.encode()).digest()), dtype=torch.uint8)
    every = [torch.empty_like(own) for _ in range(count())]
    dist.all_gather(every, own)
    for other, theirs in enumerate(every):
        if not torch.equal(theirs, every[0]):
            raise TrivetError(
                f"the {what} of process {other} are not those of process 0: all machines need the same files, the same "
                "packages and the same configuration"
            )


def say_once(say: Callable[[], None]) -> None:
    """Say why the run failed, unless another process has: that one failed first, and this one because of it."""
    global _store
    with contextlib.suppress(RuntimeError, ValueError):  # nobody is there to ask
        if _store is None and count() > 1 and "TORCHELASTIC_USE_AGENT_STORE" in os.environ:  # before they met
            _store = _meet(timedelta(seconds=5))
        if _store is not None and _store.add("failed", 1) > 1:
            _store.wait(["said"], timedelta(seconds=5))  # the launcher ends all where one has ended
            return
    say()
    with contextlib.suppress(RuntimeError, ValueError):
        if _store is not None:
            _store.set("said", "")
