"""Proof of artefacts: an adapter or merged model is whole, and computes what another one computes.

Everything is loaded in float32, whatever type it was trained or written in, so that nothing but the artefacts differs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from trivet.adapter.load import read_config, read_notes
from trivet.adapter.save import Proof, cast, logit_error, logits, rounding
from trivet.adapter.schema import read_json
from trivet.adapter.validate import CONFIG, WEIGHTS
from trivet.errors import AdapterError, ConfigError, ModelError, ProofError, TrivetError
from trivet.inspection import stored_layers
from trivet.model import load_base
from trivet.runfolder import adapter_folder
from trivet.session import Session, make_encoder, reopen

_INDEX, _WHOLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class Artefact:
    """An adapter or a full model whose files are whole.

    Attributes:
        folder: where its files are.
        kind: "adapter" or "model".
        about: ranks, numbers, types.
        types: of its floating-point tensors.
    """

    folder: Path
    kind: str
    about: str
    types: frozenset[torch.dtype]

    @property
    def rounded_to(self) -> torch.dtype | None:
        """The 16-bit type that a full model's weights were rounded to; None for an adapter, and in float32."""
        sixteen = self.types & {torch.bfloat16, torch.float16}
        return next(iter(sixteen), None) if self.kind == "model" else None

    def __str__(self) -> str:
        return f"{self.kind} {self.folder}: {self.about}"


@dataclass(frozen=True)
class Verification:
    """One artefact that is sound, or two that compute the same.

    Attributes:
        artefacts: what was verified.
        proof: of two: how far their logits are apart, in float32.
    """

    artefacts: Sequence[Artefact]
    proof: Proof | None = None


def verify(folder: str | Path, against: str | Path | None = None, *, base_model: str | None = None) -> Verification:
    """Check that an artefact is whole and computes finite logits; with `against`, that both compute the same.

    Args:
        folder: a run folder, an adapter folder (also one made elsewhere), or the folder of a full model.
        against: likewise.
        base_model: for adapters that do not say which they belong to. Two adapters are put on the first one's.

    Raises:
        ConfigError: there is no such folder.
        AdapterError, ModelError: an artefact is damaged, contradicts itself, or does not fit its base model.
        ProofError: the two do not compute the same.
    """
    paths = [Path(folder), *([] if against is None else [Path(against)])]
    found = [check_files(path) for path in paths]
    base = base_model or next((name for x in found if x.kind == "adapter" and (name := _base_of(x.folder))), None)
    kind = next((x.rounded_to for x in found if x.rounded_to), None) if against is not None else None
    probe: dict[str, torch.Tensor] | None = None
    plain, rounded = [], []
    for artefact in found:
        session = _open(artefact, base, kind or torch.float32)
        probe = session.probe() if probe is None else probe
        plain.append(_logits(session.model, probe, artefact))
        rounded.append(_logits(_rounded(session.model, kind), probe, artefact) if kind else plain[-1])
    return Verification(found, None if against is None else _compare(found, plain, rounded, kind))


def _base_of(folder: Path) -> str | None:
    return read_notes(folder).get("base_model") or read_config(folder).base_model_name_or_path


def _open(artefact: Artefact, base: str | None, kind: torch.dtype) -> Session:
    """In float32; an adapter's base model is read in `kind`, as a model merged in that type began with it."""
    folder = artefact.folder
    if artefact.kind == "adapter":
        session = reopen(folder, base_model=base, dtype=str(kind).removeprefix("torch."), fast=False)
        session.model.float()
        return session
    config = read_json(folder / "config.json")
    built_for = " ".join(map(str, config.get("architectures") or ()))
    labels = list((config.get("id2label") or {}).values())
    task = "auto"
    if "SequenceClassification" in built_for:
        task = "classification" if len(labels) > 1 else "regression"
    whole = load_base(str(folder), task=task, labels=labels if task == "classification" else None, dtype="float32")
    data = {"max_length": 1024, "chat_template": "auto", "loss_on": "responses"}
    return Session(whole, whole.model, make_encoder(whole, data), data)


def _logits(model: Any, probe: Mapping[str, torch.Tensor], artefact: Artefact) -> torch.Tensor:
    """Of the probe rows. Raises `ProofError` where they are no numbers or the model has other tokens."""
    if int(probe["input_ids"].max()) >= model.get_input_embeddings().num_embeddings:
        raise ProofError(f"{artefact.kind} {artefact.folder}: has another vocabulary than what it is compared with")
    found = logits(model, probe).cpu()
    if not bool(found.isfinite().all()):
        raise ProofError(f"{artefact.kind} {artefact.folder}: computes NaN or infinity on two rows of random tokens")
    return found


def _rounded(model: Any, kind: torch.dtype) -> Any:
    """The full model with its weights rounded once to a 16-bit type, in float32; uses `model` up."""
    whole = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    cast(whole, kind)
    cast(whole, torch.float32)
    return whole


