"""Reading and writing configurations: strict, with the line of every mistake.

`load` gives a frozen `Config` or a `ConfigError` that names file:line, the key and the nearest valid choice.
"""

from __future__ import annotations

import difflib
import functools
import operator
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from trivet.config import ALIASES, Config
from trivet.errors import ConfigError
from trivet.safeyaml import LONGEST, Dumper, Loader, parse, reason, value_of

#: A value and where it was written ("config.yaml:3", or "override model.name=…").
Located = tuple[Any, str]


@functools.cache
def sections() -> dict[str, type]:
    """The nested sections of `Config`, in order."""
    hints = typing.get_type_hints(Config)
    return {f.name: hints[f.name] for f in fields(Config) if is_dataclass(hints[f.name])}


@functools.cache
def keys() -> dict[str, tuple[Field, Any]]:
    """Every settable key ("training.batch_size", "output_dir") with its field and type."""
    found: dict[str, tuple[Field, Any]] = {}
    hints = typing.get_type_hints(Config)
    for top in fields(Config):
        if is_dataclass(hints[top.name]):
            inner = typing.get_type_hints(hints[top.name])
            for f in fields(hints[top.name]):
                found[f"{top.name}.{f.name}"] = (f, inner[f.name])
        else:
            found[top.name] = (top, hints[top.name])
    return found


def load(
    path: str | Path | None = None,
    overrides: Iterable[str] = (),
    values: Mapping[str, Any] | None = None,
    start: Config | None = None,
) -> Config:
    """Read a config file (or `start` from a config), then apply `values` and `overrides` ("training.max_steps=20").

    The keys of `values` may be dotted, bare or aliases.

    Raises `ConfigError` for a missing file, bad YAML, an unknown key, a wrong type, or a value out of range.
    """
    settings: dict[str, Located] = {}
    if start is not None:
        settings = {name: (_get(start, name), "the config") for name in keys()}
    if path is not None:
        for key, value, where in _read(Path(path)):
            _assign(settings, key, value, where)
    later: dict[str, Located] = {}
    for key, value in (values or {}).items():
        _assign(later, key, value, f"argument {key}")
    settings |= later
    for text in overrides:
        key, equals, raw = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"override '{text}': write key=value, for example training.max_steps=20")
        try:
            loader, node = parse(raw)
            value = None if node is None else value_of(loader, node)
        except yaml.YAMLError as error:
            raise ConfigError(f"override '{text[:200]}': the value is not valid YAML: {reason(error)}") from error
        settings[canonical(key.strip(), f"override '{text}'")] = (value, f"override '{text}'")
    return _build(settings)


def _get(config: Config, name: str) -> Any:
    section, _, key = name.rpartition(".")
    return getattr(getattr(config, section) if section else config, key)


def _read(path: Path) -> list[tuple[str, Any, str]]:
    """All leaves of the YAML file as (dotted key as written, value, "file:line")."""
    try:
        if path.stat().st_size > LONGEST:
            raise ConfigError(f"config file {path}: is longer than {LONGEST:,} bytes, so it is no config")
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError(
            f"config file {path}: no such file; `trivet init {path}` writes a commented one to start from"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path}: cannot be read as UTF-8 text: {error}") from error
    try:
        loader, root = parse(text)
        if root is None:
            return []
        if not isinstance(root, yaml.MappingNode):
            kind = type(root).__name__[:-4].lower()
            raise ConfigError(f"{path}:1: a config is a mapping of sections such as `model:`, not a {kind}")
        found = []
        for key, node, line in _items(root, loader, path):
            if key in sections() and isinstance(node, yaml.MappingNode):
                for inner, leaf, at in _items(node, loader, path):
                    found.append((f"{key}.{inner}", value_of(loader, leaf), f"{path}:{at}"))
            elif key in sections():
                value = value_of(loader, node)
                if value is not None:  # `data:` with nothing under it is an empty section
                    names = ", ".join(f.name for f in fields(sections()[key])[:3])
                    raise ConfigError(f"{path}:{line}: `{key}:` is a section with keys such as {names}, not {value!r}")
            else:
                found.append((key, value_of(loader, node), f"{path}:{line}"))
        return found
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else text.count("\n", 0, getattr(error, "position", 0)) + 1
        raise ConfigError(f"{path}:{line}: not valid YAML: {reason(error)}") from error


def _items(node: yaml.MappingNode, loader: Loader, path: Path) -> list[tuple[str, yaml.Node, int]]:
    seen: dict[str, int] = {}
    items = []
    for key_node, value in node.value:
        key, line = str(value_of(loader, key_node)), key_node.start_mark.line + 1
        if key in seen:
            raise ConfigError(f"{path}:{line}: `{key}` is set twice, first on line {seen[key]}; keep one")
        seen[key] = line
        items.append((key, value, line))
    return items


def _assign(settings: dict[str, Located], key: str, value: Any, where: str) -> None:
    """Resolve aliases and bare names, refuse what is unknown or given twice."""
    name = canonical(key, where)
    if name in settings:
        raise ConfigError(f"{where}: `{key}` sets {name}, which {settings[name][1]} sets too; keep one")
    settings[name] = (value, where)


