"""Formats from columns, rows as `Example`s, and reasons for rows that are none."""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trivet.config import FORMATS
from trivet.data.dataset import load_dataset
from trivet.data.detect import Example, detect, parse
from trivet.errors import DataError

Rows = list[dict[str, Any]]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def tool(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text}


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Kyiv"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}

#: (a row, the format it is, the Example it becomes), one for each form that is read.
ROWS: list[tuple[dict[str, Any], str, Example]] = [
    (
        {"messages": [user("hi"), assistant("hello")], "id": 7},
        "messages",
        Example(messages=(user("hi"), assistant("hello"))),
    ),
    (
        {
            "messages": [
                system("be brief"),
                user("rain?"),
                {"role": "assistant", "content": None, "tool_calls": [CALL], "name": None},
                {"role": "tool", "content": "no", "tool_call_id": "1"},
                assistant("No."),
            ],
            "tools": [TOOL],
        },
        "messages",
        Example(
            messages=(
                system("be brief"),
                user("rain?"),
                assistant("", tool_calls=[CALL]),
                {"role": "tool", "content": "no", "tool_call_id": "1"},
                assistant("No."),
            ),
            tools=(TOOL,),
        ),
    ),
    (
        {"messages": [{"role": "User", "content": [{"type": "text", "text": "a"}, {"text": "b"}]}, assistant("c")]},
        "messages",
        Example(messages=(user("ab"), assistant("c"))),
    ),
    (
        {
            "conversations": [
                {"from": "human", "value": "rain?"},
                {"from": "function_call", "value": '{"name": "weather"}'},
                {"from": "observation", "value": "no"},
                {"from": "gpt", "value": "No."},
            ],
            "system": "be brief",
            "tools": json.dumps([TOOL]),
        },
        "conversations",
        Example(
            messages=(
                system("be brief"),
                user("rain?"),
                assistant('{"name": "weather"}'),
                tool("no"),
                assistant("No."),
            ),
            tools=(TOOL,),
        ),
    ),
    (
        {"conversations": [{"from": "system", "value": "s"}, {"from": "gpt", "value": "hi"}], "system": "other"},
        "conversations",
        Example(messages=(system("s"), assistant("hi"))),
    ),
    (
        {
            "conversations": [
                {"from": "human", "value": "hi"},
                {"from": "bot", "value": "hello", "role": "oops", "content": 3, "weight": 1},
            ]
        },
        "conversations",
        Example(messages=(user("hi"), assistant("hello", weight=1))),
    ),
    (
        {"conversations": [user("hi"), assistant("hello")]},
        "conversations",
        Example(messages=(user("hi"), assistant("hello"))),
    ),
    (
        {"prompt": "2 + 2 =", "completion": " 4 "},
        "prompt-completion",
        Example(prompt="2 + 2 =", completion=" 4 "),
    ),
    (
        {"prompt": "", "completion": "freely", "system": "s"},
        "prompt-completion",
        Example(prompt="", completion="freely", system="s"),
    ),
    (
        {"prompt": 12, "completion": 1.5, "system": None},
        "prompt-completion",
        Example(prompt="12", completion="1.5"),
    ),
    (
        {"prompt": [system("s"), user("hi")], "completion": [assistant("hello")]},
        "prompt-completion",
        Example(messages=(system("s"), user("hi"), assistant("hello"))),
    ),
    (
        {"prompt": [user("hi")], "completion": "hello"},
        "prompt-completion",
        Example(messages=(user("hi"), assistant("hello"))),
    ),
    (
        {"prompt": "how many?", "completion": "3 and 4\n#### 1,007", "answer": "1,007"},
        "prompt-completion",
        Example(prompt="how many?", completion="3 and 4\n#### 1,007", number="1,007"),
    ),
    (
        {"prompt": "how many?", "completion": "3 and 4\n#### 7", "answer": "seven"},
        "prompt-completion",
        Example(prompt="how many?", completion="3 and 4\n#### 7", number="3 and 4\n#### 7"),
    ),
    (
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        "alpaca",
        Example(prompt="Add.\n\n1 2", completion="3"),
    ),
    (
        {"instruction": "Sing.", "input": " ", "output": "la", "system": "s"},
        "alpaca",
        Example(prompt="Sing.", completion="la", system="s"),
    ),
    ({"instruction": "Sing.", "output": "la"}, "alpaca", Example(prompt="Sing.", completion="la")),
    ({"text": " once upon\n"}, "text", Example(text=" once upon\n")),
    ({"text": "good", "label": " pos "}, "classification", Example(text="good", label="pos")),
    ({"text": "good", "label": 1}, "classification", Example(text="good", label="1")),
    ({"text": "good", "label": True}, "classification", Example(text="good", label="True")),
    ({"text": "good", "label": 1234567.0}, "classification", Example(text="good", label="1234567")),
    ({"text": "good", "label": "3"}, "classification", Example(text="good", label="3")),
    (
        {"text": "a", "text_pair": "b", "label": "entailed"},
        "classification",
        Example(text="a", text_pair="b", label="entailed"),
    ),
    ({"text": "good", "label": 0.25}, "regression", Example(text="good", label=0.25)),
    ({"text": "good", "label": "-1.5"}, "regression", Example(text="good", label=-1.5)),
    ({"text": "a", "text_pair": "b", "label": 2.5}, "regression", Example(text="a", text_pair="b", label=2.5)),
    (
        {"prompt": "sky?", "choices": ["red", "blue"], "answer": 1},
        "multiple-choice",
        Example(prompt="sky?", choices=("red", "blue"), answer=1, completion="blue"),
    ),
    (
        {"prompt": "sky?", "choices": ["red", "blue"], "answer": " B "},
        "multiple-choice",
        Example(prompt="sky?", choices=("red", "blue"), answer=1, completion="blue"),
    ),
    (
        {"prompt": "sky?", "choices": ["red", "blue"], "answer": "red", "completion": "it is red"},
        "multiple-choice",
        Example(prompt="sky?", choices=("red", "blue"), answer=0, completion="red"),
    ),
    (
        {"prompt": "sky?", "choices": ["red", "blue"], "answer": "1"},
        "multiple-choice",
        Example(prompt="sky?", choices=("red", "blue"), answer=1, completion="blue"),
    ),
    (
        {"prompt": "sky?", "choices": {"text": ["red", "blue"], "label": ["1", "2"]}, "answer": "1", "system": "s"},
        "multiple-choice",
        Example(prompt="sky?", choices=("red", "blue"), answer=0, completion="red", system="s"),
    ),
    (
        {"prompt": "a : b", "references": ["one", "two"]},
        "references",
        Example(prompt="a : b", references=("one", "two")),
    ),
    ({"prompt": "a : b", "references": "one"}, "references", Example(prompt="a : b", references=("one",))),
]


