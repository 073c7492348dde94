"""Put an adapter on a model: a PEFT model that any Trainer can train."""

from __future__ import annotations

import contextlib
import copy
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from trivet.adapter.fast import make_fast, make_merging
from trivet.adapter.layers import AdaptedLayer, adapted_layers
from trivet.adapter.plan import Plan
from trivet.adapter.resize import set_ranks, write_patterns
from trivet.adapter.statistics import LayerStatistics
from trivet.errors import AdapterError, ConfigError
from trivet.fast import speed_up
from trivet.four_bit import count_parameters
from trivet.methods import find_method
from trivet.model import head_names
from trivet.probe import probe

_TASK_TYPES = {
    "causal-lm": TaskType.CAUSAL_LM,
    "seq2seq": TaskType.SEQ_2_SEQ_LM,
    "classification": TaskType.SEQ_CLS,
    "regression": TaskType.SEQ_CLS,
}
#: Models whose `out_proj` PEFT refuses to adapt.
_MAMBA = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")


def attach(
    model: Any,
    *,
    lora_rank: int = 8,
    lora_alpha: float | None = None,
    lora_dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    modules_to_save: Sequence[str] = (),
    task: str = "auto",
    method: Any = "lora",
    batches: Iterable[Mapping[str, torch.Tensor]] | None = None,
    loss: Callable[[Any, Mapping[str, torch.Tensor]], tuple[torch.Tensor, int]] | None = None,
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
    seed: int = 42,
    fast: bool = True,
) -> PeftModel:
    """Attach a LoRA adapter; the model's outputs do not change until it is trained.

    Args:
        model: any transformers model. It is adapted in place; its own weights are frozen.
        lora_rank: r, at least 1.
        lora_alpha: the update is alpha / r * B A; None means 2 r, a scale of 2.
        lora_dropout: probability of dropping an input of the adapter, 0 to 1.
        target_modules: "all-linear" (every linear layer but the output head), or layer names. A mixture's experts
            are no linear layers where they are one tensor a layer.
        modules_to_save: further parts to train whole and save with the adapter, such as a newly started pooler.
        task: causal-lm, seq2seq, classification or regression; `auto` reads it off the model's class.
        method: a name from `trivet methods`, or a mapping of legs: {"decompose": "gradient", "rank": {"name":
            "squeeze", "budget": "r4-equivalent"}, "update": "adamw"}. `trivet.optimizer` and `trivet.callback` carry
            out the other two legs in the training.
        batches: a few batches of model inputs with labels, for methods that look at the data first.
        loss: (model, batch) -> (mean loss, number of items in it) for those batches; default: the model's own loss.
        reduce: sums a tensor over processes, where each has its own share of `batches`.
        seed: seeds the factors, independent of torch's global state.
        fast: replace adapted layers, attention (on CPUs) and norms by faster ones that compute the same.

    Returns:
        A `peft.PeftModel`. A classification or regression head is trained and saved with the adapter.

    Raises:
        ConfigError: no layer is called like that, a value is out of range, or the method needs `batches`.
        AdapterError: a target shares its weights with another layer, so it could not be merged or exported.
    """
    parts = find_method(method)
    if parts.needs_probe and batches is None:
        raise ConfigError(f"method {parts}: looks at the data before it starts; pass batches= with a few batches")
    if isinstance(model, PeftModel):
        raise ConfigError("the model already has an adapter; merge it first, or pass the base model")
    if not 0 <= lora_dropout < 1:
        raise ConfigError(f"lora_dropout must be at least 0 and below 1, not {lora_dropout}")
    if isinstance(lora_rank, bool) or not isinstance(lora_rank, int) or lora_rank < 1:
        raise ConfigError(f"lora_rank must be a whole number of at least 1, not {lora_rank!r}")
    if lora_alpha is not None and not 0 < lora_alpha < math.inf:
        raise ConfigError(f"lora_alpha must be above 0, not {lora_alpha}: at a scale of 0 nothing could be learned")
    if task == "auto":
        task = task_of(model)
    policy = parts.part("rank")(lora_rank, **parts.options("rank"))
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    heads = [*head_names(model, task), *modules_to_save]
    left_out = _not_adapted(model)
    config = LoraConfig(
        r=lora_rank,
        lora_alpha=2 * lora_rank if lora_alpha is None else lora_alpha,  # type: ignore[arg-type]
        lora_dropout=lora_dropout,
        target_modules=targets,
        task_type=_TASK_TYPES[task],
        use_dora="magnitude" in parts.spec("decompose").traits,
        modules_to_save=heads or None,
        exclude_modules=heads_pattern([*heads, *left_out]),
    )
    _leave_experts(config, model)
    _check_targets(model, targets)
    linear = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    with quiet_peft():
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:
            raise ConfigError(
                f"model.target_modules {targets}: {str(error).rstrip('.')}. Linear layers of this model: "
                f"{', '.join(sorted(linear))}; write them as a list"
            ) from error
    if left_out:  # targets one by one, as what is a target and excluded counts as a layer that left
        config.target_modules = {layer.name for layer in adapted_layers(adapted)}
        config.exclude_modules = heads_pattern(heads)
    make_merging(adapted)
    if fast:
        make_fast(adapted)
        speed_up(model)
    layers = adapted_layers(adapted)
    total = count_parameters(adapted) - sum(x.A.numel() + x.B.numel() for x in layers)
    statistics: Mapping[str, LayerStatistics] | None = None
    if parts.needs_probe and batches is not None:
        sketch = 4 * policy.widest(layers, total)
        statistics = probe(adapted, layers, batches, sketch=sketch, seed=seed, loss=loss, reduce=reduce)
    set_ranks(adapted, policy.start(layers, statistics, total))
    _start(parts, adapted_layers(adapted), statistics, seed)
    write_patterns(adapted)
    adapted.trivet = Plan(parts, policy)
    return adapted


