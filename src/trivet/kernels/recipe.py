"""Rematerialisation: results that are cheap to make from what is kept anyway are made again, and not kept too.

Autograd keeps the input of every layer for its backward pass. An activation's or a norm's result is such an input,
as large as what it was made of, and that is kept as well, for its own backward pass. So the result carries its recipe,
and a layer that reads recipes keeps what it was made of (Chen et al. 2016, arXiv 1604.06174, section 3: the results of
cheap operations are dropped, those of matrix products kept). What carries no recipe is kept as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch


class Recipe(NamedTuple):
    """How a tensor is made: `maker(*inputs)`, as long as its version is this one."""

    maker: Maker
    inputs: tuple[torch.Tensor, ...]
    version: int


class Maker:
    """Makes a tensor again in the backward pass: once for all layers that have read it, then it is let go.

    It holds no tensor until then. What is made has no gradient.
    """

    def __init__(self, make: Callable[..., torch.Tensor]) -> None:
        self.make, self.readers = make, 0
        self.made: torch.Tensor | None = None

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        made = self.make(*inputs) if self.made is None else self.made
        self.readers -= 1
        self.made = made if self.readers > 0 else None
        return made


def carries(y: torch.Tensor, make: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """y, with the recipe that it is `make(*inputs)`, of tensors that autograd keeps anyway where y has a gradient."""
    if y.requires_grad:
        y.recipe = Recipe(Maker(make), tuple(each.detach() for each in inputs), y._version)  # type: ignore[attr-defined]
    return y


def kept_for(x: torch.Tensor, rows: torch.Tensor) -> tuple[Maker | None, Sequence[torch.Tensor]]:
    """What a layer that reads x keeps for its backward pass: what x is made of, and the maker; else `rows`.

    Args:
        x: (…, n).
        rows: (tokens, n), x as the layer reads it.
    """
    recipe = getattr(x, "recipe", None)
    if recipe is None or recipe.version != x._version:  # somebody has changed x in place
        return None, (rows,)
    recipe.maker.readers += 1
    return recipe.maker, recipe.inputs


def rows_from(maker: Maker | None, kept: Sequence[torch.Tensor]) -> torch.Tensor:
    """`rows` again, of what `kept_for` has said; once in each backward pass."""
    if maker is None:
        return kept[0]
    made = maker(*kept)
    return made.reshape(-1, made.shape[-1])