@pytest.mark.parametrize(("row", "fmt", "example"), ROWS, ids=[f"{i}-{fmt}" for i, (_, fmt, _) in enumerate(ROWS)])
def test_a_row_of_each_form_is_detected_and_normalised(row: dict[str, Any], fmt: str, example: Example) -> None:
    assert detect([row], "rows") == fmt
    assert parse(row, fmt, "here:1") == replace(example, origin="here:1")


def test_every_format_of_the_config_is_covered() -> None:
    assert {fmt for _, fmt, _ in ROWS} == set(FORMATS) - {"auto"}


def test_content_of_turns_is_not_touched() -> None:
    text = "  \n leading and trailing \t\n"
    parsed = parse({"messages": [user(text), assistant(text)]}, "messages", "")
    assert isinstance(parsed, Example)
    assert [m["content"] for m in parsed.messages] == [text, text]


@pytest.mark.parametrize("role", ["human", "user", "USER"])
def test_names_of_the_user(role: str) -> None:
    parsed = parse(
        {"conversations": [{"from": role, "value": "a"}, {"from": "gpt", "value": "b"}]}, "conversations", ""
    )
    assert isinstance(parsed, Example)
    assert parsed.messages == (user("a"), assistant("b"))


@pytest.mark.parametrize("role", ["gpt", "assistant", "model", "bot", "chatgpt", "function_call"])
def test_names_of_the_assistant(role: str) -> None:
    parsed = parse({"conversations": [{"from": role, "value": "b"}]}, "conversations", "")
    assert isinstance(parsed, Example)
    assert parsed.messages == (assistant("b"),)


# --- detection ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "fmt"),
    [
        (["0.5", "1.0", "3.25"], "regression"),  # as a csv file gives them
        ([0.5, 1, 3], "regression"),
        ([1.0, 2.0, 5.0], "classification"),  # whole numbers that were written as floats
        (["1.0", "2.0"], "classification"),
        (["1", "2", "3"], "classification"),
        ([0, 1, 1], "classification"),
        ([True, False], "classification"),
        (["0.5", "high"], "classification"),
        (["nan", "inf"], "classification"),
        ([0.5, None, ""], "regression"),
        ([10**400, 0.5], "classification"),
        ([[0.5]], "classification"),
        ([None], "text"),
    ],
)
def test_regression_or_classification(labels: list[Any], fmt: str) -> None:
    assert detect([{"text": "a", "label": label} for label in labels], "rows") == fmt


