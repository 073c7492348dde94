"""Loading saved adapters, also ones made elsewhere: nothing of them is trusted before it is checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open

from trivet.adapter.attach import quiet_peft
from trivet.adapter.fast import make_merging
from trivet.adapter.schema import check_notes, read_json
from trivet.adapter.validate import CONFIG, WEIGHTS, Stored, check_config, check_fit
from trivet.errors import AdapterError, ConfigError
from trivet.runfolder import sha256

#: What trivet remembers beside PEFT's files: how to load the base again and how rows were put to it.
NOTES = "trivet.json"
#: Its key for the SHA-256 of the weights' file: a flipped bit in a number leaves a file that is as readable as before.
CHECKSUM = "weights_sha256"


def read_notes(folder: Path) -> dict[str, Any]:
    """trivet.json of an adapter; {} for one made elsewhere."""
    path = folder / NOTES
    if not path.exists():
        return {}
    notes = read_json(path)
    check_notes(notes, path)
    return notes


def read_config(folder: Path) -> LoraConfig:
    """The adapter's PEFT config, checked. Raises `AdapterError` where the folder holds no sound LoRA adapter."""
    return read_checked(folder)[0]


def read_checked(folder: Path) -> tuple[LoraConfig, Stored]:
    """The config, and what the weights' header says. Raises `AdapterError` as `read_config`."""
    if not folder.is_dir():
        raise ConfigError(f"adapter {folder}: no such folder")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            hint = (
                "; .bin files are pickles, which trivet does not open: convert it to safetensors"
                if name == WEIGHTS
                else ""
            )
            raise AdapterError(f"adapter {folder}: has no {name}, so it is no saved adapter{hint}")
    found = check_config(folder)
    noted = read_notes(folder).get(CHECKSUM)
    if noted is not None and noted != checksum(folder / WEIGHTS):
        raise AdapterError(
            f"adapter {folder}: {WEIGHTS} is not the file that was saved: it is damaged, or was changed; if on "
            f"purpose, take {CHECKSUM} out of {NOTES}"
        )
    return found


def checksum(file: Path) -> str:
    """SHA-256 of a file of an adapter."""
    try:
        return sha256(file)
    except OSError as error:
        raise AdapterError(f"{file}: can't be read: {error}") from error


def load_adapter(base_model: Any, folder: Path, *, trainable: bool = False) -> PeftModel:
    """Put a saved adapter on its base model. Raises `AdapterError` where it is unsound or does not fit."""
    config, found = read_checked(folder)
    check_fit(config, found, base_model, folder)
    whole = tuple(f"base_model.model.{name}." for name in _embeddings(base_model))
    try:
        with quiet_peft():
            model = PeftModel.from_pretrained(base_model, str(folder), config=config, is_trainable=trainable)
        make_merging(model)
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            held = set(file.keys())
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise AdapterError(f"adapter {folder}: does not fit the base model or is damaged: {reason}") from error
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    # PEFT only warns about tensors that the file lacks, and says nothing of those that the base model has no place for.
    if changed := sorted(key for key in held - wanted if ".lora_" not in key and not key.startswith(whole)):
        raise AdapterError(
            f"adapter {folder}: holds {changed[0]}, which is no part of an adapter: it would change the base model"
        )
    odd = sorted(wanted - held) + sorted(key for key in held - wanted if ".lora_" in key)
    if odd:
        whose = "its file lacks" if odd[0] in wanted else "the base model has no layer for"
        raise AdapterError(f"adapter {folder}: does not fit the base model or is damaged: {whose} {odd[0]}")
    return model


def _embeddings(model: Any) -> list[str]:
    """Input and output embeddings, which PEFT saves whole where an adapter has added tokens."""
    found = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [name for name, module in model.named_modules() if any(module is each for each in found)]
