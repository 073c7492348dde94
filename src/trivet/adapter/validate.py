"""Adapters from strangers: the config is compared with the weights and the base model before PEFT sees either.

PEFT makes room for the ranks that the config names before it opens the weights, and runs the config's patterns as
regular expressions on every module's name. So ranks are compared with the shapes in the weights' header and the base
model's layers first, and patterns are tried with a time limit and written out as names.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import regex
from peft import LoraConfig
from peft.tuners.tuners_utils import (
    _get_in_out_features,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from safetensors import SafetensorError, safe_open

from trivet.adapter.resize import rank_config
from trivet.adapter.schema import checked_values, read_json, shown
from trivet.errors import AdapterError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

#: Seconds for all patterns of one adapter; honest ones take a few hundredths.
PATIENCE = 10.0
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.weight)?")
_KINDS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class Stored:
    """What the weights' header says.

    Attributes:
        layers: name -> shapes of A (r, in) and B (out, r).
        scales: name -> s of ΔW = s B A, by the config.
        embeddings: those of the layers that are embeddings.
        rest: shapes of all other tensors by name.
        kinds: the tensors' types, as safetensors names them.
    """

    layers: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    scales: Mapping[str, float]
    embeddings: frozenset[str]
    rest: Mapping[str, tuple[int, ...]]
    kinds: frozenset[str]


def read_header(folder: Path) -> Stored:
    """The header of an adapter's weights, without scales; no tensor is read.

    Raises:
        AdapterError: the file is damaged, holds other than floating-point tensors, or no pairs of matrices.
    """
    where = f"adapter {folder}"
    try:
        with safe_open(folder / WEIGHTS, framework="np") as file:  # compares the header with the file's length
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
            shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
            kinds = {key: str(part.get_dtype()) for key, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{where}: {WEIGHTS} can't be read, it is damaged: {error}") from error
    factors: dict[str, dict[str, tuple[int, ...]]] = {}
    rest = {}
    for key, shape in shapes.items():
        if kinds[key] not in _KINDS:
            raise AdapterError(f"{where}: {WEIGHTS} holds {key} of type {kinds[key]}, where floating point is needed")
        found = _FACTOR.fullmatch(key.removeprefix(_PREFIX))
        if found:
            factors.setdefault(found[1], {})[f"{found[2] or ''}{found[3]}"] = shape
        elif re.search(r"\.lora_[AB]\.", key) and not key.endswith(".bias"):
            raise AdapterError(
                f"{where}: holds {key}, which is no plain factor; a checkpoint of a run is no saved adapter: "
                "name the run folder or its adapter/"
            )
        else:
            rest[key.removeprefix(_PREFIX)] = shape
    if not factors:
        raise AdapterError(f"{where}: {WEIGHTS} holds no LoRA factors")
    layers = {}
    for name, parts in factors.items():
        embedded = not parts.keys() & {"A", "B"}
        a, b = (parts.get(f"{'embedding_' if embedded else ''}{side}", ()) for side in "AB")
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or len(parts) != 2 or 0 in (*a, *b):
            sizes = " and ".join("x".join(map(str, x)) or "nothing" for x in (a, b))
            raise AdapterError(
                f"{where}: layer {name} holds {sizes} for A and B, where r x in and out x r are needed; the file "
                "is damaged, or the layer is no linear layer or embedding"
            )
        layers[name] = (a, b)
    embeddings = frozenset(name for name, parts in factors.items() if "embedding_A" in parts)
    return Stored(layers, {}, embeddings, rest, frozenset(kinds.values()))


def check_config(folder: Path) -> tuple[LoraConfig, Stored]:
    """The adapter's config, checked, and its weights' header. Patterns of ranks and alphas are written out as names.

    Raises:
        AdapterError: a key is wrong or unknown, or the config contradicts the weights.
    """
    where, path = f"adapter {folder}", folder / CONFIG
    try:
        config = LoraConfig(**checked_values(read_json(path), path))
    except (ValueError, TypeError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"{path}: can't be read: {error}") from error
    found = read_header(folder)
    _check_tokens(config, found, where)
    return config, replace(found, scales=_check_ranks(config, found, where))


def _check_ranks(config: LoraConfig, found: Stored, where: str) -> dict[str, float]:
    """Compare every rank with the header, and write patterns out as names; the layers' scales."""
    ends = _Clock(where)
    patterns: dict[str, list[tuple[Any, float]]] = {}
    for key in ("rank_pattern", "alpha_pattern"):
        of_peft = {pattern: rf"(.*\.)?({pattern})$" for pattern in getattr(config, key)}  # as `get_pattern_key` has it
        patterns[key] = [(ends.compiled(of_peft[p], key, p), value) for p, value in getattr(config, key).items()]
    layers = {}
    for name, (a, _) in found.layers.items():
        rank, alpha = (
            next((value for pattern, value in patterns[key] if ends.matches(pattern.match, name, key)), default)
            for key, default in (("rank_pattern", config.r), ("alpha_pattern", config.lora_alpha))
        )
        if rank != a[0]:
            raise AdapterError(
                f"{where}: layer {name} has rank {a[0]} in {WEIGHTS}, but {rank} by {CONFIG}; "
                "the two files do not belong together"
            )
        layers[name] = (int(rank), alpha / (math.sqrt(rank) if config.use_rslora else rank))
    if config.rank_pattern or config.alpha_pattern:
        config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern = rank_config(layers)  # type: ignore[assignment]
        config.use_rslora = False
    return {name: scale for name, (_, scale) in layers.items()}