def test_columns_that_most_rows_lack_or_leave_empty_do_not_count() -> None:
    rows: Rows = [{"text": "a"}, {"text": "b"}, {"text": "c", "label": "x"}]
    assert detect(rows, "rows") == "text"
    # one table of many sources has every column, null where a row has none
    rows = [{"messages": None, "prompt": "a", "completion": "b"}, {"messages": None, "prompt": "c", "completion": "d"}]
    assert detect(rows, "rows") == "prompt-completion"
    rows = [{"text": "a", "label": "x"}] * 3 + [{"prompt": "a", "completion": "b"}]
    assert detect(rows, "rows") == "classification"


def test_the_richer_format_wins() -> None:
    both = {"prompt": "a", "completion": "b", "references": ["c"]}
    assert detect([both], "rows") == "references"
    assert detect([{**both, "choices": ["a", "b"], "answer": 0}], "rows") == "multiple-choice"
    assert detect([{**both, "messages": []}], "rows") == "messages"


@pytest.mark.parametrize(
    "row", [{"question": "a", "answer": "b"}, {"prompt": "a"}, {"label": "x"}, {"prompt": "a", "chosen": "b"}, {}]
)
def test_columns_that_fit_nothing_list_what_would(row: dict[str, Any]) -> None:
    with pytest.raises(DataError) as error:
        detect([row], "file.csv")
    text = str(error.value)
    assert text.startswith(f"file.csv: columns {', '.join(row) or '(none)'} fit no format")
    for fmt in FORMATS[1:]:
        assert f"{fmt}: " in text
    assert "prompt-completion: prompt + completion" in text
    assert "data.columns='{prompt: question, completion: answer}'" in text


# --- rows that are wrong ----------------------------------------------------------------------------------------------

BAD = [
    ("messages", {"messages": []}, "must be a list of turns"),
    ("messages", {"messages": "hi"}, "must be a list of turns"),
    ("messages", {"messages": ["hi"]}, "`messages`[0] is str, expected an object"),
    ("messages", {"messages": [user("a"), {"role": "judge", "content": "b"}]}, "`messages`[1] has role 'judge'"),
    ("messages", {"messages": [{"content": "b"}]}, "`messages`[0] has role None"),
    ("messages", {"messages": [user("a")]}, "no assistant turn to learn from"),
    ("messages", {"messages": [user("a"), assistant("  \n")]}, "no assistant turn to learn from"),
    ("messages", {"messages": [user("a"), {"role": "assistant", "content": None}]}, "`messages`[1] has no text"),
    ("messages", {"messages": [user("a"), {"role": "assistant", "content": 3}]}, "`messages`[1] has no text"),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, assistant("b")]},
        "`messages`[0] holds parts that are not text",
    ),
    ("messages", {"messages": [assistant("b")], "tools": {"name": "f"}}, "`tools` must be a list"),
    ("messages", {"messages": [assistant("b")], "tools": "weather"}, "`tools` is not valid JSON"),
    ("messages", {"text": "a"}, "`messages` must be a list of turns"),
    ("conversations", {"conversations": [{"from": "human", "value": "a"}]}, "no assistant turn"),
    ("conversations", {"conversations": [{"from": "gpt", "value": "a"}], "system": ["s"]}, "`system` is list"),
    ("prompt-completion", {"prompt": "a"}, "column `completion` is missing"),
    ("prompt-completion", {"prompt": "a", "completion": " \n"}, "column `completion` is empty"),
    ("prompt-completion", {"prompt": None, "completion": "b"}, "column `prompt` is missing"),
    ("prompt-completion", {"prompt": True, "completion": "b"}, "column `prompt` is bool, expected text"),
    ("prompt-completion", {"prompt": {"a": 1}, "completion": "b"}, "column `prompt` is dict, expected text"),
    ("prompt-completion", {"prompt": "a", "completion": "b", "system": {"s": 1}}, "`system` is dict"),
    ("prompt-completion", {"prompt": [user("a")], "completion": 3}, "`completion` must be text or a list of turns"),
    ("prompt-completion", {"prompt": [user("a")], "completion": [user("b")]}, "no assistant turn"),
    ("alpaca", {"instruction": "a"}, "column `output` is missing"),
    ("alpaca", {"instruction": " ", "output": "b"}, "column `instruction` is empty"),
    ("alpaca", {"instruction": "a", "input": ["x"], "output": "b"}, "column `input` must be text"),
    ("text", {"text": "\n"}, "column `text` is empty"),
    ("text", {"text": ["a"]}, "column `text` is list, expected text"),
    ("classification", {"text": "a"}, "column `label` is None"),
    ("classification", {"text": "a", "label": " "}, "column `label` is ' '"),
    ("classification", {"text": "a", "label": math.nan}, "column `label` is nan"),
    ("classification", {"text": "a", "label": ["x"]}, "column `label` is ['x']"),
    ("classification", {"text": "a", "text_pair": "", "label": "x"}, "column `text_pair` is empty"),
    ("regression", {"text": "a", "label": "high"}, "column `label` is 'high', expected a finite number"),
    ("regression", {"text": "a", "label": "inf"}, "expected a finite number"),
    ("regression", {"text": "a", "label": math.nan}, "expected a finite number"),
    ("regression", {"text": "a", "label": None}, "expected a finite number"),
    ("regression", {"text": "a", "label": 10**400}, "expected a finite number"),
    ("multiple-choice", {"prompt": "a", "choices": ["x"], "answer": 0}, "at least two texts"),
    ("multiple-choice", {"prompt": "a", "choices": ["x", " "], "answer": 0}, "at least two texts"),
    ("multiple-choice", {"prompt": "a", "choices": "xy", "answer": 0}, "at least two texts"),
    ("multiple-choice", {"prompt": "a", "choices": {"label": ["A"]}, "answer": "A"}, "at least two texts"),
    ("multiple-choice", {"prompt": "a", "choices": ["x", "y"], "answer": 2}, "is 2, expected an index below 2"),
    ("multiple-choice", {"prompt": "a", "choices": ["x", "y"], "answer": -1}, "expected an index below 2"),
    ("multiple-choice", {"prompt": "a", "choices": ["x", "y"], "answer": True}, "expected an index below 2"),
    ("multiple-choice", {"prompt": "a", "choices": ["x", "y"], "answer": "C"}, "expected an index below 2"),
    ("multiple-choice", {"prompt": "a", "choices": ["x", "y"], "answer": "²"}, "expected an index below 2"),
    ("multiple-choice", {"prompt": "a", "choices": ["x", "y"]}, "is None, expected an index below 2"),
    ("references", {"prompt": "a", "references": []}, "must be a list of texts with at least one"),
    ("references", {"prompt": "a", "references": ["x", ""]}, "must be a list of texts with at least one"),
    ("references", {"prompt": "a", "references": [3]}, "must be a list of texts with at least one"),
    ("text", {"text": "broken \ud83e emoji"}, "half a character, '\\ud83e'"),
    ("messages", {"messages": [assistant("\udd99")]}, "half a character"),
]


