"""Which rows make a step, and how many steps a run has."""

from __future__ import annotations

from trivet import processes
from trivet.config import Config
from trivet.data.batch import MULTIPLE, tokens_of
from trivet.data.encode import Encoded
from trivet.kernels.product import size_step
from trivet.train.sampler import TokenBudgetSampler


def token_batches(config: Config, rows: list[Encoded]) -> TokenBudgetSampler | None:
    """Which rows go together, where tokens are counted and not rows."""
    settings = config.training
    if settings.max_tokens_per_batch is None:
        return None
    budget = settings.max_tokens_per_batch
    step = max(MULTIPLE, size_step(budget)) if settings.packing else MULTIPLE
    budget = budget // step * step  # a batch of packed rows is rounded up as a whole
    lengths = [tokens_of(row, 1 if settings.packing else MULTIPLE) for row in rows]
    return TokenBudgetSampler(lengths, budget, settings.seed, packed=bool(settings.packing))


def planned_steps(config: Config, rows: list[Encoded]) -> int:
    """Optimizer steps of the whole run, in as many processes as there are."""
    settings = config.training
    if settings.max_steps is not None:
        return settings.max_steps
    grouped = token_batches(config, rows)
    batches = -(-len(rows) // settings.batch_size) if grouped is None else len(grouped)
    step = settings.gradient_accumulation_steps * processes.count()
    return max(1, round(-(-batches // step) * settings.num_epochs))


#: Settings that may be others in another number of processes, for as long as `step_size` stays.
STEP_KEYS = ("batch_size", "gradient_accumulation_steps")


def step_size(config: Config, processes: int) -> str:
    """What an optimizer step learns from, in words."""
    settings = config.training
    micro = settings.gradient_accumulation_steps * processes
    if settings.max_tokens_per_batch is not None:
        return f"{micro} batches of {settings.max_tokens_per_batch} tokens"
    return f"{micro * settings.batch_size} rows a step"