def _start(
    parts: Any, layers: Sequence[AdaptedLayer], statistics: Mapping[str, LayerStatistics] | None, seed: int
) -> None:
    options = parts.options("decompose")
    parts.part("decompose")(layers, torch.Generator().manual_seed(seed), statistics, **options)


def heads_pattern(heads: Sequence[str] | None) -> str | None:
    """PEFT's `exclude_modules` for parts that are trained whole or left as they are; None where there are none."""
    return rf"(.*\.)?({'|'.join(map(re.escape, heads))})(\..*)?" if heads else None


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Without PEFT's warnings that ask nothing of anybody."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # it is set right for Conv1D by itself
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        yield


def task_of(model: Any) -> str:
    """What the model's class is built for."""
    name, config = type(model).__name__, getattr(model, "config", None)
    if "SequenceClassification" in name:
        return "regression" if getattr(config, "problem_type", None) == "regression" else "classification"
    if re.search(r"ForCausalLM|LMHeadModel$", name) and not getattr(config, "is_encoder_decoder", False):
        return "causal-lm"
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    raise ConfigError(f"can't tell what to train {name} for; pass task=, one of {', '.join(_TASK_TYPES)}")


def _not_adapted(model: Any) -> list[str]:
    """Linear layers to which nothing can be added outside: experts' routers and grouped layers, which compute something
    else, and what Mamba reads the weights of in a kernel of its own, where PEFT refuses it by the model's name."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    mamba = getattr(getattr(model, "config", None), "model_type", None) in _MAMBA
    others = [name for name, module in layers if type(module).__name__.endswith(("Router", "GroupedLinear"))]
    return others + [name for name, _ in layers if mamba and name.endswith(".out_proj")]


def _leave_experts(config: LoraConfig, model: Any) -> None:
    """Adapt what is around experts where transformers has those of a layer as one tensor.

    PEFT would replace the names of their layers by that tensor's, and adapt it with factors for all experts in one.
    """
    asked = copy.deepcopy(config)
    with contextlib.suppress(ValueError):  # of names of which PEFT needs more: it says so again, and better there
        convert_peft_config_for_transformers(asked, model, None)
    if not asked.target_parameters:
        return
    if config.target_modules != "all-linear":
        named, kind = ", ".join(sorted(config.target_modules)), model.config.model_type
        raise ConfigError(
            f"model.target_modules {named}: in a {kind} some of these are experts or their router, which trivet can't "
            f"adapt. Write all-linear, or choose from {', '.join(sorted(asked.target_modules))}"
        )
    config.target_modules = set(asked.target_modules)


def _check_targets(model: Any, targets: str | list[str]) -> None:
    """Refuse to adapt one of two layers that share a weight: merging would change the other."""
    if isinstance(targets, str):
        return
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    inputs = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if output is None or inputs is None or output.weight is not inputs.weight:
        return
    for name, module in model.named_modules():
        if module in (output, inputs) and any(name == t or name.endswith(f".{t}") for t in targets):
            raise AdapterError(
                f"target {name}: input and output embeddings are tied in this model, so an adapter on one could not "
                "be merged or exported; leave it out of target_modules"
            )


def leaves_experts(model: nn.Module) -> bool:
    """Whether a mixture's experts are one tensor a layer, which `attach` leaves as it is."""
    return any(p.dim() == 3 and re.search("expert|moe", name) for name, p in model.named_parameters())


def trainable_parameters(model: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
