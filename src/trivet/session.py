"""A base model with its adapter and the way rows are put to it: what training makes and every later verb opens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trivet import processes
from trivet.adapter.attach import attach
from trivet.adapter.fast import make_fast
from trivet.adapter.load import load_adapter, read_config, read_notes
from trivet.adapter.validate import read_header
from trivet.config import Config, TrainingConfig
from trivet.data.batch import Collator, to_device
from trivet.data.dataset import Dataset
from trivet.data.encode import IGNORE, Encoded, LabelEncoder, TextEncoder, encode_dataset
from trivet.errors import AdapterError, DataError
from trivet.evaluate.measure import Evaluator, Settings
from trivet.fast import speed_up
from trivet.kernels.product import few_sizes
from trivet.loss import training_loss
from trivet.methods import find_method
from trivet.model import Base, load_base
from trivet.runfolder import adapter_folder

#: Formats whose rows have a class or a number as their answer.
LABELLED = ("classification", "regression")


@dataclass(frozen=True)
class Session:
    """`model` is a PeftModel on `base`; `encoder` turns rows into its inputs."""

    base: Base
    model: Any
    encoder: TextEncoder | LabelEncoder
    data: dict[str, Any]  # how rows become tokens: max_length, chat_template, loss_on

    @property
    def tokenizer(self) -> Any:
        return self.base.tokenizer

    @property
    def shift(self) -> Any:
        """For encoder-decoders: labels -> decoder inputs."""
        if self.base.task != "seq2seq":
            return None
        return self.base.model.prepare_decoder_input_ids_from_labels

    @property
    def collator(self) -> Collator:
        like = torch.empty(0, dtype=self.base.dtype, device=self.base.device)
        sizes = partial(few_sizes, like=like)
        return Collator(self.tokenizer.pad_token_id, shift=self.shift, few_sizes=sizes)

    def probe(self, rows: Sequence[Encoded] | None = None) -> dict[str, torch.Tensor]:
        """Two rows as model inputs, for comparing logits; made from the vocabulary where no rows are at hand."""
        if rows is None:
            size = min(len(self.tokenizer), 1000)
            ids = torch.randint(0, size, (2, 16), generator=torch.Generator().manual_seed(0)).tolist()
            rows = [Encoded(input_ids=row, labels=row) for row in ids]
            if isinstance(self.encoder, LabelEncoder):  # with the special tokens that a head may look for
                rows = [self.encoder.inputs(self.tokenizer.decode(row, skip_special_tokens=True)) for row in ids]
        batch = self.collator(rows[:2] if isinstance(self.encoder, LabelEncoder) else _clipped(rows[:2]))
        batch.pop("labels", None)
        return batch

    def notes(self) -> dict[str, Any]:
        """What `reopen` needs beside PEFT's files."""
        return {
            "base_model": self.base.name,
            "revision": self.base.revision,
            "dtype": str(self.base.dtype).removeprefix("torch."),
            "load_in_4bit": self.base.load_in_4bit,
            "task": self.base.task,
            "labels": list(self.base.labels) if self.base.labels else None,
            "data": self.data,
        }

    def evaluator(self, dataset: Dataset, settings: Settings | None = None) -> Evaluator:
        """Ready to measure any model of this session on `dataset`. `DataError` where its rows do not suit the task."""
        check_format(dataset, self.base.task)
        return Evaluator(dataset, self.encoder, task=self.base.task, shift=self.shift, settings=settings)


def _clipped(rows: Sequence[Encoded]) -> list[Encoded]:
    """Rows of at most 256 tokens: a proof needs no more."""
    out = []
    for row in rows:
        values = {k: v[:256] if isinstance(v, list) else v for k, v in row.items()}
        out.append(Encoded(**values))  # type: ignore[typeddict-item]
    return out


def check_format(dataset: Dataset, task: str) -> None:
    """Refuse rows that the task can't learn from or be measured on."""
    if (task in LABELLED) != (dataset.format in LABELLED):
        needed = (
            "rows with text and label" if task in LABELLED else "rows with text to write, such as prompt and completion"
        )
        raise DataError(f"{dataset.source}: format {dataset.format} does not suit task {task}, which needs {needed}")
    if (task == "classification" and dataset.format == "regression") or (
        task == "regression" and dataset.format == "classification"
    ):
        raise DataError(
            f"{dataset.source}: labels are read as {dataset.format}, but the task is {task}; set data.format"
        )
    if task == "seq2seq" and dataset.format == "text":
        raise DataError(
            f"{dataset.source}: an encoder-decoder needs rows with a prompt and a completion, not plain text"
        )


def class_names(train: Dataset, task: str) -> list[str] | None:
    """The classes in index order (numbers by value, names by alphabet); None unless the task is classification."""
    if task == "regression" or train.format != "classification":
        return None
    names = {str(e.label) for e in train}
    if len(names) < 2:
        raise DataError(f"{train.source}: only one label ({', '.join(names)}); a classifier needs at least two")
    numeric = all(name.lstrip("-").isdigit() for name in names)
    return sorted(names, key=int) if numeric else sorted(names)


