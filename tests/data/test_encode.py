"""What the model is trained on: the tokens that are learned are the answers, and nothing else.

Everything is decoded from the token ids again, with real tokenizers and templates.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from chat_templates import CHATML, CHATS, IM, KINDS, NO_END, PAIRS, REASONING, SMOLLM2, TOOLS, Kind, answers, chat
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from conftest import bpe_tokenizer, word_tokenizer
from trivet.data.dataset import Dataset, load_dataset
from trivet.data.detect import Example
from trivet.data.encode import (
    IGNORE,
    Encoded,
    LabelEncoder,
    Summary,
    TextEncoder,
    encode_dataset,
    references,
    truncate,
)
from trivet.data.template import TemplateError
from trivet.errors import ConfigError, DataError


def decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def runs(row: Encoded) -> list[list[int]]:
    """The stretches of tokens that are learned."""
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    stretches = itertools.groupby(pairs, key=lambda pair: pair[1] != IGNORE)
    out = [list(stretch) for learned, stretch in stretches if learned]
    assert all(token == label for stretch in out for token, label in stretch)
    return [[token for token, _ in stretch] for stretch in out]


def learned(encoder: TextEncoder, row: Encoded) -> list[str]:
    return [decode(encoder.tokenizer, ids) for ids in runs(row)]


def head(row: Encoded) -> list[int]:
    """The tokens before the first that is learned."""
    return row["input_ids"][: next(i for i, label in enumerate(row["labels"]) if label != IGNORE)]


def example(messages: list[dict[str, Any]], tools: tuple[Any, ...] = ()) -> Example:
    return Example(origin="here:1", messages=tuple(messages), tools=tools)


def only(encoded: tuple[list[Encoded], bool]) -> Encoded:
    rows, cut = encoded
    assert not cut
    [row] = rows
    return row


def with_template(jinja: str, special: tuple[str, ...] = IM) -> Any:
    tokenizer = bpe_tokenizer(special)
    tokenizer.chat_template = jinja
    return tokenizer


ENCODERS = {name: TextEncoder(kind.tokenizer(), max_length=100_000) for name, kind in KINDS.items()}


# --- masks: chats -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), [p for p in PAIRS if p[0] != "plain" or p[1] != "one"])
def test_the_learned_tokens_are_the_assistant_turns(kind: str, name: str) -> None:
    encoder, messages = ENCODERS[kind], CHATS[name]
    row = only(encoder.encode(example(messages)))
    assert learned(encoder, row) == [KINDS[kind].turn(text) for text in answers(messages)]
    assert decode(encoder.tokenizer, row["input_ids"]) == encoder.chat.text(messages)


CONTENT = st.text(min_size=1, max_size=12).filter(str.strip) | st.sampled_from(
    ["a", "assistant", "user\n", "<", "\n\nb", " c ", "\n \n\n d", "e\n\n\n", "### Assistant:", "sky is", "0 1  2"]
)


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(list(KINDS)),
    turns=st.lists(CONTENT, min_size=3, max_size=7),
    system=st.none() | CONTENT,
)
def test_the_learned_tokens_of_any_chat(kind: str, turns: list[str], system: str | None) -> None:
    encoder = ENCODERS[kind]
    row = only(encoder.encode(example(chat(*turns, system=system))))
    assert learned(encoder, row) == [KINDS[kind].turn(text) for text in turns[1::2]]


def test_the_template_is_not_needed_for_a_question_and_its_answer() -> None:
    encoder = ENCODERS["plain"]
    row = only(encoder.encode(example(chat("what colour ?", "blue"))))
    assert decode(encoder.tokenizer, row["input_ids"]) == "what colour ?\nblue<|endoftext|>"
    assert row == only(encoder.encode(Example(prompt="what colour ?", completion="blue")))
    # more than that is a chat
    row = only(encoder.encode(example(chat("what colour ?", "blue", system="s"))))
    assert decode(encoder.tokenizer, row["input_ids"]) == (
        "### System:\ns\n\n### User:\nwhat colour ?\n\n### Assistant:\nblue<|endoftext|>\n\n"
    )


def test_thoughts_that_are_left_out_later_are_learned_in_rows_of_their_own() -> None:
    turns = ["q1", "<think>\nhm\n</think>\n\na1", "q2", "<think>\nso\n</think>\n\na2"]
    encoder = TextEncoder(with_template(REASONING))
    rows, cut = encoder.encode(example(chat(*turns)))
    assert [learned(encoder, row) for row in rows] == [[f"{turns[1]}<|im_end|>"], [f"{turns[3]}<|im_end|>"]]
    assert "hm" not in decode(encoder.tokenizer, rows[1]["input_ids"])
    assert not cut


@pytest.mark.parametrize("name", ["one", "system", "several", "unicode", "whitespace", "repeated", "quotes-later"])
def test_without_an_end_of_turn_eos_ends_the_row(name: str) -> None:
    encoder = TextEncoder(with_template(NO_END))
    row = only(encoder.encode(example(CHATS[name])))
    *before, last = [f" {text.strip()}" for text in answers(CHATS[name])]
    assert learned(encoder, row) == [*before, f"{last}<|im_end|>"]
    assert row["input_ids"][-1] == encoder.tokenizer.eos_token_id


def test_an_end_that_is_no_special_token_is_learned_and_eos_too() -> None:
    encoder = TextEncoder(with_template(SMOLLM2, ("<|endoftext|>",)))
    row = only(encoder.encode(example(chat("a", "b", "c", "d"))))
    assert learned(encoder, row) == ["b<|im_end|>", "d<|im_end|><|endoftext|>"]


def test_tool_calls_are_learned() -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Kyiv"}}}
    messages = [
        {"role": "user", "content": "rain?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "no"},
        {"role": "assistant", "content": "No."},
    ]
    encoder = TextEncoder(with_template(TOOLS))
    row = only(encoder.encode(example(messages)))
    called = '<tool_call>{"name": "weather", "arguments": {"city": "Kyiv"}}</tool_call>'
    assert learned(encoder, row) == [f"{called}<|im_end|>", "No.<|im_end|>"]
    assert references(example(messages)) == ("No.",)
    # a model without a template can't say them
    with pytest.raises(DataError, match="here:1: the chat template leaves out the tool calls of turn 2"):
        encode_dataset([example(messages[:2])], ENCODERS["plain"])


def test_tools_are_shown_to_the_model() -> None:
    encoder = TextEncoder(with_template(TOOLS))
    asked = example(chat("rain?", "No."), tools=({"name": "weather"},))
    assert 'tools: [{"name": "weather"}]' in decode(encoder.tokenizer, only(encoder.encode(asked))["input_ids"])
    assert encoder.prompt_ids(asked) == head(only(encoder.encode(asked)))


def test_a_row_that_the_template_refuses_is_named() -> None:
    rows = [example(chat("a", "b")), Example(origin="chats.jsonl:2", messages=tuple(CHATS["user-twice"]))]
    with pytest.raises(DataError) as error:
        encode_dataset(rows, ENCODERS["mistral"])
    assert str(error.value).startswith(
        "chats.jsonl:2: the chat template refuses the row: Conversation roles must alternate"
    )
    assert not isinstance(error.value, TemplateError)


# --- masks: prompts and completions ---------------------------------------------------------------------------------

PROMPT = st.text(max_size=30) | st.sampled_from(
    ["", " ", "Answer: ", "Question?\n\n", "def f(x):\n    ", "no space at the end", "tab\t", "\n", "Größe 🦙", "a\r\n"]
)
COMPLETION = st.text(min_size=1, max_size=30).filter(str.strip) | st.sampled_from(
    ["42", " 42", "\n\n42", "\n\n\n42 ", "    return x\n", "🦙", "a", "the sky is blue", "\t.", " \n x", "'s", "\r\nb"]
)


@settings(max_examples=500, deadline=None)
@given(
    kind=st.sampled_from(["smollm2", "llama3", "chatml", "plain", "mistral"]),
    template=st.sampled_from(["auto", "none"]),
    prompt=PROMPT,
    completion=COMPLETION,
    system=st.just("") | CONTENT,
)
def test_the_model_is_asked_with_what_it_was_trained_on(
    kind: str, template: str, prompt: str, completion: str, system: str
) -> None:
    """The prompt for generation is exactly the unlearned start of the row that was trained on."""
    encoder = ENCODERS[kind] if template == "auto" else PLAIN_ENCODERS[kind]
    asked = Example(prompt=prompt, completion=completion, system=system)
    row = only(encoder.encode(asked))
    assert encoder.prompt_ids(asked) == head(row)
    known = KINDS[kind] if encoder.templated else Kind(None, (), encoder.tokenizer.eos_token)
    assert learned(encoder, row) == [known.turn(completion)]
    if encoder.templated or prompt or system:
        assert decode(encoder.tokenizer, head(row)) == encoder.prompt_text(asked)


PLAIN_ENCODERS = {
    name: TextEncoder(encoder.tokenizer, max_length=100_000, chat_template="none") for name, encoder in ENCODERS.items()
}


@settings(max_examples=100, deadline=None)
@given(kind=st.sampled_from(["smollm2", "llama3", "chatml"]), turns=st.lists(CONTENT, min_size=1, max_size=5))
def test_the_last_turn_of_a_chat_is_asked_for_as_it_was_trained(kind: str, turns: list[str]) -> None:
    messages = chat(*turns, *["the answer"] * (len(turns) % 2))[: len(turns) + len(turns) % 2]
    encoder = ENCODERS[kind]
    asked = example(messages)
    row = only(encoder.encode(asked))
    text = decode(encoder.tokenizer, row["input_ids"])
    prompt = decode(encoder.tokenizer, encoder.prompt_ids(asked))
    assert text.startswith(prompt)
    assert text[len(prompt) :].strip() == KINDS[kind].turn(messages[-1]["content"]).strip()


@pytest.mark.parametrize("name", [name for name in CHATS if name != "only-assistant"])
@pytest.mark.parametrize("kind", ["plain", "chatml"])
def test_every_chat_can_be_asked(kind: str, name: str) -> None:
    encoder, messages = ENCODERS[kind], CHATS[name]
    asked = example(messages)
    row = only(encoder.encode(asked))
    prompt = decode(encoder.tokenizer, encoder.prompt_ids(asked))
    assert decode(encoder.tokenizer, row["input_ids"]).startswith(prompt)
    assert learned(encoder, row)[-1] == KINDS[kind].turn(references(asked)[0])


def test_a_chat_that_asks_nothing_is_learned_but_cannot_be_asked() -> None:
    asked = example(CHATS["only-assistant"])
    assert learned(ENCODERS["plain"], only(ENCODERS["plain"].encode(asked))) == ["s<|endoftext|>"]
    with pytest.raises(DataError, match="the chat template refuses the row"):
        ENCODERS["plain"].prompt_ids(asked)


def test_prompts_are_joined_to_answers_with_a_line_end_where_they_end_without_a_space() -> None:
    encoder = ENCODERS["plain"]
    for prompt, seen in {"Q": "Q\n", "Q:\n": "Q:\n", "A: ": "A: ", "\t": "\t", "": ""}.items():
        assert encoder.prompt_text(Example(prompt=prompt)) == seen
    assert encoder.prompt_text(Example(prompt="Q", system="S")) == "S\n\nQ\n"


def test_no_token_holds_the_end_of_the_prompt_and_the_start_of_the_answer() -> None:
    """As one text, "and the" ends with one token " the", which the model could never write after "and "."""
    encoder = ENCODERS["plain"]
    whole = encoder.tokenizer("and the")["input_ids"]
    assert decode(encoder.tokenizer, whole[-1:]) == " the"
    row = only(encoder.encode(Example(prompt="and ", completion="the")))
    assert learned(encoder, row) == ["the<|endoftext|>"]
    assert decode(encoder.tokenizer, row["input_ids"]) == "and the<|endoftext|>"
    assert head(row) == encoder.tokenizer("and ")["input_ids"]


def test_the_answer_to_nothing_follows_an_end_of_sequence() -> None:
    encoder = ENCODERS["plain"]
    row = only(encoder.encode(Example(prompt="", completion="blue")))
    assert decode(encoder.tokenizer, row["input_ids"]) == "<|endoftext|>blue<|endoftext|>"
    assert learned(encoder, row) == ["blue<|endoftext|>"]
    assert encoder.prompt_ids(Example(prompt="")) == [encoder.tokenizer.eos_token_id]


def test_other_formats_are_prompts_and_answers_too() -> None:
    encoder = ENCODERS["plain"]
    rows = [
        {"prompt": "sky ?", "choices": ["red", "blue"], "answer": "B"},
        {"prompt": "sky ?", "references": ["blue", "azure"]},
        {"instruction": "sky ?", "input": "", "output": "blue"},
    ]
    for values in rows:
        row = only(encoder.encode(load_dataset([values])[0]))
        assert decode(encoder.tokenizer, row["input_ids"]) == "sky ?\nblue<|endoftext|>"
        assert learned(encoder, row) == ["blue<|endoftext|>"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_row_can_be_learned(kind: str) -> None:
    encoder = TextEncoder(ENCODERS[kind].tokenizer, loss_on="all")
    for asked in (example(CHATS["several"]), Example(prompt="a", completion="b")):
        row = only(encoder.encode(asked))
        assert row["labels"] == [IGNORE, *row["input_ids"][1:]]
        assert row["input_ids"] == only(ENCODERS[kind].encode(asked))["input_ids"]


# --- the beginning of a sequence ------------------------------------------------------------------------------------


def with_ends(single: str, special: tuple[str, ...] = ("</s>", "<s>")) -> Any:
    """The tiny tokenizer with a post-processor, as encoder-decoders and Llama have them."""
    from tokenizers import processors

    tokenizer = bpe_tokenizer(special, **({"bos_token": "<s>"} if "<s>" in special else {}))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(token, i) for i, token in enumerate(special)]
    )
    return tokenizer


def test_a_sequence_begins_once() -> None:
    tokenizer = with_ends("<s> $A")
    bos = tokenizer.bos_token_id
    assert tokenizer("a")["input_ids"][0] == bos
    plain = TextEncoder(tokenizer)
    begun = [
        only(plain.encode(Example(prompt="a", completion="b")))["input_ids"],
        only(plain.encode(Example(prompt="<s>a", completion="b")))["input_ids"],
        only(plain.encode(Example(prompt="", completion="b")))["input_ids"],
        only(plain.encode(example(CHATS["several"])))["input_ids"],
        only(plain.encode(Example(text="a b")))["input_ids"],
        only(plain.encode(Example(text="<s>a b")))["input_ids"],
        plain.prompt_ids(Example(prompt="a")),
        plain.prompt_ids(Example(prompt="")),
    ]
    tokenizer = with_ends("<s> $A", ("</s>", "<s>", *IM))
    tokenizer.chat_template = KINDS["mistral"].jinja
    templated = TextEncoder(tokenizer)
    begun += [
        only(templated.encode(example(CHATS["several"])))["input_ids"],
        only(templated.encode(Example(prompt="a", completion="b")))["input_ids"],
        templated.prompt_ids(Example(prompt="a")),
        only(templated.encode(Example(text="a b")))["input_ids"],
    ]
    for ids in begun:
        assert ids[0] == bos
        assert ids.count(bos) == 1
    assert begun[0] == begun[1]
    # and a template that writes none has none, as in transformers' own apply_chat_template
    tokenizer.chat_template = CHATML
    ids = only(TextEncoder(tokenizer).encode(example(CHATS["one"])))["input_ids"]
    assert bos not in ids
    assert ids == tokenizer.apply_chat_template(CHATS["one"], tokenize=True, return_dict=False)


# Not llama3: GPT-2's rule for white space, which Llama 3 does not have, makes one token of "\n\n" at the end of a
# generation prompt but two before an answer, and it is the prompt that the model will see.
@pytest.mark.parametrize("kind", ["smollm2", "chatml", "mistral"])
@pytest.mark.parametrize("name", ["one", "several", "unicode"])
def test_tokens_are_those_of_transformers_chat_template(kind: str, name: str) -> None:
    encoder, messages = ENCODERS[kind], CHATS[name]
    ids = only(encoder.encode(example(messages)))["input_ids"]
    assert ids == encoder.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)


# --- plain text -------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(text=st.text(min_size=1, max_size=80).filter(str.strip), max_length=st.integers(2, 20), bos=st.booleans())
def test_text_loses_no_token_and_learns_each_once(text: str, max_length: int, bos: bool) -> None:
    assume(not text.startswith("<s>"))  # such text begins already
    tokenizer = BEGUN if bos else ENCODERS["plain"].tokenizer
    rows, cut = TextEncoder(tokenizer, max_length=max_length).encode(Example(text=text))
    whole = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert not cut
    assert all(2 <= len(row["input_ids"]) <= max_length for row in rows)
    assert all(row["labels"] == [IGNORE, *row["input_ids"][1:]] for row in rows)
    assert [rows[0]["input_ids"][0], *(t for row in rows for t in row["labels"][1:])] == whole
    assert [row["input_ids"][0] for row in rows[1:]] == [row["input_ids"][-1] for row in rows[:-1]]


BEGUN = with_ends("<s> $A")


def test_text_is_not_put_into_the_chat_template() -> None:
    encoder = ENCODERS["llama3"]
    row = only(encoder.encode(Example(text="once upon")))
    assert decode(encoder.tokenizer, row["input_ids"]) == "once upon<|end_of_text|>"


# --- encoder-decoders ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("single", "special", "start"),
    [("$A </s>", ("</s>",), ""), ("<s> $A </s>", ("</s>", "<s>"), "<s>"), ("$A", ("</s>",), "")],
    ids=["t5", "bart", "bare"],
)
def test_seq2seq_rows_end_once(single: str, special: tuple[str, ...], start: str) -> None:
    tokenizer = with_ends(single, special)
    encoder = TextEncoder(tokenizer, "seq2seq", max_length=64)
    end = "</s>" if single.endswith("</s>") else ""
    asked = Example(prompt="translate : one two", completion="eins zwei", system="")
    row = only(encoder.encode(asked))
    assert decode(tokenizer, row["input_ids"]) == f"{start}translate : one two{end}"
    assert decode(tokenizer, row["labels"]) == f"{start}eins zwei</s>"
    assert encoder.prompt_ids(asked) == row["input_ids"]
    row = only(encoder.encode(Example(prompt="", completion="x")))
    assert row["input_ids"] == encoder.prompt_ids(Example(prompt=""))
    assert row["input_ids"]


def test_seq2seq_takes_chats_and_references_but_no_plain_text() -> None:
    tokenizer = with_ends("$A </s>", ("</s>",))
    encoder = TextEncoder(tokenizer, "seq2seq")
    row = only(encoder.encode(example(chat("one", "two", "three", "four"))))
    assert decode(tokenizer, row["labels"]) == "four</s>"
    assert decode(tokenizer, row["input_ids"]).endswith("### User:\nthree\n\n### Assistant:\n</s>")
    row = only(encoder.encode(example(chat("one", "two"))))
    assert (decode(tokenizer, row["input_ids"]), decode(tokenizer, row["labels"])) == ("one</s>", "two</s>")
    row = only(encoder.encode(Example(prompt="a", references=("b", "c"))))
    assert decode(tokenizer, row["labels"]) == "b</s>"
    with pytest.raises(DataError, match="x:1: an encoder-decoder needs rows with a prompt and a completion"):
        encode_dataset([Example(text="a", origin="x:1")], encoder)


def test_seq2seq_sides_are_cut_apart() -> None:
    tokenizer = with_ends("<s> $A </s>")
    encoder = TextEncoder(tokenizer, "seq2seq", max_length=10)
    long = "zero one two three four five six seven eight nine ten " * 3
    rows, cut = encoder.encode(Example(prompt=long, completion="x"))
    whole = tokenizer(long)["input_ids"]
    assert cut
    assert rows[0]["input_ids"] == whole[:5] + whole[-5:]
    rows, cut = encoder.encode(Example(prompt="x", completion=long))
    assert cut
    assert rows[0]["labels"] == whole[:10]


# --- tokenizers without offsets, and real ones ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["one", "system", "several", "unicode", "whitespace", "repeated", "quotes-user"])
@pytest.mark.parametrize("jinja", [None, SMOLLM2, NO_END], ids=["plain", "smollm2", "no-end"])
def test_slow_tokenizers(jinja: str | None, name: str) -> None:
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = jinja
    assert not tokenizer.is_fast
    encoder = TextEncoder(tokenizer, max_length=10_000)
    messages = CHATS[name] if jinja or name != "one" else CHATS["system"]
    row = only(encoder.encode(example(messages)))
    said = answers(messages)
    if jinja == SMOLLM2:  # its <|im_end|> is plain text to this tokenizer
        said = [f"{text}<|im_end|>" for text in said]
        said[-1] += "</s>"
    elif jinja == NO_END:
        said = [f" {text.strip()}" for text in said]
        said[-1] += "</s>"
    else:  # and its </s> swallows white space on its left
        said = [f"{text.rstrip()}</s>" for text in said]
    assert learned(encoder, row) == said


def test_a_slow_tokenizer_with_a_beginning() -> None:
    from transformers import CanineTokenizer

    tokenizer = CanineTokenizer()  # a token is a character; [CLS] begins and [SEP] ends
    encoder = TextEncoder(tokenizer)
    asked = Example(prompt="2 + 2 =", completion="4 🦙")
    row = only(encoder.encode(asked))
    assert row["input_ids"] == [tokenizer.bos_token_id, *map(ord, "2 + 2 =\n4 🦙"), tokenizer.eos_token_id]
    assert runs(row) == [[*map(ord, "4 🦙"), tokenizer.eos_token_id]]
    assert encoder.prompt_ids(asked) == head(row)


@pytest.fixture(scope="module")
def gpt2(shared: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared / "models" / "gpt2_tokenizer")


def test_the_real_gpt2_tokenizer(gpt2: Any) -> None:
    encoder = TextEncoder(gpt2, max_length=10_000)
    for name, messages in CHATS.items():
        if name != "one":
            row = only(encoder.encode(example(messages)))
            assert learned(encoder, row) == [KINDS["plain"].turn(text) for text in answers(messages)]
    # known ids of GPT-2: "Hello" 15496, " world" 995, "\n" 198, "\n\n" 628, " " 220, "42" 3682
    rows = {
        ("Hello world", "42"): ([15496, 995, 198], [3682, 50256]),
        ("Hello world\n\n", "42"): ([15496, 995, 628], [3682, 50256]),
        ("Hello ", "42"): ([15496, 220], [3682, 50256]),
        ("Hello", " world"): ([15496, 198], [995, 50256]),
        ("", "42"): ([50256], [3682, 50256]),
    }
    for (prompt, completion), (before, after) in rows.items():
        asked = Example(prompt=prompt, completion=completion)
        row = only(encoder.encode(asked))
        assert row["input_ids"] == before + after
        assert row["labels"] == [IGNORE] * len(before) + after
        assert encoder.prompt_ids(asked) == before


def test_real_rows_with_the_real_gpt2_tokenizer(gpt2: Any, shared: Path) -> None:
    encoder = TextEncoder(gpt2, max_length=4096)
    for file in ("d2t_e2e_test.jsonl", "sql_geoquery_dev.jsonl", "math_gsm8k_test.jsonl", "mc_boolq_test.jsonl"):
        for asked in load_dataset(shared / "data" / file).take(100):
            row = only(encoder.encode(asked))
            assert learned(encoder, row) == [f"{references(asked)[0]}<|endoftext|>"]
            assert encoder.prompt_ids(asked) == head(row)


def test_a_real_tokenizer_that_begins_texts_with_a_space(shared: Path) -> None:
    """stories260K: a Llama tokenizer, which writes a space before what it takes for the start of a text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260K")
    assert tokenizer.convert_ids_to_tokens(tokenizer("Once")["input_ids"])[:2] == ["<s>", "▁Once"]
    encoder = TextEncoder(tokenizer)
    for prompt, completion in [
        ("Once upon a time", "there was a little girl"),
        ("Lily said:\n", '"I like to play!"'),
        ("One day", " a dog ran\n"),
        ("The sun is ", "big"),
        ("", "Once upon a time"),
        ("Größe 🦙", "🦙 é"),
    ]:
        asked = Example(prompt=prompt, completion=completion)
        row = only(encoder.encode(asked))
        assert encoder.prompt_ids(asked) == head(row)
        assert row["input_ids"].count(tokenizer.bos_token_id) == 1
        text = encoder.prompt_text(asked) + completion
        assert decode(tokenizer, row["input_ids"]) == f"<s> {text}</s>"
        assert tokenizer.decode(runs(row)[0], skip_special_tokens=True).strip() == completion.strip()
        if prompt.endswith(("time", ":\n", "day")):  # no token crosses here, so all is as one text
            assert row["input_ids"] == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    tokenizer.chat_template = KINDS["mistral"].jinja
    encoder = TextEncoder(tokenizer)
    messages = CHATS["several"]
    row = only(encoder.encode(example(messages)))
    assert row["input_ids"] == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert [text.strip() for text in learned(encoder, row)] == ["two</s>", "four</s>", "six</s>"]


