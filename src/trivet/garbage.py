"""Python's garbage collector, where it would only cost time."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """No search for garbage inside, for what makes many objects and none of it: imports, syntax trees.

    Importing torch, transformers and PEFT makes some 700,000 objects that stay; a sixth of its time goes into searches
    through all of them. They are passed on to the oldest generation unlooked at, so that later searches are quick too.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.unfreeze()
        if enabled:
            gc.enable()