def _compare(
    found: Sequence[Artefact],
    plain: Sequence[torch.Tensor],
    rounded: Sequence[torch.Tensor],
    kind: torch.dtype | None,
) -> Proof:
    if plain[0].shape != plain[1].shape:
        sizes = " and ".join("x".join(map(str, x.shape)) for x in plain)
        raise ProofError(f"{found[0].folder} and {found[1].folder}: their logits differ in shape, {sizes}")
    error, tolerance, why = logit_error(*plain), rounding(torch.float32), ""
    if kind is not None:
        name, exact = str(kind).removeprefix("torch."), logit_error(*rounded)
        if exact <= tolerance:
            return Proof(exact, tolerance, f"both rounded to {name} once; {error:.1e} without")
        tolerance, why = rounding(kind), f"weights in {name}, which are not those of float32 rounded once"
    if not error <= tolerance:
        raise ProofError(
            f"{found[0].folder}: does not compute what {found[1].folder} computes: relative logit error {error:.1e} "
            f"(tolerance {tolerance:.0e}), in float32 on two rows of random tokens"
        )
    return Proof(error, tolerance, why)


# -- files -------------------------------------------------------------------------------------------------------------


def check_files(path: Path) -> Artefact:
    """Look at an artefact's files without its base model.

    Raises:
        ConfigError: there is no such folder.
        AdapterError, ModelError: a file is missing or damaged, contradicts another, or holds NaN or infinity.
    """
    if not path.is_dir():
        raise ConfigError(f"{path}: no such folder")
    folder = path if (path / CONFIG).exists() else adapter_folder(path)
    if (folder / CONFIG).exists() or (path / "config.yaml").exists():
        return _adapter(folder)
    if (folder / "config.json").exists():
        return _model(folder)
    raise AdapterError(f"{path}: holds neither {CONFIG} nor config.json, so it is neither an adapter nor a model")


def _adapter(folder: Path) -> Artefact:
    layers, _ = stored_layers(folder)
    read_notes(folder)
    size, types = _finite(folder / WEIGHTS, AdapterError)
    ranks, scales = {layer.rank for layer in layers}, {f"{layer.scale:.4g}" for layer in layers}
    span = f"rank {min(ranks)}" if len(ranks) == 1 else f"ranks {min(ranks)} to {max(ranks)}"
    scale = f"scale {min(scales)}" if len(scales) == 1 else f"{len(scales)} scales"
    about = f"{len(layers):,} layers, {span}, {scale}, {size:,} numbers in {_names(types)}"
    return Artefact(folder, "adapter", about, types)


def _model(folder: Path) -> Artefact:
    config = read_json(folder / "config.json")
    size, types = 0, frozenset[torch.dtype]()
    for name in _shards(folder):
        numbers, kinds = _finite(folder / name, ModelError)
        size, types = size + numbers, types | kinds
    kind = ", ".join(map(str, config.get("architectures") or ["no architecture"]))
    return Artefact(folder, "model", f"{kind}, {size:,} numbers in {_names(types)}", types)


def _shards(folder: Path) -> list[str]:
    """The model's files of weights, all of them there and inside the folder."""
    names = [_WHOLE]
    if not (folder / _WHOLE).exists() and (folder / _INDEX).exists():
        table = read_json(folder / _INDEX, limit=64 << 20).get("weight_map")
        names = sorted({str(name) for name in table.values()}) if isinstance(table, dict) else []
        odd = [name for name in names if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name)]
        if odd or not names:
            raise ModelError(f"{folder / _INDEX}: names no files of this folder: {odd[:1] or table!r:.80}")
    for name in names:
        if not (folder / name).is_file():
            hint = "; .bin files are pickles, which can run code: convert them" if [*folder.glob("*.bin")] else ""
            raise ModelError(f"model {folder}: has no {name}{hint}")
    return names


def _finite(file: Path, kind: type[TrivetError]) -> tuple[int, frozenset[torch.dtype]]:
    """How many numbers a file of weights holds, and their types. Raises `kind` where it is damaged or holds NaN."""
    size, types = 0, set[torch.dtype]()
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                tensor = tensors.get_tensor(name)
                if tensor.is_floating_point():
                    if not bool(tensor.float().isfinite().all()):
                        raise kind(f"{file}: {name} holds NaN or infinity")
                    size, types = size + tensor.numel(), types | {tensor.dtype}
    except (SafetensorError, OSError) as error:
        raise kind(f"{file}: can't be read, it is damaged: {error}") from error
    return size, frozenset(types)


def _names(types: frozenset[torch.dtype]) -> str:
    return " and ".join(sorted(str(kind).removeprefix("torch.") for kind in types)) or "no floating-point type"
