"""What adapter_config.json and trivet.json may hold: each key with its check, so that nothing else reaches a library.

A stranger's file could name ranks that fill the memory, modules to import, servers to contact, or features that would
be passed over in silence. Files are read within limits, and a key that is not known is refused where it is set.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trivet.errors import AdapterError

#: Longest JSON file that is read, in bytes. The names of all experts' layers of a large model take two million.
LARGEST_JSON = 8 << 20
_MOST_NAMES, _LONGEST_NAME, _LONGEST_PATTERN = 50_000, 512, 1 << 20
_PLAIN = re.compile(r"\w+(?:\.\w+)*")


def read_json(path: Path, limit: int = LARGEST_JSON) -> dict[str, Any]:
    """A JSON object from a file; `AdapterError` where it is too long, too deep, no object, or names a key twice."""
    try:
        if path.stat().st_size > limit:
            raise AdapterError(f"{path}: can't be read: it is longer than {limit:,} bytes")
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once, parse_constant=_no_number)
    except AdapterError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: can't be read: {error}") from error
    if not isinstance(found, dict):
        raise AdapterError(f"{path}: can't be read: it is no JSON object")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key[:60]!r} is given twice")
        found[key] = value
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


# -- adapter_config.json -----------------------------------------------------------------------------------------------


def _whole(low: int) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v < 2**31


def _number(v: Any) -> bool:
    return isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < 2**31 and math.isfinite(v)


def _flag(v: Any) -> bool:
    return isinstance(v, bool)


def _text(v: Any) -> bool:
    return isinstance(v, str) and len(v) <= 4096 and v.isprintable()


def _location(v: Any) -> bool:
    """No address of a server: opening `//host/share` would send this account's name and password's hash there."""
    return _text(v) and "://" not in v and not v.startswith(("//", "\\\\"))


def _listed(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, list) and len(v) <= _MOST_NAMES and all(map(check, v))


def _name(v: Any) -> bool:
    return isinstance(v, str) and 0 < len(v) <= _LONGEST_NAME


def _plain(v: Any) -> bool:
    return _name(v) and _PLAIN.fullmatch(v) is not None


def _pattern(v: Any) -> bool:
    return isinstance(v, str) and 0 < len(v) <= _LONGEST_PATTERN


def _patterns(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def holds(v: Any) -> bool:
        return isinstance(v, dict) and len(v) <= _MOST_NAMES and all(_pattern(k) and check(x) for k, x in v.items())

    return holds


def _either(*checks: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda v: any(check(v) for check in checks)


def _among(*values: Any) -> Callable[[Any], bool]:
    return lambda v: any(v is x or (isinstance(v, str) and v == x) for x in values)


def _transformers_class(v: Any) -> bool:
    """As PEFT writes it for models without a task; what it names would be imported."""
    names = {"base_model_class", "parent_library"}
    return isinstance(v, dict) and v.keys() <= names and all(map(_text, v.values())) and (
        v.get("parent_library") or "transformers"
    ).split(".")[0] == "transformers"  # fmt: skip


_NAMES = _either(_pattern, _listed(_name))
_TOKENS = _listed(_whole(0))

#: What PEFT is given: key -> (check, what it must be). None, where PEFT's default is None, always passes.
_KNOWN: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_whole(1), "a whole number of at least 1"),
    "lora_alpha": (_number, "a number"),
    "lora_dropout": (lambda v: _number(v) and 0 <= v <= 1, "a number from 0 to 1"),
    "target_modules": (_NAMES, "a pattern or a list of layer names"),
    "exclude_modules": (_either(_NAMES, _among("")), "a pattern or a list of layer names"),
    "rank_pattern": (_patterns(_whole(1)), "a mapping of patterns to whole numbers of at least 1"),
    "alpha_pattern": (_patterns(_number), "a mapping of patterns to numbers"),
    "modules_to_save": (_listed(_plain), "a list of plain names"),
    "layers_to_transform": (_either(_whole(0), _listed(_whole(0))), "layer numbers"),
    "layers_pattern": (_either(_plain, _listed(_plain), _among("")), "plain names"),
    "trainable_token_indices": (
        _either(_TOKENS, lambda v: isinstance(v, dict) and all(_plain(k) and _TOKENS(x) for k, x in v.items())),
        "token numbers",
    ),
    "bias": (_among("none", "all", "lora_only"), "none, all or lora_only"),
    "init_lora_weights": (
        _among(True, False, "gaussian", "eva", "orthogonal", "mica"),
        "true, false, gaussian, eva, orthogonal or mica; pissa, olora and others change the base model when they are "
        "loaded: convert the adapter with the tool that made it",
    ),
    "fan_in_fan_out": (_flag, "true or false"),
    "use_rslora": (_flag, "true or false"),
    "use_dora": (_flag, "true or false"),
    "lora_bias": (_flag, "true or false"),
    "ensure_weight_tying": (_flag, "true or false"),
    "inference_mode": (_flag, "true or false"),
    "task_type": (_text, "text"),
    "peft_version": (_text, "text"),
    "revision": (_text, "text"),
    "base_model_name_or_path": (_location, "a hub id or a folder"),
}
#: What says nothing about the trained adapter, and stays out: key -> check.
_LEFT_OUT: dict[str, tuple[Callable[[Any], bool], str]] = {
    "peft_type": (_text, "text"),
    "auto_mapping": (_transformers_class, "a class of transformers"),
    "megatron_core": (_among("megatron.core"), "megatron.core: it would be imported"),
    "qalora_group_size": (_whole(1), "a whole number"),
    **dict.fromkeys(
        ("loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config"),
        (lambda v: isinstance(v, dict), "a mapping"),
    ),
}


def checked_values(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What PEFT's LoraConfig is given of adapter_config.json. Raises `AdapterError` with the key that is wrong."""
    kind = values.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"{path}: is of type {str(kind)[:60]}, not LoRA")
    keep = {}
    for key, value in values.items():
        check = _KNOWN.get(key) or _LEFT_OUT.get(key)
        if check is None and value not in (None, False, 0, "", [], {}):
            raise AdapterError(
                f"{path}: `{key[:60]}` is {shown(value)}, which trivet does not know how to carry out; without it the "
                "adapter would compute something else"
            )
        if check is not None and value is not None and not check[0](value):
            raise AdapterError(f"{path}: `{key}` is {shown(value)}, but must be {check[1]}")
        if key in _KNOWN and value is not None:
            keep[key] = value
    return keep