@pytest.mark.parametrize(("fmt", "row", "reason"), BAD, ids=[f"{i}-{fmt}" for i, (fmt, _, _) in enumerate(BAD)])
def test_reasons(fmt: str, row: dict[str, Any], reason: str) -> None:
    said = parse(row, fmt, "here:1")
    assert isinstance(said, str)
    assert reason in said


def test_a_bad_row_is_refused_with_its_place_or_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    rows: Rows = [{"prompt": str(i), "completion": "x"} for i in range(8)]
    rows[3]["completion"] = ""
    rows[6] = {"prompt": "6"}
    path.write_bytes(gzip.compress("\n".join([*map(json.dumps, rows), "{"]).encode()))
    with pytest.raises(DataError) as error:
        load_dataset(path)
    assert str(error.value).startswith(f"{path}:9: not valid JSON")  # files are read whole before rows are judged
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    with pytest.raises(DataError) as error:
        load_dataset(path)
    assert str(error.value) == (
        f"{path}:4: column `completion` is empty (format prompt-completion). "
        "Mend the row, or leave such rows out with data.on_bad_row: skip"
    )
    data = load_dataset(path, on_bad_row="skip")
    assert [e.prompt for e in data] == ["0", "1", "2", "4", "5", "7"]
    assert [bad.origin for bad in data.skipped] == [f"{path}:4", f"{path}:7"]
    assert "column `completion` is missing" in data.skipped[1].reason


def test_no_usable_row_is_an_error_even_when_skipping() -> None:
    with pytest.raises(
        DataError, match=r"no usable row of format text; skipped 2, the first: row 1: .*`text` is empty"
    ):
        load_dataset([{"text": ""}, {"text": " "}], on_bad_row="skip")


def test_the_format_can_be_given() -> None:
    rows: Rows = [{"text": "a", "label": 1, "prompt": "p", "completion": "c"}, {"text": "b", "label": 2}]
    assert load_dataset(rows[:1], format="regression")[0].label == 1.0
    assert load_dataset(rows[:1], format="text")[0] == Example(origin="row 1", text="a")
    assert load_dataset(rows[:1]).format == "prompt-completion"
    with pytest.raises(DataError, match="row 2: column `prompt` is missing"):
        load_dataset(rows, format="prompt-completion")