@pytest.mark.demo
def test_the_demo_model() -> None:
    from transformers import AutoTokenizer

    from trivet.demo import demo_path

    tokenizer = AutoTokenizer.from_pretrained(demo_path("demo"))
    encoder = TextEncoder(tokenizer, max_length=10_000)
    assert tokenizer.chat_template == SMOLLM2
    assert encoder.stop_ids() == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    for messages in CHATS.values():
        row = only(encoder.encode(example(messages)))
        assert learned(encoder, row) == [f"{text}<|im_end|>" for text in answers(messages)]
        assert decode(tokenizer, row["input_ids"]) == tokenizer.apply_chat_template(messages, tokenize=False)
    ids = only(encoder.encode(example(CHATS["several"])))["input_ids"]
    assert ids == tokenizer.apply_chat_template(CHATS["several"], tokenize=True, return_dict=False)

    @settings(max_examples=100, deadline=None)
    @given(prompt=PROMPT, completion=COMPLETION, system=st.just("") | CONTENT)
    def asked_as_trained(prompt: str, completion: str, system: str) -> None:
        assume(decode(tokenizer, tokenizer(completion)["input_ids"]) == completion)  # it lacks some control characters
        asked = Example(prompt=prompt, completion=completion, system=system)
        for text in (encoder, bare):
            row = only(text.encode(asked))
            assert text.prompt_ids(asked) == head(row)
            assert learned(text, row) == [f"{completion}<|im_end|>"]

    bare = TextEncoder(tokenizer, chat_template="none")
    asked_as_trained()


