"""`learning_rate: auto`: the rate at which the run's first steps learn most, found in short trials before it begins.

A trial starts where the run will start and takes its first steps, on the same rows in the same order, at one constant
rate. What is compared is the mean training loss of a trial's second half. A batch's loss is computed before the batch
is learned from, so within the first pass over the rows it is a loss on rows that were not seen (Dawid 1984,
"prequential"), and as all trials see the same batches, their noise is the same. That the rate stays constant stands
for the length of the run: a short run whose rate falls bears rates that are too high for a long one (Bjorck et al.
2024, arXiv 2409.19913).
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from rich.console import Console

from trivet import processes
from trivet.adapter.plan import Plan, plan_of
from trivet.errors import DivergedError, InterruptedRunError
from trivet.prepare import Prepared, say
from trivet.rank.fixed import Fixed
from trivet.schedule import planned_steps
from trivet.train.interruption import Interruption
from trivet.training import passing_trainer

#: Steps of a trial, of which the second half is compared.
STEPS = 40
#: The rate to begin with at rank 8, or where each layer's step follows its rank.
START = 2e-3
#: Rates are COARSE apart until the best has a worse one on both sides, then the root of it; and how many such steps it
#: may be from where the search begins. A power of four, so that rates reached on two ways are equal to the bit.
COARSE, LOWEST, HIGHEST = 4.0, -3, 3


def with_rate(ready: Prepared, console: Console) -> Prepared:
    """`ready`, with a learning rate found in trials; the adapter, its ranks and the rows' order are as they were.

    In several processes all go through the same trials and find the same.

    Raises:
        DivergedError: no rate gave numbers.
        InterruptedRunError: by SIGINT or SIGTERM.
    """
    began, policy = time.perf_counter(), plan_of(ready.session.model).policy
    steps = min(STEPS, planned_steps(ready.config, ready.train_rows))
    start = start_rate(8 if policy.rank_aware_step else policy.lora_rank)
    interruption = Interruption(console, "finishing the step")

    def measured(rate: float) -> float:
        restore()
        loss = _trial(ready, rate, steps, interruption)
        if interruption.signal:
            raise InterruptedRunError(
                f"interrupted by {interruption.name} while a learning rate was looked for; nothing was trained or "
                "written",
                signal=interruption.signal,
            )
        say(console, f"  {rate:.2g}: " + (f"loss {loss:.4f}" if math.isfinite(loss) else "diverged"))
        return loss

    with interruption.watching(), _untouched(ready.session.model) as restore:
        say(console, f"learning rate: trials of {steps} steps")
        trials = search(measured, start)
    processes.check_same("losses of trials", json.dumps(trials))
    best = lowest(trials, start)
    if not math.isfinite(trials[best]):
        tried = f"from {min(trials):.2g} to {max(trials):.2g}"
        raise DivergedError(f"training.learning_rate: auto tried rates {tried}, and training diverged at every one")
    say(console, f"  taken: {best:.2g}, found in {time.perf_counter() - began:.0f} s")
    settings = replace(ready.config.training, learning_rate=best)
    record = [{"learning_rate": rate, "loss": loss if math.isfinite(loss) else None} for rate, loss in trials.items()]
    return replace(ready, config=replace(ready.config, training=settings), trials=record)


def start_rate(rank: int) -> float:
    """Where the search begins. The best rate falls about as r^-1/2 (docs/decisions/0017-rank-aware-step.md)."""
    return _rounded(START * math.sqrt(8 / rank))


def search(loss: Callable[[float], float], start: float) -> dict[float, float]:
    """The losses of the rates that were tried, around the lowest of them; `loss` gives inf for what diverges."""
    tried: dict[float, float] = {}
    slowest, fastest, between = start * COARSE**LOWEST, start * COARSE**HIGHEST, math.sqrt(COARSE)

    def look(*rates: float) -> None:
        for rate in rates:
            if rate not in tried and slowest <= rate <= fastest:
                tried[rate] = loss(_rounded(rate))

    look(start, start / COARSE, start * COARSE)
    while (middle := lowest(tried, start)) in (min(tried), max(tried)) and slowest < middle < fastest:
        look(middle / COARSE, middle * COARSE)
    look(middle / between, middle * between)
    return {_rounded(rate): tried[rate] for rate in sorted(tried)}


def lowest(losses: Mapping[float, float], start: float) -> float:
    """The rate of the lowest loss.

    Of equal losses that nearest to `start` counts (a run may be too short for any to differ), and where all diverge
    the lowest rate's.
    """
    return min(losses, key=lambda r: (losses[r], r if losses[r] == math.inf else abs(math.log(r / start))))


def _rounded(rate: float) -> float:
    """To the two digits that are said and written."""
    return float(f"{rate:.2g}")


def _trial(ready: Prepared, rate: float, steps: int, interruption: Interruption) -> float:
    """The mean loss of the second half of `steps` steps at `rate`; inf where that is no number."""
    settings = replace(
        ready.config.training,
        learning_rate=rate,
        max_steps=steps,
        lr_scheduler="constant_with_warmup",
        early_stopping_patience=None,
        report_to=[],
    )
    with passing_trainer(replace(ready, config=replace(ready.config, training=settings)), interruption) as trainer:
        try:
            trainer.train()
        except DivergedError:
            return math.inf
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row][steps // 2 :]
    mean = sum(losses) / max(len(losses), 1)
    return mean if math.isfinite(mean) else math.inf


@contextlib.contextmanager
def _untouched(model: Any) -> Iterator[Callable[[], None]]:
    """Train what is to be left as it was: gives what puts the trained tensors back; ranks do not change meanwhile."""
    kept = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]

    def restore() -> None:
        for p, before in kept:
            p.detach().copy_(before)
            p.grad = None

    plan = plan_of(model)
    model.trivet = Plan(plan.method, Fixed(plan.policy.lora_rank, plan.policy.rank_aware_step))
    try:
        yield restore
    finally:
        restore()
        model.trivet = plan
