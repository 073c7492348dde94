"""Saving, exporting and merging adapters. Every save is proved: reloaded, run, and compared.

Two saved forms (docs/export.md): `native` is PEFT's own, with true ranks in `rank_pattern`/`alpha_pattern`; `portable`
has one rank and one alpha for all layers, zero-padded, as servers such as vLLM and llama.cpp expect.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from trivet.adapter.attach import heads_pattern
from trivet.adapter.forms import TRAINING_KEYS
from trivet.adapter.layers import AdaptedLayer, adapted_layers
from trivet.adapter.load import CHECKSUM, NOTES, checksum, read_config
from trivet.adapter.resize import departed, rank_config
from trivet.adapter.validate import WEIGHTS
from trivet.errors import ConfigError, ProofError
from trivet.four_bit import to_plain
from trivet.model import quiet
from trivet.runfolder import new_folder, write_json


@dataclass(frozen=True)
class Proof:
    """How far the reloaded model's logits are from the live one's: the largest difference over the largest logit.

    `why` says why the tolerance is that large, where it is larger than float32's.
    """

    error: float
    tolerance: float
    why: str = ""

    @property
    def figures(self) -> str:
        """The error and its tolerance."""
        reason = f": {self.why}" if self.why else ""
        return f"relative logit error {self.error:.1e} (tolerance {self.tolerance:.0e}{reason})"

    def __str__(self) -> str:
        return f"reloaded and compared: {self.figures}"


def save_adapter(
    model: PeftModel, folder: Path, probe: Mapping[str, torch.Tensor], *, tokenizer: Any = None, notes: Any = None
) -> Proof:
    """Write the adapter in PEFT's form and prove it.

    Args:
        model: the adapted model.
        folder: replaced as a whole, and only when the proof holds.
        probe: model inputs (as keyword arguments) that the logits are compared on.
        tokenizer: saved beside the weights.
        notes: JSON for trivet.json (base model's name, task, labels, ...).

    Raises:
        ProofError: the reloaded adapter computes something else.
        StorageError: the disk is full or the folder can't be written.
    """
    with new_folder(folder, "adapter") as temporary:
        _write(temporary, *native(model))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(temporary))
        if notes is not None:
            write_json(temporary / NOTES, {**notes, CHECKSUM: checksum(temporary / WEIGHTS)})
        return prove_adapter(model, temporary, probe)


def prove_adapter(
    model: PeftModel, folder: Path, probe: Mapping[str, torch.Tensor], tolerance: float = 1e-4, why: str = ""
) -> Proof:
    """Load the saved adapter beside the live one, on the same base, and compare their logits."""
    expected = logits(model, probe)
    live, was_training = model.active_adapter, model.training
    model.load_adapter(str(folder), adapter_name="proof", is_trainable=False)
    try:
        model.set_adapter("proof")
        found = logits(model, probe)
    finally:
        model.set_adapter(live)
        model.delete_adapter("proof")
        model.train(was_training)  # loading switches it off
    return compare_logits(expected, found, f"adapter {folder}", tolerance, why)


@torch.inference_mode()
def logits(model: Any, probe: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The model's logits on `probe`, float32, without dropout."""
    was_training = model.training
    model.eval()
    out = model(**{key: value.to(model.device) for key, value in probe.items()}).logits.float()
    model.train(was_training)
    return out


def rounding(dtype: torch.dtype) -> float:
    """The tolerance where a sum is made in another order: 1e-4 in float32, else some units of 16-bit rounding."""
    return 1e-4 if dtype == torch.float32 else 5e-2


def logit_error(expected: torch.Tensor, found: torch.Tensor) -> float:
    """The largest difference over the largest logit; NaN where either holds one."""
    scale = expected.abs().max().clamp_min(1e-6)
    return float((expected - found.to(expected.device)).abs().max() / scale)


def compare_logits(expected: torch.Tensor, found: torch.Tensor, what: str, tolerance: float, why: str = "") -> Proof:
    """A `Proof`, or `ProofError` where the largest difference exceeds `tolerance` times the largest logit."""
    error = logit_error(expected, found)
    if not error <= tolerance:  # NaN fails as well
        raise ProofError(
            f"{what}: what was saved does not compute what was trained (relative logit error {error:.1e}, tolerance "
            f"{tolerance:.0e}). Nothing was kept; please report this with your versions and config"
        )
    return Proof(error, tolerance, why)


def check_form(form: str) -> None:
    """Refuse an export format that there is not."""
    if form not in ("native", "portable"):
        raise ConfigError(f"export format {form!r} is not known; there are: native, portable")


def export(
    model: PeftModel, folder: Path, form: str, probe: Mapping[str, torch.Tensor], *, tokenizer: Any = None
) -> Proof:
    """Write the adapter in `native` or `portable` form, without trivet's notes, proved like every save."""
    check_form(form)
    if form == "native":
        return save_adapter(model, folder, probe, tokenizer=tokenizer)
    with new_folder(folder, "adapter") as temporary:
        _write(temporary, *portable(model))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(temporary))
        _prove_updates(model, temporary)
        why = "" if model.dtype == torch.float32 else "16-bit sums in another order; ΔW agrees to 1e-5"
        return prove_adapter(model, temporary, probe, rounding(model.dtype), why)