def begin(config: Config, train: Dataset) -> Session:
    """Load the base model that `config` names and attach a fresh adapter for `train`'s task."""
    wanted = config.model
    base = load_base(
        wanted.name,
        task=wanted.task,
        data_format=train.format,
        labels=class_names(train, wanted.task),
        dtype=wanted.dtype,
        device=wanted.device,
        revision=wanted.revision,
        trust_remote_code=wanted.trust_remote_code,
        load_in_4bit=wanted.load_in_4bit,
        seed=config.training.seed,
    )
    check_format(train, base.task)
    data = {
        "max_length": config.data.max_length,
        "chat_template": config.data.chat_template,
        "loss_on": config.data.loss_on,
    }
    encoder = make_encoder(base, data)
    looking = find_method(config.method).needs_probe
    model = attach(
        base.model,
        lora_rank=wanted.lora_rank,
        lora_alpha=wanted.lora_alpha,
        lora_dropout=wanted.lora_dropout,
        target_modules=wanted.target_modules,
        modules_to_save=base.fresh,
        task=base.task,
        method=config.method,
        batches=probe_batches(base, encoder, train, config.training) if looking else None,
        loss=partial(probe_loss, task=base.task),
        reduce=processes.total if processes.count() > 1 else None,
        seed=config.training.seed,
        fast=config.training.fast,
    )
    return Session(base, model, encoder, data)


def probe_batches(
    base: Base, encoder: TextEncoder | LabelEncoder, train: Dataset, training: TrainingConfig
) -> list[dict[str, torch.Tensor]]:
    """The rows of four training batches, for methods that look at the data before they start: this process's share."""
    size = training.batch_size * processes.count()
    rows, _ = encode_dataset(train.shuffled(training.seed).take(4 * size), encoder)
    shift = base.model.prepare_decoder_input_ids_from_labels if base.task == "seq2seq" else None
    collator = Collator(base.tokenizer.pad_token_id, shift=shift)
    shares = [rows[i : i + size][processes.index() :: processes.count()] for i in range(0, len(rows), size)]
    return [to_device(collator(share), base.device) for share in shares]


def probe_loss(model: Any, batch: Mapping[str, torch.Tensor], *, task: str) -> tuple[torch.Tensor, int]:
    """The training's loss of a batch, and the number of items in its mean."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    labels = batch["labels"]
    items = labels.numel() if task in LABELLED else int((labels != IGNORE).sum())
    return training_loss(model, inputs, labels, items, task=task), items


def make_encoder(base: Base, data: dict[str, Any]) -> TextEncoder | LabelEncoder:
    """How rows become inputs of `base`. `max_length` is capped at the longest that the model has positions for."""
    limit = _positions(base)
    length = min(data["max_length"], limit) if limit else data["max_length"]
    if base.task in LABELLED:
        return LabelEncoder(base.tokenizer, base.labels if base.task == "classification" else None, max_length=length)
    return TextEncoder(
        base.tokenizer, base.task, max_length=length, chat_template=data["chat_template"], loss_on=data["loss_on"]
    )


def _positions(base: Base) -> int | None:
    config = base.model.config
    known = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    known.append(base.tokenizer.model_max_length)  # a huge number where it is unknown
    if config.model_type in ("roberta", "xlm-roberta", "camembert") and known[0]:
        known[0] -= 2  # their positions start after the padding index
    if config.model_type in ("t5", "mt5", "umt5"):
        known[:2] = [None, None]  # relative positions: no limit in the model
    fitting = [n for n in known if n and n < 1_000_000]
    return min(fitting) if fitting else None


def reopen(
    folder: Path,
    *,
    base_model: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    load_in_4bit: bool | None = None,
    fast: bool = True,
) -> Session:
    """Load a trained adapter (an adapter folder, or a run folder holding `adapter/`) on its base model.

    `dtype` auto takes the type that it was trained in, and `load_in_4bit` None the weights that it was trained on.
    `fast` replaces the parts that training does, by ones that compute the same.

    Raises:
        ConfigError: there is no such folder.
        AdapterError: the adapter can't be read, does not fit, or does not say which base model it belongs to.
    """
    folder = adapter_folder(folder)
    config, notes = read_config(folder), read_notes(folder)
    name = base_model or notes.get("base_model") or config.base_model_name_or_path
    if not name:
        raise AdapterError(f"adapter {folder}: does not say which base model it belongs to; pass --base-model")
    tasks = {"CAUSAL_LM": "causal-lm", "SEQ_2_SEQ_LM": "seq2seq", "SEQ_CLS": "classification"}
    task = notes.get("task") or tasks.get(str(config.task_type).rpartition(".")[2], "auto")
    labels = notes.get("labels")
    if task == "classification" and not labels:
        labels = _numbered_classes(folder)
        task = "classification" if len(labels) > 1 else "regression"
    base = load_base(
        name,
        task=task,
        labels=labels if task == "classification" else None,
        dtype=notes.get("dtype", "auto") if dtype == "auto" else dtype,
        device=device,
        revision=notes.get("revision"),
        load_in_4bit=notes.get("load_in_4bit", False) if load_in_4bit is None else load_in_4bit,
    )
    model = load_adapter(base.model, folder)
    if fast:
        make_fast(model)
        speed_up(base.model)
    data = notes.get("data") or {"max_length": 1024, "chat_template": "auto", "loss_on": "responses"}
    return Session(base, model, make_encoder(base, data), data)


def _numbered_classes(folder: Path) -> list[str]:
    """The classes of a classifier that was made elsewhere: as many as its saved head has outputs, named by number."""
    parts = read_header(folder).rest.items()
    outputs = [shape[0] for key, shape in parts if shape and "lora_" not in key and key.endswith(".weight")]
    if not outputs:
        raise AdapterError(f"adapter {folder}: is a classifier's, but neither holds its head nor names its classes")
    return [str(i) for i in range(min(outputs))]
