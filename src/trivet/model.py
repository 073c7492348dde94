"""The base model and its tokenizer: hub id, local folder, GGUF file, or a demo model; dtype, device and task."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trivet.demo import DEMO_MODELS, demo_path
from trivet.errors import ConfigError, ModelError, TrivetError
from trivet.four_bit import count_parameters, in_four_bit, to_four_bit
from trivet.kernels.product import multiplies
from trivet.tokenizer import check_tokenizer, ensure_pad

log = logging.getLogger("trivet")

_NO_NAME = "model.name is not set: a hub id, a local folder, a GGUF file, or demo"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Base:
    """A loaded base model: what it is called, what it is trained for, and how it was loaded."""

    name: str
    model: Any
    tokenizer: Any
    task: str
    dtype: torch.dtype
    device: torch.device
    labels: tuple[str, ...] | None = None
    revision: str | None = None
    #: Parts of the body that the checkpoint lacks (poolers): they start at random, so they are trained and saved whole.
    fresh: tuple[str, ...] = ()
    load_in_4bit: bool = False

    def describe(self) -> str:
        """One line: architecture, size, type, device, task."""
        size, kind = count_parameters(self.model), type(self.model).__name__
        types = str(self.dtype)[6:] + (" with weights in 4 bits" if self.load_in_4bit else "")
        return f"{self.name}: {kind}, {size / 1e6:.1f}M parameters, {types} on {self.device}, {self.task}"


def pick_device(choice: str = "auto") -> torch.device:
    """`auto` is CUDA, then Apple's MPS, then the CPU. `ConfigError` where the chosen one is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if choice == "auto":
        choice = next(name for name, ok in there.items() if ok)
    if not there[choice]:
        raise ConfigError(f"model.device {choice}: this machine has none; use auto or cpu")
    return torch.device(choice)


def pick_dtype(choice: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the processor multiplies it natively, else float32."""
    if choice != "auto":
        return _DTYPES[choice]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        native = multiplies(torch.bfloat16)
    else:
        native = False
    return torch.bfloat16 if native else torch.float32


def load_base(
    name: str | None,
    *,
    task: str = "auto",
    data_format: str = "text",
    labels: Sequence[str] | None = None,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    load_in_4bit: bool = False,
    seed: int = 0,
) -> Base:
    """Load a model with its tokenizer, ready for an adapter.

    Args:
        name: hub id, local folder, GGUF file, `demo` or `demo-encoder`.
        task: what to train for; `auto` takes it from `data_format` and the architecture.
        labels: class names in index order (classification).
        load_in_4bit: see `trivet.four_bit`; embeddings and heads keep `dtype`, in which all is computed.
        seed: for a head that the checkpoint does not hold.

    Raises:
        ConfigError: no name, or no such model.
        ModelError: the model can't be read, lacks weights of its pretrained body, or can't do the task.
    """
    if not name:
        raise ConfigError(_NO_NAME)
    where, gguf = locate(name)
    target = pick_device(device)
    kind = pick_dtype(dtype, target)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision:
        options["revision"] = revision
    if gguf:
        options["gguf_file"] = gguf
    with explained(name), quiet():
        from transformers import AutoConfig, AutoTokenizer

        config = AutoConfig.from_pretrained(where, **options)
        task = infer_task(config, data_format) if task == "auto" else task
        _check_task(config, task, name)
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
        check_tokenizer(tokenizer, name)
        ensure_pad(tokenizer, name)
        if task in ("classification", "regression"):
            names = list(labels or ())
            options["num_labels"] = len(names) if task == "classification" else 1
            if task == "classification":
                options["id2label"] = dict(enumerate(names))
                options["label2id"] = {label: i for i, label in enumerate(names)}
            options["problem_type"] = "single_label_classification" if task == "classification" else "regression"
            options["ignore_mismatched_sizes"] = True
        torch.manual_seed(seed)
        first = "auto" if load_in_4bit and kind == torch.float32 else kind  # 16-bit files need no more than that
        model, found = _auto_class(task).from_pretrained(where, dtype=first, output_loading_info=True, **options)
    fresh = _fresh_parts(model, found, task, name)
    heads = [*head_names(model, task), *fresh]
    _float_parts(model, heads)
    if gguf:
        _forget_gguf(model)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise ModelError(
            f"model {name}: its tokenizer has {len(tokenizer)} tokens but the model embeds only "
            f"{model.get_input_embeddings().num_embeddings}; they don't belong together"
        )
    if load_in_4bit:
        to_four_bit(model, heads, target)
        if not in_four_bit(model):
            raise ModelError(f"model {name}: has no linear layers that could be held in 4 bits; leave load_in_4bit out")
        if kind == torch.float32:  # 16 bits were loaded as such, beside what stays in float32
            model.to(kind)
    model.config.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.use_cache = False  # no key-value cache while training; generation switches it on
    classes = tuple(labels) if labels else None
    return Base(name, model.to(target), tokenizer, task, kind, target, classes, revision, fresh, load_in_4bit)


def check_base(name: str | None, *, fetch: bool = False) -> None:
    """Refuse early what can't be a model: no name, no such folder, no config.json. `fetch`es a demo model if asked."""
    if not name:
        raise ConfigError(_NO_NAME)
    if fetch or name not in DEMO_MODELS:
        locate(name)


def locate(name: str) -> tuple[str, str | None]:
    """(what transformers is given, the GGUF file's name in it or None)."""
    if name in DEMO_MODELS and not Path(name).is_dir():
        return str(demo_path(name)), None
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf" and path.exists():
        return str(path.parent), path.name
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ModelError(f"model {name}: the folder has no config.json, so it is no transformers model")
        return str(path), None
    if path.exists():
        raise ModelError(f"model {name}: a single file is read only as GGUF (.gguf); give the model's folder")
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) or name.endswith(".gguf"):
        raise ConfigError(f"model {name}: no such folder or file")
    return name, None