# --- columns ----------------------------------------------------------------------------------------------------------


def test_columns_are_renamed() -> None:
    rows: Rows = [{"question": "q", "answer": "a", "completion": "not this"}]
    data = load_dataset(rows, columns={"prompt": "question", "completion": "answer"})
    assert data.format == "prompt-completion"
    assert data[0] == Example(origin="row 1", prompt="q", completion="a")
    assert rows == [{"question": "q", "answer": "a", "completion": "not this"}]


def test_columns_may_swap_or_share() -> None:
    swapped = load_dataset(
        [{"prompt": "a", "completion": "b"}], columns={"prompt": "completion", "completion": "prompt"}
    )
    assert (swapped[0].prompt, swapped[0].completion) == ("b", "a")
    shared = load_dataset([{"line": "a"}], columns={"prompt": "line", "completion": "line"})
    assert (shared[0].prompt, shared[0].completion) == ("a", "a")


def test_a_mapped_column_no_longer_counts_under_its_own_name() -> None:
    rows: Rows = [{"text": "long", "label": "x"}]
    assert load_dataset(rows, columns={"prompt": "text", "completion": "label"}).format == "prompt-completion"
    with pytest.raises(DataError, match="columns label, prompt fit no format"):
        load_dataset(rows, columns={"prompt": "text"})


def test_a_mapped_column_that_a_row_lacks() -> None:
    rows: Rows = [{"question": "q", "completion": "a"}, {"ask": "q", "completion": "a"}]
    with pytest.raises(DataError) as error:
        load_dataset(rows, columns={"prompt": "question"})
    assert str(error.value).startswith(
        "row 2: data.columns maps `prompt` to `question`, but the row has ask, completion"
    )
    assert len(load_dataset(rows, columns={"prompt": "question"}, on_bad_row="skip").skipped) == 1
    with pytest.raises(
        DataError, match=r"no rows \(skipped 2, the first: row 1: data.columns maps `prompt` to `asked`"
    ):
        load_dataset(rows, columns={"prompt": "asked"}, on_bad_row="skip")


# --- anything at all --------------------------------------------------------------------------------------------------

COLUMNS = [
    "messages", "conversations", "tools", "system", "prompt", "completion", "references", "choices", "answer",
    "instruction", "input", "output", "text", "text_pair", "label", "other",
]  # fmt: skip
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**400)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["a", "A", "1", "²", "٣", "user", "gpt", "####", "nan", "[]", "[", "\ud83e"])
)
TURN = st.dictionaries(
    st.sampled_from(["role", "content", "from", "value", "tool_calls", "name", "text"]),
    st.sampled_from(["user", "assistant", "human", "gpt", "tool", "system"]) | SCALARS,
    max_size=4,
)
ANYTHING = st.recursive(
    SCALARS | st.lists(TURN, max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "label", "role"]), inner),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(fmt=st.sampled_from(FORMATS[1:]), row=st.dictionaries(st.sampled_from(COLUMNS), ANYTHING))
def test_any_row_becomes_an_example_or_a_reason(fmt: str, row: dict[str, Any]) -> None:
    parsed = parse(row, fmt, "x:1")
    if isinstance(parsed, str):
        assert parsed.strip()
        return
    # what later steps rely on
    assert parsed.origin == "x:1"
    for text in (parsed.prompt, parsed.system):
        assert isinstance(text, str)
    for maybe in (parsed.completion, parsed.text, parsed.text_pair, parsed.number):
        assert maybe is None or isinstance(maybe, str)
    assert all(isinstance(m["content"], str) and isinstance(m["role"], str) for m in parsed.messages)
    assert not parsed.messages or any(m["role"] == "assistant" for m in parsed.messages)
    assert all(isinstance(r, str) and r.strip() for r in (*parsed.references, *parsed.choices))
    assert isinstance(parsed.label, {"regression": float, "classification": str}.get(fmt, type(None)))
    assert parsed.answer is None or parsed.choices[parsed.answer] == parsed.completion
    assert parsed.messages or parsed.text or parsed.references or parsed.completion
    json.dumps([parsed.prompt, parsed.completion, parsed.text], ensure_ascii=False).encode()


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.dictionaries(st.sampled_from(COLUMNS), ANYTHING), max_size=4))
def test_any_rows_have_a_format_or_an_error(rows: Rows) -> None:
    try:
        fmt = detect(rows, "rows")
    except DataError as error:
        assert "fit no format" in str(error)
    else:
        assert fmt in FORMATS[1:]