# --- cutting ----------------------------------------------------------------------------------------------------------


@settings(max_examples=500, deadline=None)
@given(learned=st.lists(st.booleans(), min_size=1, max_size=40), max_length=st.integers(1, 45))
def test_truncate(learned: list[bool], max_length: int) -> None:
    ids = list(range(len(learned)))
    kept, marks = truncate(ids, list(learned), max_length)
    if len(ids) <= max_length:
        assert (kept, marks) == (ids, learned)
        return
    assert len(kept) == len(marks) == max_length
    assert kept == sorted(set(kept))  # a subsequence: each token once, in order
    assert marks == [learned[i] for i in kept]
    if not any(learned):
        assert kept == ids[:max_length]
        return
    first = learned.index(True)
    assert first in kept  # the answer keeps its beginning, without a gap
    answer = kept[kept.index(first) :]
    assert answer == list(range(first, first + len(answer)))
    prompt = kept[: kept.index(first)]
    gaps = sum(b - a > 1 for a, b in itertools.pairwise([-1, *prompt, first]))
    assert gaps <= 1  # the prompt loses its middle only
    if len(prompt) >= 2:
        assert prompt[0] == 0
        assert prompt[-1] == first - 1
        if gaps:
            half = next(i for i, (a, b) in enumerate(itertools.pairwise([*prompt, first])) if b - a > 1) + 1
            assert half in (len(prompt) - len(prompt) // 2, len(prompt) // 2)
    # the prompt is not cut to less than half, nor the answer while the prompt has more than half
    assert len(prompt) >= min(first, max_length // 2)
    if len(prompt) > max_length // 2:
        assert first + len(answer) == len(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_prompt_keeps_its_head_its_end_and_the_whole_answer(kind: str) -> None:
    full, short = ENCODERS[kind], TextEncoder(ENCODERS[kind].tokenizer, max_length=60)
    asked = Example(prompt="start of it " + "the dog ran " * 60 + "what is it ?", completion="blue house")
    row = only(full.encode(asked))
    rows, cut = short.encode(asked)
    [small] = rows
    assert cut
    assert len(small["input_ids"]) == 60
    assert learned(short, small) == learned(full, row)
    keep = len(head(small))
    assert head(small) == head(row)[: (keep + 1) // 2] + head(row)[len(head(row)) - keep // 2 :]
    everything = TextEncoder(full.tokenizer, max_length=60, loss_on="all")
    assert only_cut(everything.encode(asked))["input_ids"] == small["input_ids"]


def only_cut(encoded: tuple[list[Encoded], bool]) -> Encoded:
    rows, cut = encoded
    assert cut
    [row] = rows
    return row


def test_a_long_answer_loses_its_end() -> None:
    encoder = TextEncoder(ENCODERS["plain"].tokenizer, max_length=16)
    row = only_cut(encoder.encode(Example(prompt="what is it ?", completion="the cat sat on the mat " * 20)))
    assert len(row["input_ids"]) == 16
    [answer] = learned(encoder, row)
    assert ("the cat sat on the mat " * 20).startswith(answer)


def test_a_row_that_just_fits_is_not_cut() -> None:
    tokenizer, asked = ENCODERS["plain"].tokenizer, Example(prompt="what is it ?", completion="the cat sat")
    whole = only(ENCODERS["plain"].encode(asked))
    length = len(whole["input_ids"])
    assert TextEncoder(tokenizer, max_length=length).encode(asked) == ([whole], False)
    assert len(only_cut(TextEncoder(tokenizer, max_length=length - 1).encode(asked))["input_ids"]) == length - 1


def test_room_for_the_answer_is_left_in_prompts() -> None:
    encoder = TextEncoder(ENCODERS["plain"].tokenizer, max_length=40)
    asked = Example(prompt="start " + "the dog ran " * 60 + "what is it ?")
    whole = ENCODERS["plain"].prompt_ids(asked)
    ids = encoder.prompt_ids(asked, room=10)
    assert len(ids) == 30
    assert (ids[:15], ids[15:]) == (whole[:15], whole[-15:])
    assert len(encoder.prompt_ids(asked, room=1000)) == 20  # never less than half for the question


# --- summaries ------------------------------------------------------------------------------------------------------


def long_and_short() -> Dataset:
    rows = [{"prompt": "sky ?", "completion": "blue"} for _ in range(6)]
    for i in (1, 3, 4, 5):
        rows[i]["prompt"] = "the dog ran to the red house " * 10
    return load_dataset(rows)


def test_the_summary_counts_and_names() -> None:
    data, encoder = long_and_short(), TextEncoder(ENCODERS["plain"].tokenizer, max_length=24)
    rows, summary = encode_dataset(data, encoder)
    assert rows == [row for e in data for row in encoder.encode(e)[0]]
    assert (summary.rows, summary.longest) == (6, 24)
    assert summary.tokens == sum(len(row["input_ids"]) for row in rows)
    assert summary.supervised == 6 * len(runs(rows[0])[0])
    assert summary.shortened == ["row 2", "row 4", "row 5", "row 6"]
    assert summary.dropped == []
    share = f"{summary.supervised / summary.tokens:.0%}"
    assert summary.lines() == [
        f"6 rows, {summary.tokens:,} tokens, {share} of them learned, longest 24",
        "4 rows longer than max_length and cut: row 2, row 4, row 5, …",
    ]


def test_rows_without_a_token_to_learn_are_dropped_and_named() -> None:
    """The tokenizer makes nothing of some texts."""
    from tokenizers import normalizers

    tokenizer = bpe_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("x", "")
    rows, summary = encode_dataset(
        load_dataset([{"text": "xx"}, {"text": "ab"}, {"text": "x"}]), TextEncoder(tokenizer)
    )
    assert len(rows) == summary.rows == 1
    assert summary.dropped == ["row 1", "row 3"]
    assert summary.lines()[1] == "2 rows without a token to learn, left out: row 1, row 3"
    with pytest.raises(DataError, match="no row has a token to learn from; dropped: row 1"):
        encode_dataset(load_dataset([{"text": "xx"}]), TextEncoder(tokenizer))


def test_the_summary_of_encoder_decoders_counts_both_sides() -> None:
    encoder = TextEncoder(with_ends("$A </s>", ("</s>",)), "seq2seq")
    rows, summary = encode_dataset([Example(prompt="one two", completion="three")], encoder)
    assert summary.supervised == len(rows[0]["labels"])
    assert summary.tokens == len(rows[0]["input_ids"]) + len(rows[0]["labels"])


def test_an_empty_summary_prints() -> None:
    assert Summary().lines() == ["0 rows, 0 tokens, longest 0"]


# --- stopping, and what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "stops"),
    [
        ("smollm2", ["<|im_end|>"]),
        ("llama3", ["<|end_of_text|>", "<|eot_id|>"]),
        ("chatml", ["<|endoftext|>", "<|im_end|>"]),
        ("plain", ["<|endoftext|>"]),
        ("mistral", ["</s>"]),
    ],
)
def test_generation_stops_at_the_end_of_turn_and_of_sequence(kind: str, stops: list[str]) -> None:
    tokenizer = ENCODERS[kind].tokenizer
    assert ENCODERS[kind].stop_ids() == tokenizer.convert_tokens_to_ids(stops)
    bare = TextEncoder(tokenizer, chat_template="none")
    assert bare.stop_ids() == [tokenizer.eos_token_id]


def test_ones_own_template_file(tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text("{% for m in messages %}«{{ m['role'] }}» {{ m['content'] }}{{ eos_token }}{% endfor %}"
                    "{% if add_generation_prompt %}«assistant» {% endif %}", encoding="utf-8")  # fmt: skip
    encoder = TextEncoder(bpe_tokenizer(), chat_template=str(path))
    asked = Example(prompt="q", completion="a")
    row = only(encoder.encode(asked))
    assert decode(encoder.tokenizer, row["input_ids"]) == "«user» q<|endoftext|>«assistant» a<|endoftext|>"
    assert learned(encoder, row) == ["a<|endoftext|>"]
    assert encoder.prompt_ids(asked) == head(row)
    with pytest.raises(ConfigError, match=r"data.chat_template .*missing.jinja: auto, none, or a readable Jinja file"):
        TextEncoder(bpe_tokenizer(), chat_template=str(tmp_path / "missing.jinja"))


def test_a_tokenizer_without_an_end_is_refused() -> None:
    with pytest.raises(ConfigError, match="the tokenizer has no end-of-sequence token"):
        TextEncoder(word_tokenizer())


# --- classes and numbers ------------------------------------------------------------------------------------------


def test_labels_become_indices_in_the_given_order() -> None:
    tokenizer = word_tokenizer()
    encoder = LabelEncoder(tokenizer, ["neg", "neutral", "pos"])
    for label, index in (("pos", 2), ("neg", 0)):
        row = only(encoder.encode(Example(text="The sky is blue", label=label)))
        assert row["labels"] == index
        assert row["input_ids"] == tokenizer("the sky is blue")["input_ids"]
        assert decode(tokenizer, row["input_ids"]).startswith("[CLS] the sky")


def test_a_label_that_training_never_saw_is_named() -> None:
    encoder = LabelEncoder(word_tokenizer(), [f"class {i}" for i in range(10)])
    with pytest.raises(DataError) as error:
        encode_dataset([Example(origin="test.csv:7", text="a", label="klass 3")], encoder)
    assert str(error.value) == (
        "test.csv:7: label 'klass 3' does not occur in the training data "
        "(class 0, class 1, class 2, class 3, class 4, class 5, class 6, class 7, …)"
    )
    with pytest.raises(DataError, match=r"label '3' does not occur in the training data \(0, 1\)$"):
        LabelEncoder(word_tokenizer(), ["0", "1"]).encode(Example(text="a", label="3"))


def test_numbers_stay_numbers() -> None:
    encoder = LabelEncoder(word_tokenizer(), None)
    rows, summary = encode_dataset([Example(text="a cat", label=2.5), Example(text="a dog", label=-1.0)], encoder)
    assert [row["labels"] for row in rows] == [2.5, -1.0]
    assert summary.supervised == 0
    assert summary.lines() == [f"2 rows, {summary.tokens} tokens, longest {summary.longest}"]


def typed_tokenizer() -> Any:
    """One that tells the texts of a pair apart, as BERT's does."""
    tokenizer = word_tokenizer()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return tokenizer


def test_pairs_are_told_apart() -> None:
    tokenizer = typed_tokenizer()
    encoder = LabelEncoder(tokenizer, ["no", "yes"])
    row = only(encoder.encode(Example(text="the cat", text_pair="the dog ran", label="yes")))
    assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == [
        "[CLS]",
        "the",
        "cat",
        "[SEP]",
        "the",
        "dog",
        "ran",
        "[SEP]",
    ]
    assert row["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1, 1]
    alone = encoder.inputs("the cat")
    assert alone == {"input_ids": row["input_ids"][:4], "token_type_ids": [0, 0, 0, 0]}


def test_tokenizers_without_token_types_give_none() -> None:
    row = only(LabelEncoder(word_tokenizer(), ["a"]).encode(Example(text="the cat", label="a")))
    assert set(row) == {"input_ids", "labels"}


def test_the_longer_of_a_pair_is_cut() -> None:
    encoder = LabelEncoder(typed_tokenizer(), ["a"], max_length=10)
    short, long = "the cat", "the dog ran to the red house and sat"
    rows, summary = encode_dataset(
        [
            Example(origin="r1", text=short, text_pair=long, label="a"),
            Example(origin="r2", text=long, text_pair=short, label="a"),
            Example(origin="r3", text=short, text_pair="the dog ran to the", label="a"),  # just fits
            Example(origin="r4", text=long, label="a"),
        ],
        encoder,
    )
    tokens = [encoder.tokenizer.convert_ids_to_tokens(row["input_ids"]) for row in rows]
    assert tokens[0] == ["[CLS]", "the", "cat", "[SEP]", "the", "dog", "ran", "to", "the", "[SEP]"]
    assert tokens[1] == ["[CLS]", "the", "dog", "ran", "to", "the", "[SEP]", "the", "cat", "[SEP]"]
    assert tokens[2] == tokens[0]
    assert [len(t) for t in tokens] == [10] * 4
    assert summary.shortened == ["r1", "r2", "r4"]
    assert all(len(row["token_type_ids"]) == 10 for row in rows)


def test_real_pairs_with_the_real_bert_tokenizer(shared: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "bert_uncased_tokenizer")
    data = load_dataset(shared / "data" / "pair_rte_dev.jsonl")
    rows, summary = encode_dataset(data, LabelEncoder(tokenizer, ["entailment", "not_entailment"]))
    assert (summary.rows, summary.shortened) == (277, [])
    assert [row["labels"] for row in rows] == [int(e.label == "not_entailment") for e in data]
    for row, pair in zip(rows[:20], data, strict=False):
        out = tokenizer(pair.text, pair.text_pair)
        assert (row["input_ids"], row["token_type_ids"]) == (out["input_ids"], out["token_type_ids"])
