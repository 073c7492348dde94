"""Sides of `bench/speed.py` that train through a Trainer: trivet's own, TRL's, or transformers' with PEFT.

A step is timed from the end of the one before to its own end, so that drawing rows, padding them and logging count.
Every side takes batches from all over its epoch, in the order in which its own sampler makes them: samplers that sort
by length put the longest rows first, and the first few steps would say little about a run.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from speed_child import Turns, lora, lora_config
from speed_models import causal_model, numbers, random_ids
from transformers import TrainerCallback

QUIET = {"save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True}


class Gate(TrainerCallback):
    """Holds a Trainer until it is its turn."""

    def __init__(self, turns: Turns) -> None:
        self.turns, self.began = turns, 0.0
        self.counts: dict[str, int] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.turns.ready()
        self.began = self.turns.wait()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.turns.answer(self.began, self.counts)
        self.began = self.turns.wait()


class Spread(torch.utils.data.Sampler[int]):
    """`wanted` batches of what another sampler would give in one epoch: the first for warming up, then the measured."""

    def __init__(self, inner: Any, batch_size: int, wanted: list[float]) -> None:
        self.inner, self.batch_size, self.wanted = inner, batch_size, wanted

    def __len__(self) -> int:
        return len(self.wanted) * self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """As trivet's sampler is told; there is one epoch here."""

    def __iter__(self) -> Iterator[int]:
        order = list(self.inner)
        whole = len(order) // self.batch_size
        if not whole:
            raise SystemExit(f"there are {len(order)} rows, fewer than the {self.batch_size} of one step")
        for share in self.wanted:
            begin = int(share * whole) * self.batch_size
            yield from order[begin : begin + self.batch_size]


def places(warmup: int, measured: int) -> list[float]:
    """Where in its epoch each step's batch is, 0 to 1: evenly spread, in an order that is the same for every side."""
    spread = [(i + 0.5) / measured for i in range(measured)]
    random.Random(0).shuffle(spread)
    return [(i + 0.5) / warmup for i in range(warmup)] + spread


def contents(batch: dict[str, Any]) -> dict[str, int]:
    """Rows, tokens without padding, and tokens (or rows) that are learned, in a batch as the model gets it.

    A packed batch is one long row without a mask, in which every row's positions begin at 0. trivet's ends in padding.
    """
    ids, mask, labels = batch["input_ids"], batch.get("attention_mask"), batch["labels"]
    learned = labels.numel() if labels.dim() == 1 else int((labels[:, 1:] != -100).sum())
    if "cu_seq_lens_q" in batch:
        from trivet.data.batch import rows_in, tokens_in

        return {"rows": rows_in(batch), "tokens": int(tokens_in(batch)), "supervised": learned}
    packed = mask is None and "position_ids" in batch
    rows = int((batch["position_ids"] == 0).sum()) if packed else len(ids)
    return {"rows": rows, "tokens": ids.numel() if mask is None else int(mask.sum()), "supervised": learned}


def drive(turns: Turns, trainer: Any, spec: dict[str, Any]) -> None:
    """Let a Trainer train, a step whenever it is its turn."""
    turns.facts |= numbers(trainer.model)
    gate = Gate(turns)
    sampler, step = trainer._get_train_sampler, trainer.training_step
    wanted = places(spec["warmup"], spec["rounds"] - spec["warmup"])

    def spread(rows: Any = None) -> Spread:
        return Spread(sampler(rows), trainer.args.per_device_train_batch_size, wanted)

    def counted(model: Any, inputs: dict[str, Any], *rest: Any, **more: Any) -> Any:
        gate.counts = contents(inputs)
        return step(model, inputs, *rest, **more)

    trainer._get_train_sampler, trainer.training_step = spread, counted
    trainer.add_callback(gate)  # the last one, so that what the others do is in the step's time
    trainer.train()


def run(turns: Turns, spec: dict[str, Any]) -> None:
    """The side that `spec` names."""
    with tempfile.TemporaryDirectory() as folder:
        if spec["side"].startswith("trivet"):
            trainer = trivet_trainer(turns, spec, Path(folder))
        elif spec["side"].startswith("trl"):
            trainer = trl_trainer(turns, spec, folder)
        else:
            trainer = peft_trainer(turns, spec, folder)
        drive(turns, trainer, spec)


