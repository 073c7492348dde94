"""What an adapter holds: each layer's rank, the singular values of its update, and how much of the rank it uses.

An adapter folder is read by itself, without its base model: every number here is of A, B and the scale alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from trivet.adapter.layers import AdaptedLayer, adapted_layers
from trivet.adapter.load import read_checked, read_config, read_notes
from trivet.adapter.resize import departed
from trivet.adapter.validate import WEIGHTS
from trivet.errors import AdapterError
from trivet.pictures import kinds, place
from trivet.rank.score import directions, held
from trivet.runfolder import adapter_folder
from trivet.session import reopen

_START = "base_model.model."
#: What modules' names begin with, in the order in which a block computes them; files are in alphabetical order.
_FLOW = ("c_attn", "q", "k", "v", "o", "gate", "up", "c_fc", "fc1", "wi", "down", "c_proj", "fc2", "wo")


def effective_rank(singular_values: Sequence[float]) -> float:
    """exp H(p) with p = σ / Σ σ, between 1 and the number of values; 0 where all of them are 0.

    Roy & Vetterli 2007, "The effective rank: a measure of effective dimensionality", definition 1.
    """
    total = math.fsum(singular_values)
    shares = [s / total for s in singular_values if s > 0] if total > 0 else []
    return math.exp(-math.fsum(p * math.log(p) for p in shares)) if shares else 0.0


@dataclass(frozen=True)
class LayerReport:
    """One layer's update.

    Attributes:
        name: the layer's path in the base model.
        kind: what it is called together with its like in other blocks, e.g. "q_proj".
        shape: (out_features, in_features).
        rank: r; 0 for a layer that has left the adapter.
        scale: alpha / r, or alpha / √r for a rank-stabilised adapter.
        singular_values: of ΔW = scale · B A, falling, (r,).
        parameters: numbers in A and B.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    rank: int
    scale: float
    singular_values: list[float]
    parameters: int

    @property
    def effective_rank(self) -> float:
        """See `effective_rank`."""
        return effective_rank(self.singular_values)

    @property
    def unused(self) -> float:
        """The share of the rank that is not used."""
        return _unused(self.effective_rank, self.rank)

    @property
    def norm(self) -> float:
        """‖ΔW‖, Frobenius."""
        return math.hypot(*self.singular_values)


@dataclass(frozen=True)
class Summary:
    """Several layers together: `effective_rank` is their mean, `norm` the root of the summed squares."""

    kind: str
    layers: int
    smallest_rank: int
    mean_rank: float
    largest_rank: int
    effective_rank: float
    unused: float
    norm: float
    parameters: int


def summary(kind: str, layers: Sequence[LayerReport]) -> Summary:
    """The layers' figures together; `unused` is 1 − Σ effective rank / Σ rank."""
    ranks, effective = [x.rank for x in layers], math.fsum(x.effective_rank for x in layers)
    return Summary(
        kind=kind,
        layers=len(layers),
        smallest_rank=min(ranks),
        mean_rank=sum(ranks) / len(ranks),
        largest_rank=max(ranks),
        effective_rank=effective / len(layers),
        unused=_unused(effective, sum(ranks)),
        norm=math.hypot(*(x.norm for x in layers)),
        parameters=sum(x.parameters for x in layers),
    )


def _unused(effective: float, rank: int) -> float:
    """1 − effective rank / rank; 0 where there is no rank."""
    return max(0.0, 1 - effective / rank) if rank else 0.0


@dataclass(frozen=True)
class Inspection:
    """An adapter.

    Attributes:
        adapter: where it lies.
        base_model: the name that it gives; "" where it gives none.
        layers: by block, in each about as it computes them.
        kept_whole: numbers in parts that are saved whole, such as a classifier's head.
        base_parameters: of the base model; None where it was not loaded.
        remarks: what a reader of the figures has to know.
    """

    adapter: str
    base_model: str
    layers: Sequence[LayerReport]
    kept_whole: int
    base_parameters: int | None
    remarks: Sequence[str]

    @property
    def total(self) -> Summary:
        """All layers together."""
        return summary("all", self.layers)

    def by_kind(self) -> list[Summary]:
        """The layers of each kind together, in order of their first layer."""
        names = dict.fromkeys(layer.kind for layer in self.layers)
        return [summary(kind, [x for x in self.layers if x.kind == kind]) for kind in names]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        layers = [
            {**vars(x), "effective_rank": x.effective_rank, "unused": x.unused, "norm": x.norm} for x in self.layers
        ]
        own = {k: v for k, v in vars(self).items() if k != "layers"}
        together = {"total": vars(self.total), "kinds": [vars(s) for s in self.by_kind()]}
        return {**own, **together, "layers": layers}


