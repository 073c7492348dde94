"""Errors, written for the person who reads them.

Every error says what was being done, with which input, why not, and what to do. Each kind also inherits the standard
library's nearest error, so that `except ValueError` in somebody's script keeps working.
"""

from __future__ import annotations

import os
import re
from signal import SIGINT

#: What the libraries below take passwords from.
_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACEHUB_API_TOKEN", "WANDB_API_KEY", "COMET_API_KEY",
            "MLFLOW_TRACKING_PASSWORD", "NEPTUNE_API_TOKEN")  # fmt: skip


def masked(text: str) -> str:
    """`text` without passwords in addresses, hub tokens, and the values of variables that hold such."""
    text = re.sub(r"(://)[^/\s@]+@", r"\1…@", text)
    text = re.sub(r"\bhf_[A-Za-z0-9]{8,}", "hf_…", text)
    for name in _SECRETS:
        if len(value := os.environ.get(name, "")) >= 8:
            text = text.replace(value, "…")
    return text


class TrivetError(Exception):
    """Anything trivet refuses or fails at on purpose. `exit_code` is what the command line ends with."""

    exit_code = 1

    def __str__(self) -> str:  # KeyError and OSError would otherwise add quotes or errno prefixes
        return masked(str(self.args[0])) if self.args else ""


class ConfigError(TrivetError, ValueError):
    """The configuration or the command is wrong: to be mended there, nothing was run."""

    exit_code = 2


class RunExistsError(ConfigError, FileExistsError):
    """The output folder already holds a run and neither --resume nor --overwrite was given."""


class DataError(TrivetError, ValueError):
    """A data file cannot be read as rows of a known format; the message names file:line."""


class ModelError(TrivetError, ValueError):
    """A base model or tokenizer cannot be loaded or does not suit the task."""


class AdapterError(TrivetError, ValueError):
    """An adapter folder cannot be read, or does not fit its base model."""


class ProcessError(TrivetError, RuntimeError):
    """Another process of the same run has ended, or answers no more."""


class ProofError(TrivetError, RuntimeError):
    """What was saved does not compute what was trained."""


class StorageError(TrivetError, OSError):
    """The disk is full or a file cannot be written."""


class DivergedError(TrivetError, ArithmeticError):
    """Losses or gradients stopped being numbers, several steps in a row."""


class InterruptedRunError(TrivetError, RuntimeError):
    """A run was ended by a signal; it kept a checkpoint. The command ends with 128 + the signal's number."""

    exit_code = 128 + SIGINT

    def __init__(self, *message: str, signal: int = SIGINT) -> None:
        super().__init__(*message)
        self.exit_code = 128 + signal
