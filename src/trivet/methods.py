"""The three legs' tables, and the named methods composed of them. Imports no torch.

A new part is one file in its leg's package and one row in `trivet.parts`; a new method is one row in `METHODS`.
A method is written as its name, or as a mapping with a part for each leg:

    method: trivet
    method: {decompose: gradient, rank: {name: squeeze, budget: r2-equivalent}, update: adamw}
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trivet.errors import ConfigError
from trivet.legs import LEGS, Option, Part
from trivet.parts import PARTS


@dataclass(frozen=True)
class Leg:
    """One leg of a method: a part's name and the options that were set."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def written(self) -> Any:
        """As in YAML: the bare name, or a mapping."""
        return {"name": self.name, **self.options} if self.options else self.name


@dataclass(frozen=True)
class Method:
    """One part of each leg."""

    decompose: Leg
    rank: Leg
    update: Leg
    summary: str = ""

    def spec(self, leg: str) -> Part:
        """The table row of `leg`'s part."""
        return PARTS[leg][getattr(self, leg).name]

    def part(self, leg: str) -> Any:
        """The loaded part of `leg` (decompose, rank or update)."""
        return self.spec(leg).load()

    def options(self, leg: str) -> dict[str, Any]:
        """Every option of `leg`'s part: its default, or what was set."""
        return {**{o.name: o.default for o in self.spec(leg).options}, **getattr(self, leg).options}

    @property
    def needs_probe(self) -> bool:
        """Whether a few batches are looked at before training."""
        return any(self._looks(leg, trait) for leg in LEGS for trait in self.spec(leg).traits)

    def _looks(self, leg: str, trait: str) -> bool:
        """Whether a trait is "probe", or "probe:option=value" with the option so set."""
        word, _, condition = trait.partition(":")
        option, _, value = condition.partition("=")
        return word == "probe" and (not condition or self.options(leg)[option] == value)

    def __str__(self) -> str:
        return " x ".join(getattr(self, leg).name for leg in LEGS)


def _method(decompose: str, rank: str, update: str, summary: str, **options: Mapping[str, Any]) -> Method:
    names = {"decompose": decompose, "rank": rank, "update": update}
    legs = {leg: Leg(name, options.get(leg, {})) for leg, name in names.items()}
    return Method(**legs, summary=summary)


METHODS: dict[str, Method] = {
    "lora": _method("zero", "fixed", "adamw", "plain LoRA on all linear layers"),
    "trivet": _method("zero", "squeeze", "adamw", "trained wide, priced by the task, squeezed to the budget"),
    "auto": _method("zero", "auto", "adamw", "as trivet, and the total is chosen on validation rows"),
    "lora_plus": _method("zero", "fixed", "lora_plus", "B learns faster than A"),
    "lora_fa": _method("zero", "fixed", "frozen_a", "A stays as it started: half the trained parameters"),
    "lora_xs": _method("core", "fixed", "adamw", "r x r numbers a layer between W's singular vectors"),
    "pissa": _method("principal", "fixed", "adamw", "starts from W's largest singular directions"),
    "eva": _method("activation", "fixed", "adamw", "starts from the principal directions of the inputs"),
    "lora_one": _method("gradient", "fixed", "adamw", "starts from the gradient's largest directions"),
    "lora_pro": _method("zero", "fixed", "pro", "steps that follow full fine-tuning's gradient"),
    "curlora": _method("cur", "fixed", "adamw", "a core between columns and rows of W"),
    "tcurlora": _method("tensor_cur", "fixed", "adamw", "a core that the same-shape layers share through an FFT"),
    "dora": _method("dora", "fixed", "adamw", "magnitude and direction apart"),
    "adalora_like": _method("zero", "adalora", "adamw", "AdaLoRA's scores, with parameters that truly go"),
}


def find_method(chosen: Any) -> Method:
    """The method of that name or mapping; `ConfigError` with the nearest valid choice otherwise.

    This is the one check of what can be combined.
    """
    if isinstance(chosen, Method):
        method = chosen
    elif isinstance(chosen, str):
        if chosen not in METHODS:
            raise ConfigError(f"method {chosen!r} is not known; {_near(chosen, METHODS)}")
        method = METHODS[chosen]
    elif isinstance(chosen, Mapping):
        unknown = [key for key in chosen if key not in LEGS]
        if unknown:
            raise ConfigError(f"method: {unknown[0]!r} is no leg; a method has {', '.join(LEGS)}")
        plain = METHODS["lora"]
        legs: list[Leg] = [_leg(leg, chosen[leg]) if leg in chosen else getattr(plain, leg) for leg in LEGS]
        method = Method(legs[0], legs[1], legs[2])
    else:
        raise ConfigError(f"method is a name or a mapping of {', '.join(LEGS)}, not {chosen!r}")
    _check_together(method)
    return method


def written(chosen: Any) -> Any:
    """A method as it stands in YAML: its name where it is a named one, else the mapping of its legs."""
    method = find_method(chosen)
    named = [name for name, m in METHODS.items() if all(getattr(m, leg) == getattr(method, leg) for leg in LEGS)]
    return named[0] if named else {leg: getattr(method, leg).written() for leg in LEGS}


def _leg(leg: str, value: Any) -> Leg:
    """A leg as written: a part's name, or a mapping with its name and options."""
    options = dict(value) if isinstance(value, Mapping) else {"name": value}
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"method.{leg}: a name from `trivet methods`, or {{name: ..., option: ...}}, not {value!r}")
    if name not in PARTS[leg]:
        raise ConfigError(f"method.{leg} {name!r} is not known; {_near(name, PARTS[leg])}")
    known: dict[str, Option] = {option.name: option for option in PARTS[leg][name].options}
    for key, given in options.items():
        if key not in known:
            there = _near(str(key), known) if known else "it has no options"
            raise ConfigError(f"method.{leg}: {name} has no option {key!r}; {there}")
        problem = known[key].problem(given)
        if problem:
            raise ConfigError(f"method.{leg}: {name}'s {key} {problem}, not {given!r}; {known[key].help}")
    return Leg(name, options)


def _near(name: str, table: Any) -> str:
    near = difflib.get_close_matches(name, table, n=1)
    return (f"did you mean {near[0]}? " if near else "") + f"there are: {', '.join(table)}"


def _check_together(method: Method) -> None:
    """Each part says which traits of the others it can't stand, and why."""
    for leg in LEGS:
        for other in LEGS:
            for trait in method.spec(other).traits:
                reason = method.spec(leg).refuses.get(trait)
                if reason:
                    mine, theirs = getattr(method, leg).name, getattr(method, other).name
                    raise ConfigError(f"method: {leg} {mine} can't be combined with {other} {theirs}: {reason}")
