"""Saving, exporting, merging, and loading adapters. Every save is proved: reloaded, run, and compared.

Two saved forms (docs/export.md): `native` is PEFT's own, with true ranks in `rank_pattern`/`alpha_pattern`; `portable`
has one rank and one alpha for all layers, zero-padded, as servers such as vLLM and llama.cpp expect.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from trivet.adapter.attach import heads_pattern, quiet_peft
from trivet.adapter.forms import TRAINING_KEYS
from trivet.adapter.layers import adapted_layers
from trivet.adapter.resize import departed, rank_config
from trivet.errors import AdapterError, ConfigError, ProofError
from trivet.model import quiet
from trivet.runfolder import new_folder, write_json

log = logging.getLogger("trivet")

#: What trivet remembers beside PEFT's files: how to load the base again and how rows were put to it.
NOTES = "trivet.json"
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class Proof:
    """How far the reloaded model's logits are from the live one's: the largest difference over the largest logit."""

    error: float
    tolerance: float

    def __str__(self) -> str:
        return f"reloaded and compared: relative logit error {self.error:.1e} (tolerance {self.tolerance:.0e})"


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
            write_json(temporary / NOTES, notes)
        return prove_adapter(model, temporary, probe)


def prove_adapter(model: PeftModel, folder: Path, probe: Mapping[str, torch.Tensor], tolerance: float = 1e-4) -> Proof:
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
    return compare_logits(expected, found, f"adapter {folder}", tolerance)


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


def compare_logits(expected: torch.Tensor, found: torch.Tensor, what: str, tolerance: float) -> Proof:
    """A `Proof`, or `ProofError` where the largest difference exceeds `tolerance` times the largest logit."""
    scale = expected.abs().max().clamp_min(1e-6)
    error = float((expected - found.to(expected.device)).abs().max() / scale)
    if not error <= tolerance:  # NaN fails as well
        raise ProofError(
            f"{what}: what was saved does not compute what was trained (relative logit error {error:.1e}, tolerance "
            f"{tolerance:.0e}). Nothing was kept; please report this with your versions and config"
        )
    return Proof(error, tolerance)


def read_notes(folder: Path) -> dict[str, Any]:
    """trivet.json of an adapter; {} for one made elsewhere."""
    path = folder / NOTES
    if not path.exists():
        return {}
    try:
        notes = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path}: can't be read: {error}") from error
    if not isinstance(notes, dict):
        raise AdapterError(f"{path}: can't be read: it is no JSON object")
    return notes


def read_config(folder: Path) -> LoraConfig:
    """The adapter's PEFT config. Raises `AdapterError` where the folder holds no readable LoRA adapter."""
    if not folder.is_dir():
        raise ConfigError(f"adapter {folder}: no such folder")
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            hint = (
                "; .bin files are pickles, which trivet does not open: convert it to safetensors"
                if name == _WEIGHTS
                else ""
            )
            raise AdapterError(f"adapter {folder}: has no {name}, so it is no saved adapter{hint}")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise AdapterError(f"adapter {folder}: adapter_config.json can't be read: {error}") from error
    if not isinstance(config, LoraConfig):
        raise AdapterError(f"adapter {folder}: is of type {config.peft_type}, not LoRA")
    return config


def load_adapter(base_model: Any, folder: Path, *, trainable: bool = False) -> PeftModel:
    """Put a saved adapter on its base model. Raises `AdapterError` where it does not fit."""
    read_config(folder)
    try:
        with quiet_peft():
            model = PeftModel.from_pretrained(base_model, str(folder), is_trainable=trainable)
        with safe_open(folder / _WEIGHTS, framework="pt") as file:
            stored = set(file.keys())
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise AdapterError(f"adapter {folder}: does not fit the base model or is damaged: {reason}") from error
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    # PEFT only warns about layers that the file lacks, and says nothing of layers that the base model lacks.
    odd = sorted(wanted - stored) + sorted(key for key in stored - wanted if ".lora_" in key)
    if odd:
        whose = "its file lacks" if odd[0] in wanted else "the base model has no layer for"
        raise AdapterError(f"adapter {folder}: does not fit the base model or is damaged: {whose} {odd[0]}")
    return model


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
        return prove_adapter(model, temporary, probe, rounding(model.dtype))


def _write(folder: Path, config: LoraConfig, tensors: dict[str, torch.Tensor]) -> None:
    config.save_pretrained(str(folder))
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})


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
        kind = "lora_embedding_{}" if layer.embedding else "lora_{}.weight"
        keys = [f"base_model.model.{layer.name}.{kind.format(side)}" for side in "AB"]
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

    Returns the merged model too; `model` is used up. The sum is made in float32 and rounded once, to `dtype`
    (default: the base's own type).
    """
    expected, target = logits(model, probe), dtype or model.dtype
    auto_class = type(model.get_base_model())
    merged = model.float().merge_and_unload().to(target)
    with new_folder(folder, "model") as temporary, quiet():
        merged.config.use_cache = True
        merged.save_pretrained(str(temporary), safe_serialization=True)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(temporary))
        reloaded = auto_class.from_pretrained(str(temporary), dtype=target).to(merged.device)
        return merged, compare_logits(expected, logits(reloaded, probe), f"merged model {folder}", rounding(target))
