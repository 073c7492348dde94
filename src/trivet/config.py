"""The YAML schema: what can be set, its default, and what it means. Reading and writing files is in `configio`.

Every field is documented where it is declared; `trivet init` and the error messages are made from these texts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from trivet.methods import written

#: What a model can be trained to do. `auto` infers it from the data's format and the model's architecture.
TASKS = ("auto", "causal-lm", "seq2seq", "classification", "regression")

#: How rows can be written; docs/data.md shows one of each. `auto` detects it from the columns.
FORMATS = (
    "auto",
    "messages",
    "conversations",
    "prompt-completion",
    "alpaca",
    "text",
    "classification",
    "regression",
    "multiple-choice",
    "references",
)


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    check: Callable[[Any], Any] | None = None,
) -> Any:
    """A documented dataclass field, checked when a config is read.

    `choices` are for each item of a list; `check` returns the value as it is to be kept, or raises `ConfigError`.
    """
    metadata = {
        "help": help, "choices": choices, "at_least": at_least, "above": above, "below": below, "check": check,
    }  # fmt: skip
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ModelConfig:
    """The base model and the adapter on it."""

    name: str | None = option(
        None, "hub id, local folder, GGUF file, or `demo` / `demo-encoder` (small real models, fetched once)"
    )
    lora_rank: int = option(8, "rank r of each layer's update (alias: r, lora_r)", at_least=1)
    lora_alpha: float | None = option(
        None,
        "scale numerator: the update is alpha/r * B A; null means 2 * lora_rank, a scale of 2",
        above=0,
    )
    lora_dropout: float = option(0.0, "dropout on the adapter's input, a probability", at_least=0, below=1)
    target_modules: str | list[str] = option(
        "all-linear", "which layers get an adapter: `all-linear`, or names such as [q_proj, v_proj]"
    )
    task: str = option("auto", "what to train for", choices=TASKS)
    dtype: str = option(
        "auto",
        "base weights' type; auto is bfloat16 where the processor computes in it, else float32",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    load_in_4bit: bool = option(
        False,
        "hold the base's linear layers in 4 bits (NF4): less memory; what is trained and merged is relative to them",
    )
    device: str = option("auto", "auto takes a GPU where there is one", choices=("auto", "cpu", "cuda", "mps"))
    revision: str | None = option(None, "branch, tag or commit of a hub model")
    trust_remote_code: bool = option(False, "run Python code that a hub model ships; off unless you trust it")


@dataclass(frozen=True)
class DataConfig:
    """Where rows come from and how they become tokens."""

    train: str | list[str] | None = option(
        None,
        "file(s) (.jsonl .json .csv .tsv .parquet .txt, also .gz), a hub data set id, or `docstrings` (real rows from "
        "the Python packages installed here)",
    )
    validation: float | str | list[str] | None = option(
        "auto",
        "share of train (0.05), file(s) or hub id; auto is 5% of train, at most 500 rows; null for none",
        above=0,
        below=1,
    )
    test: str | list[str] | None = option(None, "file(s) or hub id, touched once, after training")
    format: str = option("auto", "how rows are written", choices=FORMATS)
    columns: dict[str, str] = option(
        {}, "your column for each of ours where names differ, e.g. {prompt: question, completion: answer}"
    )
    on_bad_row: str = option(
        "refuse", "a row that can't be read: stop and name it, or skip and count", choices=("refuse", "skip")
    )
    max_train_rows: int | None = option(None, "use at most so many rows of train (after shuffling by seed)", at_least=1)
    max_validation_rows: int | None = option(None, "use at most so many validation rows", at_least=1)
    max_test_rows: int | None = option(None, "use at most so many test rows (the first ones)", at_least=1)
    max_length: int = option(
        1024, "longest row in tokens; longer prompts lose their middle, longer answers their end", at_least=8
    )
    chat_template: str = option(
        "auto", "auto uses the model's own where it has one; `none` for plain text; or a path to a Jinja file"
    )
    loss_on: str = option(
        "responses",
        "which tokens are learned: the responses only, or the whole row",
        choices=("responses", "all"),
    )


@dataclass(frozen=True)
class TrainingConfig:
    """How long and how fast to train."""

    batch_size: int = option(8, "rows per device and micro-step (alias: per_device_train_batch_size)", at_least=1)
    gradient_accumulation_steps: int = option(
        1, "micro-steps per optimizer step, weighted by their supervised tokens", at_least=1
    )
    learning_rate: float | Literal["auto"] = option(
        3e-4, "peak learning rate; auto finds it in short trials before the run begins", at_least=0
    )
    head_learning_rate: float | None = option(
        None, "peak learning rate of a classification or regression head; null means learning_rate", at_least=0
    )
    num_epochs: float = option(3.0, "passes over the training rows (alias: num_train_epochs)", above=0)
    max_steps: int | None = option(None, "stop after so many optimizer steps; overrides num_epochs", at_least=1)
    warmup_ratio: float = option(0.03, "share of the steps in which the rate rises from 0", at_least=0, below=1)
    lr_scheduler: str = option(
        "cosine",
        "shape of the learning rate after warm-up",
        choices=("cosine", "linear", "constant_with_warmup", "constant"),
    )
    weight_decay: float = option(0.0, "decoupled weight decay on the adapter", at_least=0)
    max_grad_norm: float = option(1.0, "clip the gradient's norm here; 0 for no clipping", at_least=0)
    z_loss: float = option(
        0.0, "weight of log² Z, the softmax's denominator, in a language model's loss; 1e-4 is common", at_least=0
    )
    keep_freed_memory: bool = option(
        True, "keep memory that a step freed for the next one, on Linux with glibc: fewer page faults"
    )
    packing: bool | None = option(
        None,
        "put a batch's rows behind each other instead of padding them; none sees another, and rows of any length meet. "
        "null means on CPUs, for causal models that can",
    )
    share_prefix: bool | None = option(
        None,
        "compute what all packed rows begin with (a template's head, an instruction) once a batch instead of once a "
        "row: the same result with fewer tokens. null means where it is worth it, for models that can",
    )
    max_tokens_per_batch: int | None = option(
        None, "batches of at most so many tokens, padding included, instead of batch_size rows", at_least=1
    )
    fast: bool = option(True, "use trivet's own attention (on CPUs), norms and adapted layers, which compute the same")
    cuda_graphs: bool = option(
        True, "on NVIDIA GPUs, record a step's passes for batches of one shape and replay them, where memory allows"
    )
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    eval_steps: int | None = option(
        None, "validate and checkpoint every so many steps; null means 5 times a run", at_least=1
    )
    early_stopping_patience: int | None = option(
        None, "stop after so many validations without a better loss; null to run to the end", at_least=1
    )
    keep_checkpoints: int = option(2, "how many checkpoints to keep (the best one is always kept)", at_least=1)
    seed: int = option(42, "seeds the adapter's start, the data order and the splits", at_least=0, below=2**32)
    num_workers: int = option(0, "processes that prepare batches", at_least=0)
    report_to: list[str] = option(
        [], "further loggers; their packages must be installed", choices=("tensorboard", "wandb")
    )


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured after training, for the base model and the tuned one."""

    batch_size: int = option(16, "rows per forward pass", at_least=1)
    generate: bool = option(True, "also write answers and compare them with the references (BLEU, ROUGE, ...)")
    max_generate_rows: int = option(
        200, "write answers for at most so many test rows: generation is slow on a CPU", at_least=1
    )
    max_new_tokens: int = option(128, "longest generated answer, in tokens", at_least=1)
    resamples: int = option(1000, "bootstrap resamples behind each 95% interval", at_least=10)