def trivet_trainer(turns: Turns, spec: dict[str, Any], folder: Path) -> Any:
    """What `trivet train` would train with, without validation and checkpoints."""
    from rich.console import Console

    import trivet.session
    from trivet.configio import load
    from trivet.prepare import prepare
    from trivet.runfolder import RunFolder
    from trivet.splits import load_splits
    from trivet.train.callback import RunLog
    from trivet.training import make_trainer

    load_base = trivet.session.load_base

    def noted(*names: Any, **options: Any) -> Any:
        base = load_base(*names, **options)
        turns.loaded(base.model)
        return base

    trivet.session.load_base = noted
    config = load(
        values={
            "model.name": spec["base"],
            "model.lora_rank": spec["rank"],
            "model.dtype": spec["dtype"],
            "model.device": spec["device"],
            "data.train": spec["rows_file"],
            "data.validation": None,
            "data.chat_template": "auto" if spec["chat"] else "none",  # as TRL, which puts none on plain text
            "training.batch_size": spec["rows"],
            "training.packing": False if spec["side"] == "trivet-padded" else None,
            "training.share_prefix": False if spec["side"] == "trivet-unshared" else None,
            "training.max_steps": spec["rounds"] + 1,
            "training.eval_steps": spec["rounds"] + 2,
            "output_dir": str(folder),
        }
    )
    quiet = Console(quiet=True)
    ready = prepare(config, load_splits(config), quiet)
    return make_trainer(ready, RunFolder(folder), RunLog(folder / "log.jsonl", quiet))


def trl_trainer(turns: Turns, spec: dict[str, Any], folder: str) -> Any:
    """SFTTrainer with its defaults; or with what makes it fastest: no checkpointing, no autocast, and the model and its
    adapter in bfloat16 where the processor computes in it, else in float32. `trl-liger` has Liger's kernels too.

    TRL's default recomputes activations in the backward pass and keeps the adapter in float32 under autocast.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer  # importing trl alone loads none of it

    dtype = "bfloat16" if spec["side"] == "trl" else "auto"
    model, tokenizer, rows = trl_material(turns, spec, dtype)
    options = QUIET | {"output_dir": folder, "max_steps": spec["rounds"] + 1, "use_cpu": spec["device"] == "cpu"}
    options["per_device_train_batch_size"] = spec["rows"]
    if spec["kind"] == "dense":
        options["max_length"] = spec["length"]
    if spec["side"] == "trl":
        adapter = lora_config("CAUSAL_LM", spec["rank"])
    else:
        model, adapter = lora(model, "CAUSAL_LM", spec["rank"], autocast_adapter_dtype=False), None
        options |= {"bf16": False, "gradient_checkpointing": False}
    if spec["side"] == "trl-grouped":
        options["train_sampling_strategy"] = "group_by_length"
    if spec["side"] == "trl-liger":
        options["use_liger_kernel"] = True
    if spec["side"] == "trl-packed":  # a step holds about as many tokens as the others' steps do
        options |= {"packing": True, "max_length": spec["pack_length"], "per_device_train_batch_size": 1}
    return SFTTrainer(
        model,
        args=SFTConfig(**options),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=adapter,
    )


def trl_material(turns: Turns, spec: dict[str, Any], dtype: str) -> tuple[Any, Any, list[dict[str, Any]]]:
    """A model, its tokenizer, and rows: of a file, or as many random ones as there are steps for."""
    from trivet.model import load_base

    if spec["kind"] == "rows":
        base = load_base(spec["base"], task="causal-lm", dtype=dtype, device=spec["device"])
        turns.loaded(base.model)
        rows = [{key: row[key] for key in ("prompt", "completion")} for row in read(spec["rows_file"])]
        return base.model, base.tokenizer, [turns_of(row) for row in rows] if spec["chat"] else rows
    from transformers import AutoTokenizer

    model = causal_model(spec, dtype)
    turns.loaded(model)
    ids = random_ids(0, spec["rows"] * (spec["rounds"] + 1), spec["length"], model.config.vocab_size, "cpu")
    return model, AutoTokenizer.from_pretrained(spec["tokenizer"]), [{"input_ids": row} for row in ids.tolist()]


def turns_of(row: dict[str, str]) -> dict[str, Any]:
    """Prompt and completion as a conversation, so that TRL puts the chat template on them."""
    roles = {"prompt": "user", "completion": "assistant"}
    return {key: [{"role": roles[key], "content": text}] for key, text in row.items()}


def peft_trainer(turns: Turns, spec: dict[str, Any], folder: str) -> Any:
    """PEFT's usual way to a classifier: transformers' Trainer with its defaults, padding to the longest row."""
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    from trivet.demo import demo_path

    rows = read(spec["rows_file"])
    names = sorted({row["label"] for row in rows})
    where = demo_path(spec["base"])
    tokenizer = AutoTokenizer.from_pretrained(where)
    model = AutoModelForSequenceClassification.from_pretrained(where, num_labels=len(names)).to(spec["device"])
    turns.loaded(model)
    encoded = [tokenizer(row["text"], truncation=True) | {"labels": names.index(row["label"])} for row in rows]
    options = QUIET | {"output_dir": folder, "max_steps": spec["rounds"] + 1, "use_cpu": spec["device"] == "cpu"}
    return Trainer(
        lora(model, "SEQ_CLS", spec["rank"]),
        args=TrainingArguments(**options, per_device_train_batch_size=spec["rows"]),
        train_dataset=encoded,
        data_collator=DataCollatorWithPadding(tokenizer),
    )


def read(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
