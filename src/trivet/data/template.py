"""Chats as text, with the spans of text that the model should learn.

A chat is rendered by the model's own chat template where it has one. Which characters are the assistant's is found by
rendering prefixes of the chat, so that it works for any template, without `{% generation %}` marks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trivet.data.detect import Message
from trivet.errors import DataError

#: For chats with models that bring no template. Every assistant turn ends with the end-of-sequence token.
PLAIN_CHAT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}### Assistant:\n{{ m['content'] }}{{ eos_token }}\n\n"
    "{% else %}### {{ m['role'] | capitalize }}:\n{{ m['content'] }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)


def _common_prefix(a: str, b: str) -> str:
    if a == b:
        return a
    length = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:length]


class TemplateError(DataError):
    """A chat template refuses a chat (for example two user turns in a row); the caller names the row."""


@dataclass(frozen=True)
class Rendered:
    """Text with the character spans to learn, and whether an end-of-sequence token must still be appended."""

    text: str
    spans: tuple[tuple[int, int], ...]
    needs_eos: bool


class ChatTemplate:
    """How chats become text for one tokenizer. `own` is a Jinja template instead of the tokenizer's."""

    def __init__(self, tokenizer: Any, own: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.jinja = own or (None if tokenizer.chat_template else PLAIN_CHAT)  # None: the tokenizer's
        self.special = {str(t) for t in tokenizer.all_special_tokens} | {
            t.content for t in tokenizer.added_tokens_decoder.values() if t.special
        }

    def text(self, messages: Sequence[Message], *, tools: Sequence[Any] = (), generation: bool = False) -> str:
        """The chat as the model sees it; `generation` ends it where the assistant is about to speak."""
        from jinja2 import TemplateError as JinjaError

        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) or None,
                chat_template=self.jinja,
                tokenize=False,
                add_generation_prompt=generation,
            )
        except (JinjaError, TypeError, LookupError, ValueError) as error:
            raise TemplateError(f"the chat template refuses the row: {error}") from error

    def supervised(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> list[Rendered]:
        """The chat with every assistant turn marked, each up to and with the token that ends it.

        One `Rendered` a chat; but where the template rewrites earlier turns (some drop their reasoning), what was said
        then is not what the model would see now, so each assistant turn becomes a row of its own, in its own context.
        """
        whole = self._marked(messages, tools, range(len(messages)))
        if whole is not None:
            return [whole]
        rows = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                row = self._marked(messages[: index + 1], tools, [index])
                if row is None:
                    raise TemplateError(
                        f"the chat template changes the text of assistant turn {index + 1}; set data.chat_template"
                    )
                rows.append(row)
        return rows

    def _marked(self, messages: Sequence[Message], tools: Sequence[Any], turns: Any) -> Rendered | None:
        text, spans, ended = self.text(messages, tools=tools), [], True
        for index in turns:
            message = messages[index]
            if message["role"] != "assistant":
                continue
            content = str(message["content"]).strip()
            so_far = text if index == len(messages) - 1 else self.text(messages[: index + 1], tools=tools)
            upto = _common_prefix(text, so_far)
            start = self._start(messages[: index + 1], tools, upto)
            at = upto.find(content, start)
            if at < 0 or not ((content and not message.get("tool_calls")) or text.startswith(so_far.rstrip())):
                return None
            if message.get("tool_calls"):
                mute = {k: v for k, v in message.items() if k != "tool_calls"}
                if self.text([*messages[:index], mute], tools=tools) == so_far:
                    raise TemplateError(
                        f"the chat template leaves out the tool calls of turn {index + 1}; set data.chat_template"
                    )
            body = upto[at + len(content) :]
            ending = body.strip()
            ended = any(ending.endswith(token) for token in self.special)
            spans.append((start, len(upto.rstrip())))  # with the text that closes the turn, without the line's end
        return Rendered(text if ended or not spans else text[: spans[-1][1]], tuple(spans), not ended)

    def _start(self, messages: Sequence[Message], tools: Sequence[Any], upto: str) -> int:
        """Where the answer of the last turn starts in `upto`: right after the generation prompt.

        But a chat's first turn has no such prompt, and some prompts end with what the answer lacks ("<think>") or
        happens to start with. There the answer starts at the latest where two other answers would differ.
        """
        *before, turn = messages
        start = len(upto)
        if before and upto.startswith(prompt := self.text(before, tools=tools, generation=True)):
            start = len(prompt)
            if upto.startswith(str(turn["content"]).strip(), start):
                return start
        one, other = (self.text([*before, {**turn, "content": text}], tools=tools) for text in "01")
        return min(start, len(_common_prefix(one, other)))

    def end_of_turn(self) -> str | None:
        """The special token that ends an assistant turn, for generation to stop at; None where there is none."""
        try:
            rendered = self.supervised([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])[0]
        except TemplateError:
            return None
        if rendered.needs_eos or not rendered.spans:
            return None
        learned = rendered.text[slice(*rendered.spans[-1])]
        return max((t for t in self.special if learned.endswith(t)), key=len, default=None)
