"""PEFT's own AdaLoRA in `bench/quality.py`: attached, allocated and regularised as PEFT means it."""

from __future__ import annotations

from typing import Any

from quality_tasks import Candidate, Loaded, heads


def attach_peft_adalora(loaded: Loaded, candidate: Candidate, seed: int, scale: float) -> Any:
    """From 1.5 times the target rank, as in the paper; tinit and tfinal are where trivet's own policies begin and end.

    PEFT divides alpha by the first rank for good, so `scale` is what it says from start to end.
    """
    import torch
    from peft import AdaLoraConfig, TaskType, get_peft_model

    from trivet.adapter.attach import quiet_peft
    from trivet.adapter.plan import Plan
    from trivet.methods import find_method
    from trivet.rank.fixed import Fixed

    torch.manual_seed(seed)
    first, steps, parts = -(-3 * candidate.rank // 2), loaded.task.steps, heads(loaded)
    config = AdaLoraConfig(
        init_r=first,
        target_r=candidate.rank,
        lora_alpha=scale * first,
        tinit=steps // 10,
        tfinal=steps - steps * 6 // 10,
        deltaT=max(1, steps // 60),
        total_step=steps,
        task_type=TaskType.SEQ_CLS if loaded.task.labelled else TaskType.CAUSAL_LM,
        target_modules="all-linear",
        modules_to_save=parts or None,
        exclude_modules=rf"(.*\.)?({'|'.join(parts)})(\..*)?" if parts else None,
    )
    with quiet_peft():
        model = get_peft_model(loaded.base.model, config)
    model.trivet = Plan(find_method("lora"), Fixed(candidate.rank))  # trivet itself changes nothing
    return model


def follow_adalora(trainer: Any, model: Any, settings: Any) -> None:
    """What PEFT leaves to the caller of AdaLoRA: the allocation after each step, the orthogonality term of the loss.

    PEFT adds that term in its forward pass where labels are given; our Trainer computes the loss outside of it.
    """
    if not is_adalora(model):
        return
    import torch
    from transformers import TrainerCallback

    from trivet.update.chain import rate_apart

    class Allocate(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            model.base_model.update_and_allocate(state.global_step)

    task_loss = trainer.compute_loss

    def loss(*args: Any, **rest: Any) -> Any:
        return task_loss(*args, **rest) + orthogonality(model)

    trainer.compute_loss = loss
    trainer.add_callback(Allocate())
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    trainer.optimizer = torch.optim.AdamW([p for _, p in trained], lr=settings.learning_rate, weight_decay=0.0)
    if settings.head_learning_rate is not None:
        rate_apart(
            trainer.optimizer, [p for name, p in trained if "modules_to_save" in name], settings.head_learning_rate
        )


def orthogonality(model: Any) -> Any:
    """How far AdaLoRA's factors are from orthonormal, as `AdaLoraModel.forward` adds it to a loss of its own."""
    import torch

    factors = [(name, p) for name, p in model.named_parameters() if "lora_A" in name or "lora_B" in name]
    grams = [p @ p.T if "lora_A" in name else p.T @ p for name, p in factors]
    norms = [torch.linalg.norm(gram - torch.eye(len(gram), device=gram.device)) for gram in grams]
    return model.peft_config["default"].orth_reg_weight * sum(norms) / len(norms)


def is_adalora(model: Any) -> bool:
    return hasattr(model.peft_config["default"], "target_r")


def masked_parameters(model: Any) -> int:
    """What AdaLoRA has masked: PEFT keeps the tensors but leaves them out when it saves."""
    masks = model.peft_config["default"].rank_pattern if is_adalora(model) else None
    tensors = dict(model.base_model.model.named_parameters())
    return sum(
        mask.count(False)
        * (1 + tensors[name.replace("_E", "_A")].shape[1] + tensors[name.replace("_E", "_B")].shape[0])
        for name, mask in (masks or {}).items()
    )
