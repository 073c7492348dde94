"""What was asked of an adapted model: its method, and the rank policy with what it has decided so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from trivet.adapter.layers import adapted_layers
from trivet.errors import ConfigError
from trivet.methods import Method
from trivet.rank.policy import Policy
from trivet.update.chain import rank_step, rate_apart


@dataclass
class Plan:
    """Stands on the adapted model as `model.trivet`."""

    method: Method
    policy: Policy


def plan_of(model: Any) -> Plan:
    """The plan of a model that `trivet.attach` made; `ConfigError` for any other."""
    plan = getattr(model, "trivet", None)
    if not isinstance(plan, Plan):
        raise ConfigError("this model was not made by trivet.attach, so it has no method to train by")
    return plan


def optimizer(
    model: PeftModel, *, learning_rate: float, weight_decay: float = 0.0, head_learning_rate: float | None = None
) -> torch.optim.Optimizer:
    """The method's update rule over everything that is trained.

    Give it to any Trainer: `Trainer(..., optimizers=(trivet.optimizer(model, learning_rate=1e-3), None))`.

    Args:
        model: what `trivet.attach` returned.
        learning_rate: peak rate; schedulers work on it as usual.
        weight_decay: decoupled; vectors (biases, norms) are not decayed.
        head_learning_rate: peak rate of a classification or regression head, and of whatever else is trained whole; by
            default `learning_rate`. A head starts from nothing, so it often wants a larger one than an adapter does.

    Raises:
        ConfigError: `head_learning_rate` was given, and nothing is trained whole.
    """
    plan = plan_of(model)
    layers = adapted_layers(model)
    inside = {id(p) for layer in layers for p in layer.trained()}
    rest = [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in inside]
    rule = plan.method.part("update")
    made = rule(layers, rest, learning_rate=learning_rate, weight_decay=weight_decay, **plan.method.options("update"))
    if plan.policy.rank_aware_step:
        rank_step(made, layers)
    if head_learning_rate is not None:
        heads = [p for name, p in rest if ".modules_to_save." in name]
        if not heads:
            raise ConfigError(
                f"head_learning_rate is {head_learning_rate:g}, but this model has no head that is trained beside its "
                "adapter; leave it null"
            )
        rate_apart(made, heads, head_learning_rate)
    return made
