"""What every side of `bench/speed.py` shares: taking turns with the others, and saying what a step took and held.

A word on standard input is leave to take one step; each step is answered with a JSON line (standard output is kept for
them, what libraries print goes to standard error). Between its turns the process is blocked on the pipe.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn


class Turns:
    """The child's end of the conversation, and its memory."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.held, self.peak_from, self.facts = 0, "", {}

    def loaded(self, model: nn.Module, **facts: Any) -> None:
        """The model is in memory and nothing of the training is: what is held from here on is the training's."""
        weights = [p for p in model.parameters() if p.device.type != "meta"]
        with torch.no_grad():
            for weight in weights:
                weight.sum()  # pages of a mapped file become resident
        gc.collect()
        self.facts = {"dtype": str(weights[0].dtype).removeprefix("torch.")} | facts
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.held = torch.cuda.memory_allocated()
            return
        if platform.libc_ver()[0] == "glibc":
            ctypes.CDLL(None).malloc_trim(0)  # what loading has freed is not the training's to reuse
        try:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew, so that loading's is not in it
            self.peak_from = "loaded"
            self.held = int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
        except OSError:
            self.peak_from, self.held = "process start", self._peak()

    def _peak(self) -> int:
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def ready(self, **facts: Any) -> None:
        """Everything is prepared for the first step."""
        facts = {"resident_bytes": self.held, "peak_counted_from": self.peak_from, **self.facts, **facts}
        self._say(facts | {"threads": torch.get_num_threads(), "ready_at": time.time()})

    def wait(self) -> float:
        """Blocks until it is this side's turn; the time at which it began. Leaves the process after the last one."""
        if not sys.stdin.readline():
            raise SystemExit
        return time.perf_counter()

    def answer(self, began: float, counts: dict[str, int]) -> None:
        """A step is done. `counts` has rows, tokens (without padding) and supervised tokens."""
        if self.cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        self._say({"seconds": seconds, "peak_extra_bytes": self._peak() - self.held, **counts})

    def _say(self, values: dict[str, Any]) -> None:
        print(json.dumps(values), file=self.out, flush=True)


def loop(turns: Turns, work: Callable[[int], dict[str, int]]) -> None:
    """`work(step)` is one optimizer step, and says what was in it."""
    turns.ready()
    step = 0
    while True:
        began = turns.wait()
        turns.answer(began, work(step))
        step += 1


def lora_config(task: str, rank: int) -> Any:
    """The adapter of every PEFT side: rank r and a scale of 2 on every linear layer but the head, as trivet's."""
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type=task)


def lora(model: Any, task: str, rank: int, **options: Any) -> Any:
    """The model with that adapter, as PEFT makes it."""
    from peft import get_peft_model

    return get_peft_model(model, lora_config(task, rank), **options)