def infer_task(config: Any, data_format: str) -> str:
    """What to train for, from how the rows are written and whether the model has a decoder."""
    if data_format in ("classification", "regression"):
        return data_format
    return "seq2seq" if config.is_encoder_decoder else "causal-lm"


def _check_task(config: Any, task: str, name: str) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    built_for = " ".join(config.architectures or ())
    encoder_only = config.model_type in MASKED and not re.search(r"CausalLM|LMHead", built_for)
    encoder_only &= not config.is_encoder_decoder
    if task == "causal-lm" and (config.is_encoder_decoder or encoder_only or config.model_type not in CAUSAL):
        hint = "model.task: seq2seq" if config.is_encoder_decoder else "rows with text and label, or another model"
        raise ModelError(f"model {name} ({config.model_type}) is no causal language model; use {hint}")
    if task == "seq2seq" and not config.is_encoder_decoder:
        raise ModelError(f"model {name} ({config.model_type}) is no encoder-decoder; use model.task: causal-lm")


def _auto_class(task: str) -> Any:
    import transformers

    return {
        "causal-lm": transformers.AutoModelForCausalLM,
        "seq2seq": transformers.AutoModelForSeq2SeqLM,
        "classification": transformers.AutoModelForSequenceClassification,
        "regression": transformers.AutoModelForSequenceClassification,
    }[task]


def _fresh_parts(model: Any, found: Any, task: str, name: str) -> tuple[str, ...]:
    """Poolers that the checkpoint lacks; `ModelError` where it lacks anything else but a classifier's head."""
    parameters = {key for key, _ in model.named_parameters(remove_duplicate=False)}
    absent = sorted(parameters & {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
    body = [key for key in absent if key.startswith(f"{model.base_model_prefix}.")]
    lost = absent
    if task in ("classification", "regression"):
        lost = [key for key in body if "pool" not in key]
    if lost:
        raise ModelError(
            f"model {name}: its checkpoint lacks weights of {type(model).__name__}, or has them in another shape: "
            f"{', '.join(lost[:3])}{', …' if len(lost) > 3 else ''}; it is damaged or made for another task"
        )
    return tuple(dict.fromkeys(key.rpartition(".")[0] for key in body))


def head_names(model: Any, task: str) -> list[str]:
    """The parts of a labelled task's model beside its pretrained body: classification heads, poolers outside of it."""
    if task not in ("classification", "regression"):
        return []
    return [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and any(True for _ in child.parameters())
    ]


def _float_parts(model: Any, names: list[str]) -> None:
    """Keep what is trained whole in float32: small steps on 16-bit weights would be rounded away."""

    def cast(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        kind = next(module.parameters()).dtype  # float32 here, another one once the model was merged and converted
        return tuple(x.to(kind) if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs)

    for name in names:
        part = model.get_submodule(name)
        part.float()
        part.register_forward_pre_hook(cast)


def _forget_gguf(model: Any) -> None:
    """After dequantising, transformers keeps the GGUF marks, which would stop saving and merging."""
    for mark in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, mark):
            delattr(model.config, mark)
    for mark in ("hf_quantizer", "quantization_method", "is_quantized"):
        if hasattr(model, mark):
            setattr(model, mark, False if mark == "is_quantized" else None)


@contextlib.contextmanager
def explained(name: str) -> Iterator[None]:
    """Loading errors of the libraries below, as one message with a reason."""
    import pickle
    import struct

    from safetensors import SafetensorError

    # Files of the wrong shape (a list for a table, a cut GGUF) show as TypeError, AttributeError or struct.error.
    foreign = (OSError, ValueError, LookupError, RuntimeError, ImportError, TypeError, AttributeError, struct.error)
    try:
        yield
    except TrivetError:
        raise
    except (*foreign, SafetensorError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:400]
        if isinstance(error, OSError) and not Path(name).exists():
            raise ConfigError(
                f"model {name}: no such local folder, and it can't be had from the model hub: {reason}. "
                f"Local models are folders with config.json; {', '.join(DEMO_MODELS)} need no hub"
            ) from error
        raise ModelError(f"model {name}: can't be loaded: {reason}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and notes about newly started heads (we print what matters)."""
    from transformers.utils import logging as hf

    before, bars = hf.get_verbosity(), hf.is_progress_bar_enabled()
    hf.set_verbosity_error()
    hf.disable_progress_bar()
    try:
        yield
    finally:
        hf.set_verbosity(before)
        if bars:
            hf.enable_progress_bar()
