"""Full fine-tuning in `bench/quality.py`: an encoder's weights are trained, in float32, and put back afterwards."""

from __future__ import annotations

from typing import Any

from quality_tasks import Loaded


def attach_full(loaded: Loaded, seed: int) -> Any:
    """The base with an adapter of rank 1 that is 0 and stays so: what trains adapters trains the weights instead."""
    from trivet.adapter.attach import attach

    if not loaded.task.labelled:
        raise ValueError("full: classifiers only, as trivet's loss holds a language model's output head to be frozen")
    base = loaded.base.model
    kept = {name: tensor.detach().clone() for name, tensor in base.state_dict().items()}
    base.float()
    model = attach(base, lora_rank=1, modules_to_save=loaded.base.fresh, task=loaded.base.task, seed=seed, fast=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" not in name and ".original_module" not in name)
    model.kept = kept
    return model


def restore(loaded: Loaded, model: Any) -> None:
    """The base as it was, every tensor in its own type; nothing to do where its weights were not trained."""
    kept = getattr(model, "kept", {})
    for name, tensor in loaded.base.model.state_dict(keep_vars=True).items() if kept else ():
        tensor.data = kept[name]