def _prove_updates(model: PeftModel, folder: Path) -> None:
    """Compare each layer's ΔW in the portable file with the live one's, in float32."""
    config, tensors = read_config(folder), load_file(folder / WEIGHTS)
    for layer in adapted_layers(model, model.active_adapter):
        a, b = (tensors[key].float() for key in _keys(layer))
        live = layer.delta().cpu()
        error = float((config.lora_alpha / config.r * b @ a - live).abs().max() / live.abs().max().clamp_min(1e-12))
        if not error <= 1e-5:
            raise ProofError(
                f"adapter {folder}: the update of layer {layer.name} is not what was trained (relative error "
                f"{error:.1e}, tolerance 1e-05). Nothing was kept; please report this with your versions and config"
            )


def _keys(layer: AdaptedLayer) -> list[str]:
    """A's and B's names in PEFT's file."""
    kind = "lora_embedding_{}" if layer.embedding else "lora_{}.weight"
    return [f"base_model.model.{layer.name}.{kind.format(side)}" for side in "AB"]


def _write(folder: Path, config: LoraConfig, tensors: dict[str, torch.Tensor]) -> None:
    config.save_pretrained(str(folder))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def native(model: PeftModel) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """PEFT's config and tensors with every layer at its own rank; cores and offsets are written out as A and B."""
    name = model.active_adapter
    config = copy.deepcopy(model.peft_config[name])
    config.inference_mode = True
    stored = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    tensors = {
        key: value.detach().cpu().clone()
        for key, value in stored.items()
        if not (".lora_" in key and key.rpartition(".")[2] in TRAINING_KEYS)
    }
    ranks = {x.name: (x.factors()[0].shape[0], x.scale) for x in adapted_layers(model, name)}
    config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern = rank_config(ranks)
    config.use_rslora = False
    return config, tensors


def portable(model: PeftModel) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """The adapter at one rank R (the largest) and one alpha: smaller layers padded with zeros, scales folded into B.

    Layers that were adapted and have left come back as zeros, so that the same modules are there in every block.
    """
    config, tensors = native(model)
    if config.use_dora:
        raise ConfigError("a DoRA adapter has no portable form: it is not of the form B A; merge it instead")
    layers = adapted_layers(model, model.active_adapter)
    rank = max(layer.factors()[0].shape[0] for layer in layers)
    scale = layers[0].scale
    for layer in layers:
        keys = _keys(layer)
        a, b = (tensors[key] for key in keys)
        missing = rank - a.shape[0]
        tensors[keys[0]] = torch.cat([a, a.new_zeros(missing, a.shape[1])])
        padded = torch.cat([b * (layer.scale / scale), b.new_zeros(b.shape[0], missing)], dim=1)
        tensors[keys[1]] = padded.contiguous()
    for name, out, inside in departed(model):
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.zeros(rank, inside)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.zeros(out, rank)
    config.r, config.lora_alpha = rank, scale * rank
    config.rank_pattern, config.alpha_pattern = {}, {}
    config.exclude_modules = heads_pattern(config.modules_to_save)
    return config, tensors


def merge(
    model: PeftModel,
    folder: Path,
    probe: Mapping[str, torch.Tensor],
    *,
    tokenizer: Any,
    dtype: torch.dtype | None = None,
) -> tuple[Any, Proof]:
    """Write a full model with the update added to its weights, which transformers loads without PEFT.

    Returns the written model, loaded again; `model` is used up. The sum is made in float32, also of weights in 4 bits,
    and rounded once, to `dtype` (default: the base's own type). Proved are the sum, before it is rounded; what rounding
    the weights changes, in float32; and the file, whose tensors must be the rounded ones bit by bit.
    """
    target, auto_class, what = dtype or model.dtype, type(model.get_base_model()), f"merged model {folder}"
    model = model.float()
    expected = logits(model, probe)
    merged = model.merge_and_unload()
    to_plain(merged)
    proof = compare_logits(expected, logits(merged, probe), what, rounding(torch.float32))
    if target != torch.float32:
        name = str(target).removeprefix("torch.")
        cast(merged, target)
        cast(merged, torch.float32)
        found, why = logits(merged, probe), f"weights are rounded to {name}, else exact"
        try:
            proof = compare_logits(expected, found, what, rounding(target), why)
        except ProofError as error:
            raise ProofError(f"{str(error).partition('. Nothing')[0]} once its weights are {name}. Nothing was kept; "
                             "merge it in float32") from error  # fmt: skip
    cast(merged, target)
    with new_folder(folder, "model") as temporary, quiet():
        merged.config.use_cache = True
        merged.save_pretrained(str(temporary), safe_serialization=True)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(temporary))
        written = auto_class.from_pretrained(str(temporary), dtype=target).to(merged.device)
        tensors = written.state_dict()
        changed = [key for key, value in merged.state_dict().items() if not torch.equal(value, tensors[key])]
        if changed:
            raise ProofError(f"{what}: {changed[0]} is not in the file as it was merged. Nothing was kept")
        compare_logits(logits(merged, probe), logits(written, probe), what, rounding(target))
        return written, proof


def cast(model: Any, dtype: torch.dtype) -> None:
    """Change the type of what is saved, in place; buffers that are not, such as rotary frequencies, stay exact."""
    saved = model.state_dict().keys()
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if name in saved and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
