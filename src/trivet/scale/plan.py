"""`trivet plan`: what a config would need on so many GPUs, which setting to use, and what changing ranks send."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trivet.adapter.layers import AdaptedLayer
from trivet.config import Config
from trivet.errors import ConfigError
from trivet.four_bit import to_four_bit
from trivet.methods import Method, find_method
from trivet.model import head_names
from trivet.rank.policy import Policy
from trivet.scale.adapter import FLOAT, AdapterSize, adapter_size
from trivet.scale.engines import Cost, best, cost, settings
from trivet.scale.machines import find_gpu
from trivet.scale.shapes import model_config
from trivet.scale.trace import Trace, build, trace

_DTYPES = {"auto": torch.bfloat16, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class RankTraffic:
    """What a changing rank changes.

    Attributes:
        start, end: numbers in the factors before the first change and after the last; `end` is None where the policy
            finds it out.
        mean: of the numbers over the run's steps; None likewise.
        resizes: how often ranks may change.
        measured: steps whose second moments are summed over processes.
        moments: bytes of these sums.
        decision: bytes of a decision: a rank for each layer.
    """

    start: int
    end: int | None
    mean: int | None
    resizes: int
    measured: int
    moments: int
    decision: int


@dataclass(frozen=True)
class Plan:
    """A config on a number of GPUs.

    Attributes:
        model: its name.
        rows, length, accumulation: of a micro-step on each GPU, and micro-steps of an optimizer step.
        steps: of the run, where the config says so.
        trace: one micro-step of one GPU.
        adapter: at the ranks it starts with.
        costs: every setting's.
        chosen: the one to use; None where none fits.
        fewest: GPUs that would do, where none of the settings fits; None where even 4,096 would not.
        ranks: None where ranks are fixed.
    """

    model: str
    gpu: str
    gpus: int
    rows: int
    length: int
    accumulation: int
    steps: int | None
    mfu: float
    trace: Trace
    adapter: AdapterSize
    costs: Sequence[Cost]
    chosen: Cost | None
    fewest: int | None
    ranks: RankTraffic | None


def plan(
    config: Config,
    *,
    gpus: int = 1,
    gpu: str = "h100-80gb",
    length: int | None = None,
    learned: float = 1.0,
    mfu: float = 0.4,
) -> Plan:
    """Plan a run; nothing is loaded but the model's config.

    Args:
        gpus, gpu: how many, and which of `machines.GPUS`.
        length: tokens in a row; default data.max_length, the longest there may be.
        learned: share of the tokens that are learned.
        mfu: share of the GPU's peak that matrix products reach.

    Raises:
        ConfigError: an unknown GPU or model, or a method that can't be counted.
    """
    machine = find_gpu(gpu)
    if not 0 < mfu <= 1 or not 0 < learned <= 1:
        raise ConfigError("--mfu and --learned are shares, above 0 and at most 1")
    wanted, training = config.model, config.training
    if not wanted.name:
        raise ConfigError("model.name is not set: a public shape such as llama-3.1-8b, a hub id, a folder, or demo")
    shape = model_config(wanted.name, revision=wanted.revision, trust_remote_code=wanted.trust_remote_code)
    longest = getattr(shape, "max_position_embeddings", None) or config.data.max_length
    length = min(length or config.data.max_length, longest)
    tokens = training.max_tokens_per_batch
    rows = max(1, tokens // length) if tokens else training.batch_size
    method = find_method(config.method)
    task = task_of(shape, wanted.task, config.data.format)
    base = build(shape, task, _DTYPES[wanted.dtype])
    if wanted.load_in_4bit:
        to_four_bit(base, head_names(base, task))
    probed = "probe" in method.spec("rank").traits  # ranks that the data decides: as many numbers, spread evenly
    counted = trace(
        base,
        method,
        task=task,
        rows=rows,
        length=length,
        learned=learned,
        lora_rank=wanted.lora_rank,
        lora_dropout=wanted.lora_dropout,
        target_modules=wanted.target_modules,
        fast=training.fast,
    )
    layers = counted.adapted
    size = adapter_size(method, [x.shape for x in layers], [x.rank for x in layers], counted.whole)
    accumulation = training.gradient_accumulation_steps

    def on(count: int) -> list[Cost]:
        return [
            cost(setting, counted, size, machine, rows=rows, accumulation=accumulation, mfu=mfu)
            for setting in settings(count, sharded=not wanted.load_in_4bit)
        ]

    costs = on(gpus)
    chosen = best(costs)
    more = (2**i for i in range(13) if 2**i > gpus)
    return Plan(
        model=wanted.name,
        gpu=gpu,
        gpus=gpus,
        rows=rows,
        length=length,
        accumulation=accumulation,
        steps=training.max_steps,
        mfu=mfu,
        trace=counted,
        adapter=size,
        costs=costs,
        chosen=chosen,
        fewest=gpus if chosen else next((count for count in more if best(on(count))), None),
        ranks=None if probed else rank_traffic(method, config, layers, counted.parameters),
    )


def task_of(shape: Any, task: str, data_format: str) -> str:
    """What would be trained for: as configured, else by the data's format and the architecture."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    from trivet.model import infer_task

    if task != "auto":
        return task
    found = infer_task(shape, data_format)
    encoder = shape.model_type not in CAUSAL or "MaskedLM" in " ".join(shape.architectures or ())
    return "classification" if found == "causal-lm" and encoder else found


def rank_traffic(method: Method, config: Config, layers: Sequence[AdaptedLayer], parameters: int) -> RankTraffic | None:
    """What the method's rank policy sends; None where ranks are fixed.

    A run of unknown length is taken as 1,000 steps.
    """
    policy: Policy = method.part("rank")(config.model.lora_rank, **method.options("rank"))
    if not policy.moving:
        return None
    policy.start(layers, None, parameters)
    total = config.training.max_steps or 1000
    start = sum(x.rank * sum(x.shape) for x in layers)
    # Of the squeezing policies; auto finds its budget in the run.
    allowance = None if method.rank.name == "auto" else getattr(policy, "allowance", None)
    known = allowance is not None
    path, now = [], start
    for step in range(1, total + 1):
        if allowance is not None and policy.due(step, total):
            now = min(now, allowance(step, total))
        path.append(now)
    k = policy.sketch
    return RankTraffic(
        start=start,
        end=path[-1] if known else None,
        mean=round(sum(path) / total) if known else None,
        resizes=sum(policy.due(step, total) for step in range(1, total + 1)) + (not policy.settled(total, total)),
        measured=sum(policy.measures(step, total) for step in range(total)),
        moments=FLOAT * sum(1 + out + 2 * inside + k * (out + 2 * inside) for out, inside in (x.shape for x in layers)),
        decision=8 * len(layers),
    )
