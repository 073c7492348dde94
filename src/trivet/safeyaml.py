"""YAML as trivet reads and writes it: plain values, every key once, and no more of them than a person writes."""

from __future__ import annotations

import re
from typing import Any

import yaml

#: Longest config file, in bytes, and most values in one with its aliases written out: a stranger's file may be a bomb.
LONGEST, _MOST_VALUES = 1 << 20, 20_000


class Loader(yaml.SafeLoader):
    """Plain values only, every key once. YAML 1.1 reads `3e-4` as a string; users mean a number, as in YAML 1.2."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse what PyYAML would pass over: that the second of two equal keys wins."""
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"`{key_node.value}` is set twice; keep one", key_node.start_mark
                    )
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Quotes the texts that `Loader` would read as numbers (a commit such as 12e4567)."""


_NUMBER = re.compile(
    r"""^(?:[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
    |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
    re.X,
)
Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+0123456789."))
Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+0123456789."))


def reason(error: yaml.YAMLError) -> str:
    """What is wrong, in one line."""
    return str(getattr(error, "problem", None) or getattr(error, "reason", None) or error)


def parse(text: str) -> tuple[Loader, yaml.Node | None]:
    """The text's nodes, within limits; `yaml.YAMLError` otherwise, also where a character is no text."""
    loader = Loader(text)
    try:
        root = loader.get_single_node()
        if root is not None:
            _weigh(root, {})
    except RecursionError as error:
        raise yaml.YAMLError("nested too deeply") from error
    return loader, root


def _weigh(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values there are below a node when its aliases are written out."""
    if id(node) not in known:
        known[id(node)] = _MOST_VALUES  # until it is known: an alias to what it lies in has no end
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        inner = [each for part in parts for each in (part if isinstance(part, tuple) else (part,))]
        known[id(node)] = 1 + sum(_weigh(each, known) for each in inner)
    if known[id(node)] > _MOST_VALUES:
        raise yaml.YAMLError(f"it holds more than {_MOST_VALUES:,} values, its aliases written out")
    return known[id(node)]


def value_of(loader: Loader, node: yaml.Node) -> Any:
    """A node's value; `yaml.YAMLError` with its line where it is no value, such as the 30th of February."""
    try:
        return loader.construct_object(node, deep=True)
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from error