def inspect_adapter(folder: str | Path, *, base_model: str | None = None) -> Inspection:
    """Look at a saved LoRA adapter, also one made elsewhere.

    Args:
        folder: an adapter folder, or a run folder holding `adapter/`.
        base_model: also load the adapter on this model, which proves that it fits, gives the base model's size, and
            shows layers that have left the adapter as layers of rank 0.

    Raises:
        ConfigError: there is no such folder, or no such model.
        AdapterError: it is no LoRA adapter, is damaged, or does not fit `base_model`.
    """
    path = adapter_folder(Path(folder))
    config = read_config(path)
    layers, rest = stored_layers(path)
    gone: list[tuple[str, int, int]] = []
    size = None
    if base_model is not None:
        session = reopen(path, base_model=base_model)
        layers, gone, size = adapted_layers(session.model), departed(session.model), base_size(session.model)
    remarks = []
    if config.use_dora:
        remarks.append("a DoRA adapter: the figures are of its direction's update B A, not of its magnitudes")
    if rest:
        remarks.append(f"saved whole beside the updates: {', '.join(_parts(rest))}")
    named = base_model or read_notes(path).get("base_model") or config.base_model_name_or_path or ""
    return Inspection(str(path), str(named), report(layers, gone), sum(rest.values()), size, remarks)


def report(layers: Sequence[AdaptedLayer], gone: Sequence[tuple[str, int, int]] = ()) -> list[LayerReport]:
    """The figures of `layers`, and of those that are gone, as (name, out, in)."""
    found = directions(layers, None)
    labels = kinds([*(layer.name for layer in layers), *(name for name, *_ in gone)])
    own = [
        LayerReport(
            name=layer.name,
            kind=labels[layer.name],
            shape=layer.shape,
            rank=len(found[layer.name].worth),
            scale=layer.scale,
            singular_values=(2 * found[layer.name].worth).sqrt().tolist(),
            parameters=held(layer),
        )
        for layer in layers
    ]
    left = [LayerReport(name, labels[name], (out, inside), 0, 0.0, [], 0) for name, out, inside in gone]
    return sorted(own + left, key=lambda x: _order(x.name))


def _order(name: str) -> tuple[Any, ...]:
    """Encoder before decoder, blocks by number, attention before the rest, and what is outside of blocks last."""
    where = place(name)
    last = where.module.rpartition(".")[2]
    step = next((i for i, start in enumerate(_FLOW) if last.startswith(start)), len(_FLOW))
    stack = (where.block is None, "decoder" in where.stack, where.stack, where.block)
    return (*stack, "att" not in where.module.lower(), step, where.module, name)


def base_size(model: Any) -> int:
    """The parameters of an adapted model's base: without factors and the trained copies of heads."""
    own = (p for name, p in model.named_parameters() if "lora_" not in name and ".modules_to_save." not in name)
    return sum(p.numel() for p in own)


# -- reading a folder without its base model -----------------------------------------------------------------


def stored_layers(folder: Path) -> tuple[list[AdaptedLayer], dict[str, int]]:
    """The layers of a saved adapter with the factors in its file, and the sizes of all other tensors there by name.

    Raises:
        AdapterError: the folder is no LoRA adapter, the file is damaged, or it contradicts adapter_config.json.
    """
    _, found = read_checked(folder)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"adapter {folder}: {WEIGHTS} can't be read: {error}") from error
    layers = []
    for name, scale in found.scales.items():
        kind, end = ("lora_embedding_{}", "") if name in found.embeddings else ("lora_{}", ".weight")
        parts = {kind.format(side): tensors[f"{_START}{name}.{kind.format(side)}{end}"] for side in "AB"}
        if not all(bool(part.isfinite().all()) for part in parts.values()):
            raise AdapterError(f"adapter {folder}: layer {name} holds NaN or infinity; its training diverged")
        # A layer like those of a loaded model, around the stored factors.
        layers.append(AdaptedLayer(name, scale, SimpleNamespace(**{k: {"default": v} for k, v in parts.items()})))
    return layers, {key: math.prod(shape) for key, shape in found.rest.items()}


def _parts(rest: Mapping[str, int]) -> list[str]:
    """Names of modules and their sizes, from tensors'."""
    sizes: dict[str, int] = {}
    for key, size in rest.items():
        module = key.rpartition(".")[0] if "lora_magnitude" not in key else "magnitudes"
        sizes[module] = sizes.get(module, 0) + size
    return [f"{module} ({size:,} numbers)" for module, size in sizes.items()]
