"""trivet: parameter-efficient fine-tuning of language models; LoRA that finds its own rank.

The public names are loaded when first used, so that `import trivet` and `trivet --help` do not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from trivet.garbage import uncollected

__version__ = "0.1.0"

_HOME = {
    "LoRAModel": "trivet.api",
    "load_dataset": "trivet.data",
    "Dataset": "trivet.data",
    "attach": "trivet.adapter.attach",
    "callback": "trivet.train.ranks",
    "optimizer": "trivet.adapter.plan",
    "Config": "trivet.config",
    "TrivetError": "trivet.errors",
}
__all__ = [
    "Config",
    "Dataset",
    "LoRAModel",
    "TrivetError",
    "__version__",
    "attach",
    "callback",
    "load_dataset",
    "optimizer",
]

if TYPE_CHECKING:
    from trivet.adapter.attach import attach
    from trivet.adapter.plan import optimizer
    from trivet.api import LoRAModel
    from trivet.config import Config
    from trivet.data import Dataset, load_dataset
    from trivet.errors import TrivetError
    from trivet.train.ranks import RankCallback as callback  # noqa: N813 - used as a function


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'trivet' has no attribute '{name}'")
    with uncollected():
        return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