@dataclass(frozen=True)
class Config:
    """One run. `method` names how the update is factored, ranked and stepped (`trivet methods` lists them)."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    method: str | dict[str, Any] = option(
        "lora",
        "a named method, or a part for each leg, e.g. {decompose: gradient, rank: {name: squeeze, budget: "
        "r4-equivalent}, update: adamw} (`trivet methods` lists them)",
        check=written,
    )
    output_dir: str = option("runs/trivet", "the run folder: everything a run writes is inside it")

    def as_decided(self, before: Config) -> Config:
        """This config with what it leaves open as it was decided when the run `before` began."""
        left_open = {"packing": None, "share_prefix": None, "learning_rate": "auto"}
        now, then = vars(self.training), vars(before.training)
        decided = {name: then[name] for name, open_ in left_open.items() if now[name] == open_}
        return replace(self, training=replace(self.training, **decided))


#: Names from Hugging Face and common trainers -> ours. They are accepted in any section and at the top level.
ALIASES = {
    "model_name_or_path": "model.name",
    "base_model": "model.name",
    "base_model_name_or_path": "model.name",
    "r": "model.lora_rank",
    "rank": "model.lora_rank",
    "lora_r": "model.lora_rank",
    "alpha": "model.lora_alpha",
    "dropout": "model.lora_dropout",
    "lora_target_modules": "model.target_modules",
    "torch_dtype": "model.dtype",
    "task_type": "model.task",
    "dataset": "data.train",
    "dataset_name": "data.train",
    "train_file": "data.train",
    "validation_file": "data.validation",
    "eval_file": "data.validation",
    "test_file": "data.test",
    "max_seq_length": "data.max_length",
    "max_train_samples": "data.max_train_rows",
    "max_eval_samples": "data.max_validation_rows",
    "max_predict_samples": "data.max_test_rows",
    "per_device_train_batch_size": "training.batch_size",
    "num_train_epochs": "training.num_epochs",
    "epochs": "training.num_epochs",
    "batch_size": "training.batch_size",
    "lr": "training.learning_rate",
    "lr_scheduler_type": "training.lr_scheduler",
    "save_total_limit": "training.keep_checkpoints",
    "dataloader_num_workers": "training.num_workers",
    "per_device_eval_batch_size": "evaluation.batch_size",
}
