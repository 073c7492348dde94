"""Which characters of a rendered chat are the assistant's, for every kind of template."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from chat_templates import (
    CHATS,
    EMPTY_THOUGHT,
    IM,
    KINDS,
    NO_END,
    PAIRS,
    REASONING,
    SMOLLM2,
    THINK_NEVER,
    TOOLS,
    Chat,
    answers,
    chat,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import bpe_tokenizer
from trivet.data.template import PLAIN_CHAT, ChatTemplate, Rendered, TemplateError
from trivet.errors import DataError

TEMPLATES = {name: ChatTemplate(kind.tokenizer()) for name, kind in KINDS.items()}


def learned(rendered: Rendered) -> list[str]:
    return [rendered.text[slice(*span)] for span in rendered.spans]


def template(jinja: str, special: tuple[str, ...] = IM) -> ChatTemplate:
    tokenizer = bpe_tokenizer(special)
    tokenizer.chat_template = jinja
    return ChatTemplate(tokenizer)


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_spans_are_the_assistant_turns(kind: str, name: str) -> None:
    messages = copy.deepcopy(CHATS[name])
    [row] = TEMPLATES[kind].supervised(messages)
    assert learned(row) == [KINDS[kind].turn(text) for text in answers(messages)]
    assert row.text == TEMPLATES[kind].text(messages)
    assert not row.needs_eos
    assert messages == CHATS[name]


CONTENT = st.text(min_size=1, max_size=12).filter(str.strip) | st.sampled_from(
    ["a", "assistant", "user\n", "<", "|im", "\n\nb", " c ", "### Assistant:", "<think>", "0", "1", "01"]
)


@settings(max_examples=400, deadline=None)
@given(
    kind=st.sampled_from(list(KINDS)),
    turns=st.lists(CONTENT, min_size=2, max_size=7),
    system=st.none() | CONTENT,
)
def test_spans_of_any_chat(kind: str, turns: list[str], system: str | None) -> None:
    messages = chat(*turns, system=system)
    [row] = TEMPLATES[kind].supervised(messages)
    assert learned(row) == [KINDS[kind].turn(text) for text in turns[1::2]]


def test_plain_chat_reads_like_text() -> None:
    plain = TEMPLATES["plain"]
    assert plain.jinja == PLAIN_CHAT
    messages = chat("hi", "hello", "bye", system="Be kind.")
    assert plain.text(messages, generation=True) == (
        "### System:\nBe kind.\n\n### User:\nhi\n\n### Assistant:\nhello<|endoftext|>\n\n"
        "### User:\nbye\n\n### Assistant:\n"
    )


@pytest.mark.parametrize(
    ("kind", "end"),
    [
        ("smollm2", "<|im_end|>"),
        ("llama3", "<|eot_id|>"),
        ("chatml", "<|im_end|>"),
        ("plain", "<|endoftext|>"),
        ("mistral", "</s>"),
        ("think-first", "<eos>"),
    ],
)
def test_end_of_turn(kind: str, end: str) -> None:
    assert TEMPLATES[kind].end_of_turn() == end


# --- templates without an end of turn -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in CHATS if n not in ("assistant-first", "only-assistant", "unanswered")])
def test_without_an_end_of_turn_the_row_ends_with_the_answer(name: str) -> None:
    [row] = template(NO_END).supervised(CHATS[name])
    assert learned(row) == [f" {text.strip()}" for text in answers(CHATS[name])]
    assert row.needs_eos
    assert row.text.endswith(f"ASSISTANT: {answers(CHATS[name])[-1].strip()}")


def test_without_an_end_of_turn_what_follows_the_last_answer_is_left_out() -> None:
    no_end = template(NO_END)
    [row] = no_end.supervised(chat("one", "two", "three"))
    assert (row.text, learned(row), row.needs_eos) == ("USER: one\nASSISTANT: two", [" two"], True)
    assert no_end.end_of_turn() is None


def test_an_end_that_is_no_special_token_is_learned_and_eos_follows() -> None:
    [row] = template(SMOLLM2, ("<|endoftext|>",)).supervised(chat("one", "two"))
    assert learned(row) == ["two<|im_end|>"]
    assert row.needs_eos
    assert row.text.endswith("two<|im_end|>")


def test_a_template_that_ends_only_the_last_turn() -> None:
    jinja = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
        "{% if loop.last and m['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    [row] = template(jinja).supervised(chat("one", "two", "three", "four"))
    assert learned(row) == ["two", "four<|im_end|>"]
    assert not row.needs_eos


# --- templates that rewrite -----------------------------------------------------------------------------------------

THOUGHTS = chat(
    "q1", "<think>\nhm\n</think>\n\na1", "q2", "<think>\nso\n</think>\n\na2", "q3", "<think>\nok\n</think>\n\na3"
)


def test_each_turn_is_a_row_where_earlier_thoughts_are_left_out() -> None:
    rows = template(REASONING).supervised(THOUGHTS)
    assert [learned(row) for row in rows] == [[f"{text}<|im_end|>"] for text in answers(THOUGHTS)]
    assert rows[2].text == (
        "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n"
        "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\na2<|im_end|>\n"
        "<|im_start|>user\nq3<|im_end|>\n<|im_start|>assistant\n<think>\nok\n</think>\n\na3<|im_end|>\n"
    )
    assert rows[0].text == (
        "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n<think>\nhm\n</think>\n\na1<|im_end|>\n"
    )


def test_one_row_where_no_earlier_turn_thought() -> None:
    messages = chat("q1", "a1", "q2", "<think>\nso\n</think>\n\na2")
    [row] = template(REASONING).supervised(messages)
    assert learned(row) == ["a1<|im_end|>", "<think>\nso\n</think>\n\na2<|im_end|>"]


def test_an_answer_that_its_thought_repeats() -> None:
    rows = template(REASONING).supervised(chat("q1", "a</think>a", "q2", "a"))
    assert [learned(row) for row in rows] == [["a</think>a<|im_end|>"], ["a<|im_end|>"]]


def test_what_a_template_writes_before_the_answer_is_learned() -> None:
    rows = template(EMPTY_THOUGHT).supervised(chat("q1", "a1", "q2", "a2"))
    assert [learned(row) for row in rows] == [[f"<think>\n\n</think>\n\na{i}<|im_end|>"] for i in (1, 2)]


@pytest.mark.parametrize("answer", ["<think>\nhm\n</think>\nyes", "<think>\n", "<", "<t", "<think>\n<think>\nx", "yes"])
def test_a_generation_prompt_that_runs_into_the_answer(answer: str) -> None:
    assert TEMPLATES["think-first"].text(chat("q"), generation=True).endswith("<｜Assistant｜><think>\n")
    [row] = TEMPLATES["think-first"].supervised(chat("q", answer, "q", answer))
    assert learned(row) == [KINDS["think-first"].turn(answer)] * 2


def test_a_template_that_always_changes_the_answer_is_refused() -> None:
    always = template(THINK_NEVER, KINDS["think-first"].special)
    assert learned(always.supervised(chat("q", "a"))[0]) == ["a<eos>"]
    with pytest.raises(TemplateError, match=r"changes the text of assistant turn 2; set data.chat_template"):
        always.supervised(chat("q", "<think>\nhm\n</think>\nyes"))


# --- tools ----------------------------------------------------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Kyiv"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALLING: Chat = [
    {"role": "user", "content": "rain?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "no"},
    {"role": "assistant", "content": "I ask again.", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "no"},
    {"role": "assistant", "content": "No."},
]
CALLED = '<tool_call>{"name": "weather", "arguments": {"city": "Kyiv"}}</tool_call>'


def test_tool_calls_are_learned_and_their_results_are_not() -> None:
    [row] = template(TOOLS).supervised(CALLING, [TOOL])
    assert learned(row) == [f"{CALLED}<|im_end|>", f"I ask again.{CALLED}{CALLED}<|im_end|>", "No.<|im_end|>"]
    assert row.text.startswith("<|im_start|>system\ntools: [{")


@pytest.mark.parametrize("turns", [2, 4])
def test_a_template_that_leaves_out_tool_calls_is_refused(turns: int) -> None:
    for kind in ("smollm2", "plain"):
        with pytest.raises(TemplateError, match=r"leaves out the tool calls of turn \d; set data.chat_template"):
            TEMPLATES[kind].supervised(CALLING[:turns])


def test_tool_calls_of_turns_that_are_rewritten_later() -> None:
    """Calls of earlier questions are dropped, so each turn is a row of its own, with its calls."""
    jinja = TOOLS.replace(
        "m['tool_calls'] or []", "((m['tool_calls'] or []) if loop.index0 > messages | length - 3 else [])"
    )
    rows = template(jinja).supervised(CALLING)
    assert [learned(row) for row in rows] == [
        [f"{CALLED}<|im_end|>"],
        [f"I ask again.{CALLED}{CALLED}<|im_end|>"],
        ["No.<|im_end|>"],
    ]


# --- templates that refuse, and where templates come from -----------------------------------------------------------


def test_a_template_that_refuses_says_why() -> None:
    mistral = TEMPLATES["mistral"]
    with pytest.raises(TemplateError, match="the chat template refuses the row: Conversation roles must alternate"):
        mistral.supervised(CHATS["user-twice"])
    assert issubclass(TemplateError, DataError)


@pytest.mark.parametrize("jinja", ["{{ messages[0]['content'] + 1 }}", "{% for m in %}", "{{ messages[0].no.thing }}"])
def test_a_template_that_is_broken_says_why(jinja: str) -> None:
    with pytest.raises(TemplateError, match="the chat template refuses the row: "):
        template(jinja).supervised(chat("a", "b"))
    assert template(jinja).end_of_turn() is None


def test_nothing_asked_is_refused_by_templates_that_look_at_the_first_turn() -> None:
    with pytest.raises(TemplateError, match="refuses the row"):
        TEMPLATES["chatml"].text([], generation=True)


def test_ones_own_template_goes_before_the_tokenizers() -> None:
    tokenizer = KINDS["smollm2"].tokenizer()
    own = "{% for m in messages %}{{ m['role'][0] + '>' + m['content'] + eos_token }}{% endfor %}"
    [row] = ChatTemplate(tokenizer, own).supervised(chat("q", "a"))
    assert row.text == "u>q<|im_end|>a>a<|im_end|>"
    assert learned(row) == ["a>a<|im_end|>"]  # without a generation prompt, all of the turn is the model's to write


def test_several_named_templates() -> None:
    tokenizer = bpe_tokenizer(IM)
    tokenizer.chat_template = {"default": SMOLLM2, "tool_use": TOOLS}
    named = ChatTemplate(tokenizer)
    assert learned(named.supervised(chat("a", "b"))[0]) == ["b<|im_end|>"]
    assert "tools: [" not in named.text(chat("a", "b"))
    assert "tools: [" in named.text(CALLING, tools=[TOOL])
    assert named.end_of_turn() == "<|im_end|>"


@pytest.mark.demo
def test_the_demo_models_own_template() -> None:
    from transformers import AutoTokenizer

    from trivet.demo import demo_path

    tokenizer: Any = AutoTokenizer.from_pretrained(demo_path("demo"))
    assert tokenizer.chat_template == SMOLLM2
    real = ChatTemplate(tokenizer)
    for messages in CHATS.values():
        [row] = real.supervised(messages)
        assert learned(row) == [f"{text}<|im_end|>" for text in answers(messages)]
    assert real.end_of_turn() == "<|im_end|>"