def _check_tokens(config: LoraConfig, found: Stored, where: str) -> None:
    """Rows of trained tokens are as many in the file as the config names."""
    tokens = config.trainable_token_indices
    for numbers in tokens.values() if isinstance(tokens, dict) else [tokens or []]:
        held = [shape for key, shape in found.rest.items() if "trainable_tokens" in key and shape]
        if numbers and not any(shape[0] == len(numbers) for shape in held):
            raise AdapterError(
                f"{where}: {CONFIG}: `trainable_token_indices` names {len(numbers):,} tokens, which {WEIGHTS} lacks"
            )


class _Clock:
    """Runs a stranger's patterns until the time is up."""

    def __init__(self, where: str) -> None:
        self.where, self.until = where, time.monotonic() + PATIENCE

    def compiled(self, pattern: str, key: str, written: str) -> Any:
        try:
            return regex.compile(pattern)
        except (regex.error, RecursionError, OverflowError, MemoryError) as error:
            raise AdapterError(
                f"{self.where}: {CONFIG}: `{key}`: {shown(written)} is no pattern that can be read: {error}"
            ) from error

    def matches(self, match: Callable[..., Any], name: str, key: str) -> bool:
        try:
            return match(name, timeout=max(self.until - time.monotonic(), 0.001)) is not None
        except (TimeoutError, MemoryError, RecursionError) as error:
            raise AdapterError(
                f"{self.where}: {CONFIG}: `{key}` holds a pattern that takes longer than {PATIENCE:.0f} s to be tried "
                "on the layers' names; write the names instead"
            ) from error


# -- against the base model --------------------------------------------------------------------------------------------


def check_fit(config: LoraConfig, found: Stored, base_model: Any, folder: Path) -> None:
    """Compare layers and shapes with the base model's, before PEFT makes room for them.

    Patterns of target and excluded modules are written out as names.

    Raises:
        AdapterError: a layer is missing on either side, or has another size.
    """
    where = f"adapter {folder}"
    modules = {name: module for name, module in base_model.named_modules() if name}
    if config.target_modules is None:  # PEFT would look in its table of architectures, as it did in training
        config.target_modules = set(found.layers)
    _maybe_include_all_linear_layers(config, base_model)
    ends = _Clock(where)
    for key in ("target_modules", "exclude_modules"):
        pattern = getattr(config, key)
        if isinstance(pattern, str) and pattern:
            tried = ends.compiled(pattern, key, pattern).fullmatch
            names = [name for name in modules if ends.matches(tried, name, key)]
            # `departed` reads excluded layers from a pattern.
            setattr(config, key, names if key == "target_modules" else "|".join(map(re.escape, names)))
    wanted = {name: module for name, module in modules.items() if check_target_module_exists(config, name)}
    _same_names(wanted, found.layers, where)
    for name, module in wanted.items():
        (_, inside), (out, _) = found.layers[name]
        try:
            sizes = _get_in_out_features(module)
        except ValueError as error:
            raise AdapterError(f"{where}: does not fit the base model: layer {name}: {error}") from error
        if sizes != (inside, out):
            raise AdapterError(
                f"{where}: does not fit the base model or is damaged: layer {name} is {sizes[1]} x {sizes[0]} (out x "
                f"in) there and {out} x {inside} in its file"
            )


def _same_names(wanted: Iterable[str], held: Iterable[str], where: str) -> None:
    wanted, held = set(wanted), set(held)
    if lacking := sorted(wanted - held) or sorted(held - wanted):
        whose = "its file lacks" if wanted - held else "the base model has no layer for"
        raise AdapterError(
            f"{where}: does not fit the base model or is damaged: {whose} {_PREFIX}{lacking[0]}.lora_A.weight"
        )