def shown(value: Any) -> str:
    """A value as JSON, cut to one line."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


# -- trivet.json -------------------------------------------------------------------------------------------------------

_DATA: dict[str, Callable[[Any], bool]] = {
    "max_length": _whole(1),
    "chat_template": _location,
    "loss_on": _among("responses", "all"),
}
_NOTES: dict[str, Callable[[Any], bool]] = {
    "base_model": _location,
    "revision": _text,
    "dtype": _among("float32", "bfloat16", "float16"),
    "load_in_4bit": lambda v: isinstance(v, bool),
    "task": _among("causal-lm", "seq2seq", "classification", "regression"),
    "labels": lambda v: isinstance(v, list) and 0 < len(v) <= 1_000_000 and all(isinstance(x, str) for x in v),
    "data": lambda v: isinstance(v, dict) and v.keys() == _DATA.keys() and all(_DATA[k](x) for k, x in v.items()),
}


def check_notes(notes: Mapping[str, Any], path: Path) -> None:
    """Refuse what trivet would not have written about how rows are put to the model."""
    for key, holds in _NOTES.items():
        if notes.get(key) is not None and not holds(notes[key]):
            raise AdapterError(
                f"{path}: `{key}` is {shown(notes[key])}, which trivet does not write; the file was changed"
            )