def canonical(key: str, where: str) -> str:
    """Our dotted name for a key as the user wrote it; `ConfigError` with the nearest valid name otherwise."""
    valid = keys()
    if key in valid:
        return key
    bare = key.rpartition(".")[2]
    prefix = key.rpartition(".")[0]
    if prefix in ("", *sections()):
        if bare in ALIASES:
            return ALIASES[bare]
        homes = [name for name in valid if name.endswith(f".{bare}")]
        if len(homes) == 1:  # the key is ours but stands in another section, or flat at the top level
            return homes[0]
    if key in sections():
        raise ConfigError(
            f"{where}: `{key}` is a section; set one of its keys, such as {key}.{fields(sections()[key])[0].name}"
        )
    names = {name.rpartition(".")[2]: name for name in valid} | ALIASES
    near = difflib.get_close_matches(bare, names, n=1, cutoff=0.5)
    hint = (
        f"did you mean {names[near[0]]}?"
        if near
        else f"`trivet init` shows every key; sections: {', '.join(sections())}"
    )
    raise ConfigError(f"{where}: unknown key `{key}`; {hint}")


def _build(settings: Mapping[str, Located]) -> Config:
    valid = keys()
    values = {name: _check(name, *valid[name], value, where) for name, (value, where) in settings.items()}
    parts: dict[str, Any] = {name: value for name, value in values.items() if "." not in name}
    for section, cls in sections().items():
        inside = {k.partition(".")[2]: v for k, v in values.items() if k.startswith(f"{section}.")}
        parts[section] = cls(**inside)
    return Config(**parts)


def _check(name: str, f: Field, kind: Any, value: Any, where: str) -> Any:
    """The value converted to the field's type, or a `ConfigError` that says what would be right."""
    accepted, matched = _convert(kind, value)
    if not matched:
        raise ConfigError(
            f"{where}: {name} is {_describe(kind)}, not {value!r} ({type(value).__name__}); {f.metadata['help']}"
        )
    choices = f.metadata["choices"]
    for item in accepted if isinstance(accepted, list) else [accepted]:
        if choices and item not in choices:
            near = difflib.get_close_matches(str(item), choices, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(f"{where}: {name} can't be {item!r}; {hint}choices: {', '.join(choices)}")
    for words, holds in (("at_least", operator.ge), ("above", operator.gt), ("below", operator.lt)):
        bound = f.metadata[words]
        if bound is not None and isinstance(accepted, (int, float)) and not holds(accepted, bound):
            rule = f"{words.replace('_', ' ')} {bound:.10g}"
            raise ConfigError(f"{where}: {name} must be {rule}, not {accepted}; {f.metadata['help']}")
    if f.metadata["check"] is not None:
        try:
            return f.metadata["check"](accepted)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
    return accepted


def _convert(kind: Any, value: Any) -> tuple[Any, bool]:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            accepted, matched = _convert(option, value)
            if matched:
                return accepted, True
        return value, False
    if kind is type(None):
        return None, value is None
    if origin is typing.Literal:
        return value, isinstance(value, str) and value in arguments
    if origin is list:
        listed = isinstance(value, (list, tuple))
        return (list(value), all(isinstance(v, arguments[0]) for v in value)) if listed else (value, False)
    if origin is dict:
        kinds = (str, object if arguments[1] is Any else arguments[1])
        return value, isinstance(value, dict) and all(all(map(isinstance, kv, kinds)) for kv in value.items())
    if kind is bool:
        return value, isinstance(value, bool)
    if kind is int:
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        return (int(value), True) if whole and not isinstance(value, bool) else (value, False)
    if kind is float:
        finite = isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
        return (float(value), True) if finite and not isinstance(value, bool) else (value, False)
    if isinstance(value, Path):
        value = str(value)
    return value, isinstance(value, kind)


def _describe(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if kind in names:
        return names[kind]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(a) for a in arguments)
    if origin is typing.Literal:
        return " or ".join(arguments)
    words = "a list" if origin is list else "a mapping"
    return words if arguments[-1] is Any else f"{words} of texts"


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested values, in the order of the schema."""
    return asdict(config)


def dump(config: Config) -> str:
    """The resolved config as YAML that `load` reads back to an equal `Config`."""
    return yaml.dump(to_dict(config), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=110)


def template(**values: Any) -> str:
    """A commented config with every key at its default, or at the dotted `values` given: what `trivet init` writes."""
    given = {key.replace("__", "."): value for key, value in values.items()}
    lines = [
        "# trivet configuration. Every key has a default; keep what you change. Docs: docs/configuration.md",
        "",
    ]
    hints = typing.get_type_hints(Config)
    flat = [f for f in fields(Config) if f.name not in sections()]
    for f in flat:
        lines += _entry(f, f.name, given, "")
    for section, cls in sections().items():
        lines += ["", f"# {(hints[section].__doc__ or '').strip()}", f"{section}:"]
        for f in fields(cls):
            lines += _entry(f, f"{section}.{f.name}", given, "  ")
    return "\n".join(lines) + "\n"


def _entry(f: Field, name: str, given: Mapping[str, Any], indent: str) -> list[str]:
    default = f.default if f.default is not MISSING else f.default_factory()  # type: ignore[misc,operator]
    value = given.get(name, default)
    text = yaml.dump(value, Dumper=Dumper, default_flow_style=True, allow_unicode=True, width=sys.maxsize)
    end = "...\n"  # YAML's mark after a bare scalar
    choices = f.metadata["choices"]
    about = f.metadata["help"] + (f" ({' | '.join(choices)})" if choices else "")
    return [f"{indent}# {about}", f"{indent}{f.name}: {text.removesuffix(end)[:-1]}"]
