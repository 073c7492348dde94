"""Squeezing a trained adapter, also one made elsewhere, to a budget: the same prices as `squeeze`, after the fact.

Every direction of every layer's update has a worth and a cost in parameters, and the best are kept at one price for the
whole model. The worth is the loss that its removal is predicted to cost where calibration rows are given, else its
share of ‖ΔW‖².
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trivet.adapter.layers import AdaptedLayer, Change, adapted_layers
from trivet.adapter.load import read_config, read_notes
from trivet.adapter.resize import departed, resize, tried
from trivet.adapter.save import Proof, native, save_adapter
from trivet.calibration import halves, mean_loss, statistics_of
from trivet.data.dataset import Dataset, load_dataset
from trivet.data.encode import Encoded, encode_dataset
from trivet.errors import AdapterError, ConfigError
from trivet.inspection import base_size, stored_layers
from trivet.rank.allocate import allocate, spent
from trivet.rank.budget import budget_problem
from trivet.rank.budget import parameters as in_parameters
from trivet.rank.policy import parameters
from trivet.rank.score import Directions, costs, cut, directions
from trivet.runfolder import adapter_folder
from trivet.session import LABELLED, Session, reopen

#: What is tried beside the budget that was asked for, as shares of what the adapter holds.
SHARES = {"whole": 1.0, "1/2": 1 / 2, "1/4": 1 / 4, "1/8": 1 / 8, "1/16": 1 / 16}
#: A tokenizer's files, as far as an adapter folder has them.
_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_*",
)


@dataclass(frozen=True)
class Choice:
    """What a budget buys.

    Attributes:
        label: "whole", "1/2", ..., "asked", or "none" for the base model.
        budget, parameters: allowed, and held.
        ranks: by layer name.
        price: worth per parameter of the dearest direction that was dropped; 0 where none was.
        kept: share of the worth of all directions that is kept: of ‖ΔW‖², or of the predicted loss.
        loss: of the held-out rows, in nats per supervised token or row; None without calibration rows.
    """

    label: str
    budget: int
    parameters: int
    ranks: Mapping[str, int]
    price: float
    kept: float
    loss: float | None = None

    @property
    def layers(self) -> int:
        """How many layers keep an update."""
        return sum(rank > 0 for rank in self.ranks.values())


@dataclass(frozen=True)
class Compression:
    """`choices` fall in size; `chosen` is what the model was squeezed to.

    Attributes:
        probed, measured: rows that priced the directions, and other rows that the losses are of; 0 without rows.
    """

    choices: Sequence[Choice]
    chosen: Choice
    probed: int = 0
    measured: int = 0


def compress(
    session: Session, budget: Any, calibration: Dataset | None = None, *, batch_size: int = 8, seed: int = 0
) -> Compression:
    """Squeeze `session.model` in place to `budget`.

    Args:
        session: with a LoRA adapter of plain factors, as `reopen` gives.
        budget: a number, "500k", "0.5%" (of the base model's parameters) or "r4-equivalent" (what plain LoRA of rank 4
            on the same layers holds). Heads that are saved whole are kept as they are and not counted.
        calibration: rows like those that the adapter was trained on. One half prices the directions by what they do
            for the loss; on the other half the losses of the table are measured. None prices by singular values.
        batch_size: rows of one forward and backward pass.
        seed: chooses the halves.

    Raises:
        ConfigError: the budget can't be read, holds no direction or is not below what the adapter holds, or the
            adapter is of a form that has no directions to drop.
        DataError: the rows do not suit the task, or are fewer than two.
    """
    model = session.model
    _check_form(model.peft_config[model.active_adapter])
    layers = adapted_layers(model)
    odd = [layer for layer in layers if layer.form != "plain" or layer.A.ndim != 2]
    if odd:
        raise ConfigError(f"layer {odd[0].name}: its factors are no plain matrices; save the adapter and reopen it")
    allowed, whole = _allowed(budget, model, layers), parameters(layers)
    if allowed >= whole:
        raise ConfigError(
            f"budget {budget} allows {allowed:,} parameters, and the adapter holds {whole:,}: there is nothing to "
            "compress; name a smaller budget"
        )
    statistics, held, probed, measured = None, None, 0, 0
    if calibration is not None:
        pricing, rest = halves(calibration, session, seed)
        statistics = statistics_of(
            session, layers, encode_dataset(pricing, session.encoder)[0], batch_size=batch_size, seed=seed
        )
        held, probed, measured = encode_dataset(rest, session.encoder)[0], len(pricing), len(rest)
    found = directions(layers, statistics)
    budgets = {label: int(share * whole) for label, share in SHARES.items()} | {"asked": allowed}
    choices = [_choose(label, amount, layers, found) for label, amount in budgets.items()]
    chosen = choices[-1]
    if not chosen.parameters:
        raise ConfigError(
            f"budget {budget} allows {allowed:,} parameters, and the first direction to be kept takes "
            f"{_first(layers, found):,}; name a larger budget"
        )
    if held is not None:
        nothing = _choose("none", 0, layers, found)
        choices = [_with_loss(c, session, layers, found, held, batch_size) for c in [*choices, nothing]]
        chosen = choices[-2]
    resize(model, _changes(chosen, layers, found))
    choices.sort(key=lambda c: -c.budget)
    return Compression(choices, chosen, probed, measured)


def _check_form(config: Any) -> None:
    """Refuse what is no sum of directions, or whose parts would be lost with a layer."""
    if config.use_dora:
        raise ConfigError("a DoRA adapter can't be compressed: it normalises W + ΔW as a whole; merge it instead")
    if config.lora_bias or config.bias != "none":
        raise ConfigError("the adapter has trained biases, which belong to no direction, so it can't be compressed")


def _allowed(budget: Any, model: Any, layers: Sequence[AdaptedLayer]) -> int:
    """A written budget in parameters. Layers that have left count for `r4-equivalent`, as they did in training."""
    shapes = [*(layer.shape for layer in layers), *((out, inside) for _, out, inside in departed(model))]
    _check_budget(budget)
    return in_parameters(budget, shapes, base_size(model))


def _check_budget(budget: Any) -> None:
    problem = budget_problem(budget)
    if problem:
        raise ConfigError(f"budget {budget!r} can't be read: a budget {problem}")


# -- which directions ----------------------------------------------------------------------------------------


def _choose(label: str, budget: int, layers: Sequence[AdaptedLayer], found: Mapping[str, Directions]) -> Choice:
    worth = [found[layer.name].worth.tolist() for layer in layers]
    cost = [costs(layer, layer.rank) for layer in layers]
    ranks, price = allocate(worth, cost, budget, at_least=0)
    total = sum(map(sum, worth))
    kept = sum(sum(w[:r]) for w, r in zip(worth, ranks, strict=True)) / total if total else 1.0
    names = (layer.name for layer in layers)
    return Choice(label, budget, spent(ranks, cost), dict(zip(names, ranks, strict=True)), price, kept)


def _first(layers: Sequence[AdaptedLayer], found: Mapping[str, Directions]) -> int:
    """The size of the direction of the highest worth per parameter."""
    return sum(max(layers, key=lambda x: float(found[x.name].worth[0]) / sum(x.shape)).shape)


def _changes(choice: Choice, layers: Sequence[AdaptedLayer], found: Mapping[str, Directions]) -> dict[str, Change]:
    return cut(layers, found, [choice.ranks[layer.name] for layer in layers])


def _with_loss(
    choice: Choice,
    session: Session,
    layers: Sequence[AdaptedLayer],
    found: Mapping[str, Directions],
    rows: Sequence[Encoded],
    batch_size: int,
) -> Choice:
    with tried(layers, _changes(choice, layers, found)):
        loss = mean_loss(session, rows, batch_size=batch_size)
    return Choice(**{**vars(choice), "loss": loss})


# -- folders -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """A compressed adapter on disk, proved like every save."""

    folder: Path
    compression: Compression
    proof: Proof


def compress_adapter(
    folder: str | Path,
    budget: Any,
    *,
    output: str | Path | None = None,
    data: Any = None,
    base_model: str | None = None,
    max_rows: int | None = 256,
) -> Written:
    """Write a compressed copy of a saved LoRA adapter, with its tokenizer and notes.

    Args:
        folder: an adapter folder, also one made elsewhere, or a run folder holding `adapter/`.
        budget: see `compress`.
        output: where to write; default: `<folder>-compressed` beside it. It must not exist.
        data: calibration rows: what `load_dataset` takes; of a hub data set, its train split.
        base_model: where the adapter does not say which it belongs to.
        max_rows: so many rows of `data`, chosen at random.

    Raises:
        ConfigError: as `compress`, or `output` exists.
        AdapterError: it is no LoRA adapter, is damaged, does not fit, or has parts that would be lost.
        ProofError: what was saved computes something else.
    """
    _check_budget(budget)
    source, target = adapter_folder(Path(folder)), _target(Path(folder), output)
    _check_form(read_config(source))
    _, rest = stored_layers(source)
    session = reopen(source, base_model=base_model)
    _, carried = native(session.model)
    lost = [name for name in rest if f"base_model.model.{name}" not in carried]
    if lost:
        raise AdapterError(
            f"adapter {source}: holds {lost[0]} whole, as for added tokens; a compressed copy would lose it"
        )
    rows = None
    if data is not None:
        task = session.base.task
        rows = load_dataset(data, format=task if task in LABELLED else "auto").shuffled(0).take(max_rows)
    outcome = compress(session, budget, rows)
    note = {
        "budget": budget,
        "parameters": outcome.chosen.parameters,
        "parameters_before": outcome.choices[0].parameters,
    }
    tokenizer = _Files(source) if (source / "tokenizer_config.json").exists() else session.tokenizer
    proof = save_adapter(
        session.model,
        target,
        session.probe(),
        tokenizer=tokenizer,
        notes={**read_notes(source), **session.notes(), "compressed": note},
    )
    return Written(target, outcome, proof)


def _target(folder: Path, output: str | Path | None) -> Path:
    """The folder to write to, which must be free."""
    named = folder.resolve() if folder.name in ("", "..") else folder
    target = Path(output) if output is not None else named.with_name(f"{named.name}-compressed")
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ConfigError(f"{target}: exists already; name another folder with --output, or remove it first")
    return target


class _Files:
    """A tokenizer as it lies in a folder: saved by copying, so that nothing about it changes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save_pretrained(self, target: str) -> None:
        """Copy the files."""
        found = {path for pattern in _TOKENIZER for path in self.folder.glob(pattern) if path.is_file()}
        for path in found:
            if path.is_symlink() and not self._in_cache(path):  # a stranger's folder could name any file of this disk
                raise AdapterError(
                    f"adapter {self.folder}: {path.name} is a link out of the folder; put the file there"
                )
            shutil.copyfile(path, Path(target) / path.name)

    def _in_cache(self, path: Path) -> bool:
        """Whether it is a link as the hub's cache makes them: from snapshots/REVISION/ into blobs/ beside it."""
        folder = self.folder.resolve()
        return folder.parent.name == "snapshots" and path.resolve().parent == folder.parent.parent / "blobs"
