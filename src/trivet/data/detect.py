"""What a row means: the format is detected from the columns, every row is checked and put into one form, `Example`."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from trivet.errors import DataError

#: How deep lists and objects may lie in each other.
DEEPEST = 64
#: A chat turn as chat templates take it: {"role": ..., "content": ...} and whatever else the template reads.
Message = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """One row in the form that everything after detection works on; the fields of its format are set.

    Generative rows hold `messages` (a chat), or `prompt` with `completion` or `references`; plain language modelling
    and classification hold `text`; multiple choice holds `prompt`, `choices` and the index `answer`.
    """

    origin: str = ""
    messages: tuple[Message, ...] = ()
    tools: tuple[Any, ...] = ()
    system: str = ""
    prompt: str = ""
    completion: str | None = None
    references: tuple[str, ...] = ()
    text: str | None = None
    text_pair: str | None = None
    label: str | float | None = None
    choices: tuple[str, ...] = ()
    answer: int | None = None
    number: str | None = None  # the gold number of GSM8K-like rows


class _BadValueError(ValueError):
    """Why one row is refused; the caller adds where it stands."""


def _string(row: Mapping[str, Any], column: str, *, empty: bool = False) -> str:
    value = row.get(column)
    if value is None:
        raise _BadValueError(f"column `{column}` is missing")
    if isinstance(value, float) and not math.isfinite(value):  # how tables write what is missing
        raise _BadValueError(f"column `{column}` is {value}, expected text")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise _BadValueError(f"column `{column}` is {type(value).__name__}, expected text")
    if not empty and not value.strip():
        raise _BadValueError(f"column `{column}` is empty")
    return value


_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
          "model": "assistant", "bot": "assistant", "chatgpt": "assistant", "tool": "tool",
          "function_call": "assistant", "observation": "tool", "developer": "system", "function": "tool"}  # fmt: skip


def _turns(value: Any, column: str, role_key: str, content_key: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise _BadValueError(f"column `{column}` must be a list of turns with at least one")
    turns = []
    for index, turn in enumerate(value):
        if not isinstance(turn, dict):
            raise _BadValueError(f"`{column}`[{index}] is {type(turn).__name__}, expected an object")
        role = _ROLES.get(str(turn.get(role_key)).lower())
        if role is None:
            found = f"{turn.get(role_key)!r:.60}"
            raise _BadValueError(f"`{column}`[{index}] has {role_key} {found}, not user, assistant, system or tool")
        taken = (role_key, content_key, "role", "content")
        rest = {k: v for k, v in turn.items() if k not in taken and v is not None}
        content = turn.get(content_key)
        if isinstance(content, list):  # OpenAI's content parts
            if not all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
                raise _BadValueError(f"`{column}`[{index}] holds parts that are not text")
            content = "".join(part["text"] for part in content)
        if content is None and rest.get("tool_calls"):
            content = ""
        if not isinstance(content, str):
            raise _BadValueError(f"`{column}`[{index}] has no text under `{content_key}`")
        turns.append({"role": role, "content": content, **rest})
    if not any(turn["role"] == "assistant" and (turn["content"].strip() or turn.get("tool_calls")) for turn in turns):
        raise _BadValueError(f"`{column}` has no assistant turn to learn from")
    return tuple(turns)


def _tools(row: Mapping[str, Any]) -> tuple[Any, ...]:
    value = row.get("tools") or []
    if isinstance(value, str):  # ShareGPT files with tools hold them as JSON text
        try:
            value = json.loads(value)
        except ValueError as error:
            raise _BadValueError(f"column `tools` is not valid JSON: {error}") from error
    if not isinstance(value, list):
        raise _BadValueError("column `tools` must be a list")
    return tuple(value)


def _messages(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"messages": _turns(row.get("messages"), "messages", "role", "content"), "tools": _tools(row)}


def _conversations(row: Mapping[str, Any]) -> dict[str, Any]:
    value = row.get("conversations")
    first = value[0] if isinstance(value, list) and value else None
    pair = ("role", "content") if isinstance(first, dict) and "role" in first else ("from", "value")
    turns = _turns(row.get("conversations"), "conversations", *pair)
    if _system(row) and turns[0]["role"] != "system":
        turns = ({"role": "system", "content": _system(row)}, *turns)
    return {"messages": turns, "tools": _tools(row)}


def _system(row: Mapping[str, Any]) -> str:
    return "" if row.get("system") is None else _string(row, "system", empty=True)


def _number(row: Mapping[str, Any]) -> str | None:
    """GSM8K-like rows name their final number in `answer`, or after `####` in the solution."""
    if isinstance(row.get("answer"), (str, int, float)) and not isinstance(row["answer"], bool):
        text = str(row["answer"]).strip()
        bare = text.replace(",", "").lstrip("$-").replace(".", "", 1)
        if bare.isdigit() or "####" in text:
            return text
    completion = row.get("completion")
    return completion if isinstance(completion, str) and "####" in completion else None


def _prompt_completion(row: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(row.get("prompt"), list):  # TRL's conversational form
        completion = row.get("completion")
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        if not isinstance(completion, list):
            raise _BadValueError("column `completion` must be text or a list of turns, as `prompt` is")
        return {
            "messages": _turns([*row["prompt"], *completion], "prompt", "role", "content"),
            "tools": _tools(row),
        }
    return {
        "prompt": _string(row, "prompt", empty=True),
        "completion": _string(row, "completion"),
        "system": _system(row),
        "number": _number(row),
    }


def _references(row: Mapping[str, Any]) -> dict[str, Any]:
    value = row.get("references")
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not value or not all(isinstance(v, str) and v.strip() for v in value):
        raise _BadValueError("column `references` must be a list of texts with at least one, none empty")
    return {
        "prompt": _string(row, "prompt", empty=True),
        "references": tuple(value),
        "system": _system(row),
        "number": _number(row),
    }


def _alpaca(row: Mapping[str, Any]) -> dict[str, Any]:
    instruction, extra = _string(row, "instruction"), row.get("input") or ""
    if not isinstance(extra, str):
        raise _BadValueError("column `input` must be text")
    prompt = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    return {"prompt": prompt, "completion": _string(row, "output"), "system": _system(row)}


def _text(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"text": _string(row, "text")}


def _pair(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "text": _string(row, "text"),
        "text_pair": _string(row, "text_pair") if row.get("text_pair") is not None else None,
    }


def _classification(row: Mapping[str, Any]) -> dict[str, Any]:
    label = row.get("label")
    if isinstance(label, (bool, int)):
        label = str(label)
    elif isinstance(label, float) and math.isfinite(label):  # pandas writes whole numbers so where some are missing
        label = str(int(label)) if label.is_integer() else repr(label)
    if not isinstance(label, str) or not label.strip():
        raise _BadValueError(f"column `label` is {label!r:.60}, expected a class name or number")
    return {**_pair(row), "label": label.strip()}


def _regression(row: Mapping[str, Any]) -> dict[str, Any]:
    try:
        label = float(row["label"])
    except (KeyError, TypeError, ValueError, OverflowError):
        label = math.nan
    if not math.isfinite(label):
        raise _BadValueError(f"column `label` is {row.get('label')!r:.60}, expected a finite number")
    return {**_pair(row), "label": label}


def _multiple_choice(row: Mapping[str, Any]) -> dict[str, Any]:
    choices, names = row.get("choices"), None
    if isinstance(choices, dict):  # ARC's and OpenBookQA's own form: {"text": [...], "label": ["A", ...]}
        names, choices = choices.get("label"), choices.get("text")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise _BadValueError("column `choices` must be a list of at least two texts, none empty")
    answer = row.get("answer")
    if isinstance(answer, str):
        answer = answer.strip()
        letters = names if isinstance(names, list) else [chr(ord("A") + i) for i in range(len(choices))]
        for options in (letters, choices):
            if answer in options:
                answer = options.index(answer)
                break
        else:
            answer = int(answer) if answer.isdecimal() and len(answer) < 10 else answer
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        found, n = f"{row.get('answer')!r:.60}", len(choices)
        raise _BadValueError(f"column `answer` is {found}, expected an index below {n}, a letter, or a choice")
    return {
        "prompt": _string(row, "prompt"),
        "choices": tuple(choices),
        "answer": answer,
        "completion": choices[answer],
        "system": _system(row),
    }


#: format -> (columns that must be there, how a row of it becomes an Example's fields). Order is detection's order.
_FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Mapping[str, Any]], dict[str, Any]]]] = {
    "messages": (("messages",), _messages),
    "conversations": (("conversations",), _conversations),
    "multiple-choice": (("prompt", "choices", "answer"), _multiple_choice),
    "references": (("prompt", "references"), _references),
    "prompt-completion": (("prompt", "completion"), _prompt_completion),
    "alpaca": (("instruction", "output"), _alpaca),
    "regression": (("text", "label"), _regression),
    "classification": (("text", "label"), _classification),
    "text": (("text",), _text),
}


def detect(rows: Iterable[Mapping[str, Any]], source: str) -> str:
    """The format's name, from the columns that most of the first rows share.

    `text` with a `label` is regression where every label is a number with a fractional part somewhere, else
    classification. Raises `DataError` that lists the columns found and what would fit.
    """
    sample = [row for _, row in zip(range(200), rows, strict=False)]
    filled = Counter(column for row in sample for column, value in row.items() if value is not None)
    common = [column for column, count in filled.items() if count * 2 > len(sample)]
    for name, (columns, _) in _FORMATS.items():
        if all(c in common for c in columns) and not (name == "regression" and not _continuous(sample)):
            return name
    wanted = "; ".join(f"{name}: {' + '.join(columns)}" for name, (columns, _) in _FORMATS.items())
    raise DataError(
        f"{source}: columns {', '.join(map(str, common))[:300] or '(none)'} fit no format. Known: {wanted}. "
        "Name yours with data.columns, e.g. data.columns='{prompt: question, completion: answer}'"
    )


def _continuous(sample: list[Mapping[str, Any]]) -> bool:
    labels = [row.get("label") for row in sample if row.get("label") not in (None, "")]
    try:
        numbers = [float(label) for label in labels if not isinstance(label, bool)]  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return False
    written_as_float = any(isinstance(label, float) or "." in str(label) for label in labels)
    return len(numbers) == len(labels) > 0 and written_as_float and any(not n.is_integer() for n in numbers)


def _deep(value: Any, levels: int) -> bool:
    """Whether lists and objects lie in each other more than `levels` deep."""
    if not isinstance(value, (dict, list, tuple)):
        return False
    inner = value.values() if isinstance(value, Mapping) else value
    return levels == 0 or any(_deep(each, levels - 1) for each in inner)


def parse(values: Mapping[str, Any], fmt: str, origin: str) -> Example | str:
    """The row as an `Example`, or the reason why it is not one."""
    if _deep(values, DEEPEST):
        return f"is nested more than {DEEPEST} levels deep"
    try:
        example = Example(origin=origin, **_FORMATS[fmt][1](values))
        json.dumps(vars(example), ensure_ascii=False, default=str).encode()
    except _BadValueError as reason:
        return f"{reason} (format {fmt})"
    except UnicodeEncodeError as error:  # JSON can say \ud83d alone, which no tokenizer takes
        return f"holds half a character, {error.object[error.start]!r} (an unpaired surrogate)"
    return example
