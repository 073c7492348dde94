"""Examples as token ids and labels. Label -100 marks a token that is read but not learned (torch's ignore index)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from trivet.data.dataset import Dataset
from trivet.data.detect import Example
from trivet.data.template import ChatTemplate, Rendered, TemplateError
from trivet.errors import ConfigError, DataError

IGNORE = -100


class Encoded(TypedDict, total=False):
    """One row for the model: `input_ids`, and `labels` as ids (generative), a class index or a number."""

    input_ids: list[int]
    labels: Any
    token_type_ids: list[int]


@dataclass
class Summary:
    """What happened to a data set on its way to tokens, for the person who has to trust it."""

    rows: int = 0
    tokens: int = 0
    supervised: int = 0
    longest: int = 0
    origins: list[str] = field(default_factory=list)  # where each encoded row comes from
    shortened: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Printable: counts, the supervised share, and the first rows that were cut or dropped."""
        share = f", {self.supervised / self.tokens:.0%} of them learned" if self.tokens and self.supervised else ""
        out = [f"{self.rows:,} rows, {self.tokens:,} tokens{share}, longest {self.longest}"]
        for what, names in (
            ("longer than max_length and cut", self.shortened),
            ("without a token to learn, left out", self.dropped),
        ):
            if names:
                out.append(f"{len(names):,} rows {what}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}")
        return out


def truncate(ids: list[int], learned: list[bool], max_length: int) -> tuple[list[int], list[bool]]:
    """Cut a row to `max_length` tokens so that something remains to be learned.

    What comes before the first learned token loses its middle (so a template's head and the end of the question
    stay), down to half of `max_length`; after that the end of the row is cut.
    """
    if len(ids) <= max_length:
        return ids, learned
    first = learned.index(True) if any(learned) else 0
    room = max(max_length - (len(ids) - first), max_length // 2)  # tokens the part before may keep
    if first > room:
        head, tail = (room + 1) // 2, room // 2
        ids = ids[:head] + ids[first - tail :]
        learned = [False] * room + learned[first:]
    return ids[:max_length], learned[:max_length]


class TextEncoder:
    """Rows for causal language models (`causal-lm`) and encoder-decoders (`seq2seq`)."""

    def __init__(
        self,
        tokenizer: Any,
        task: str = "causal-lm",
        *,
        max_length: int = 1024,
        chat_template: str = "auto",
        loss_on: str = "responses",
    ) -> None:
        """`chat_template`: `auto` (the tokenizer's own, for rows with a prompt), `none`, or a path to a Jinja file."""
        if tokenizer.eos_token_id is None:
            raise ConfigError("the tokenizer has no end-of-sequence token to learn to stop with; set its eos_token")
        self.tokenizer, self.task, self.max_length, self.loss_on = tokenizer, task, max_length, loss_on
        try:
            own = None if chat_template in ("auto", "none") else Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = f"data.chat_template {chat_template}: auto, none, or a readable Jinja file: {error}"
            raise ConfigError(why) from error
        self.chat = ChatTemplate(tokenizer, own)
        self.templated = chat_template != "none" and task == "causal-lm" and bool(own or tokenizer.chat_template)
        letter = tokenizer("a")["input_ids"]
        self.bos = letter[:1] if letter[0] == tokenizer.bos_token_id else []
        # what stands before text that goes on, where a piece of text has other ids than the same text in the middle
        self.anchor = "" if self._ids("a\n") + self._ids("b") == self._ids("a\nb") else "\n"

    # -- rows to learn from ------------------------------------------------------------------------------------

    def encode(self, example: Example) -> tuple[list[Encoded], bool]:
        """Model inputs of one row (several for a long text and for templates that rewrite history), and if it was cut.

        Raises `TemplateError` where the chat template refuses the row.
        """
        if example.text is not None:
            return self._blocks(example.text), False
        if self.task == "seq2seq":
            return self._pair(example)
        rows, cut = [], False
        for rendered in self._rendered(example):
            ids, learned = self._tokens(rendered)
            cut |= len(ids) > self.max_length
            ids, learned = truncate(ids, learned, self.max_length)
            if self.loss_on == "all":
                learned = [False, *[True] * (len(ids) - 1)]  # nothing comes before the first token to predict it from
            if any(learned):
                labels = [token if on else IGNORE for token, on in zip(ids, learned, strict=True)]
                rows.append(Encoded(input_ids=ids, labels=labels))
        return rows, cut

    def _rendered(self, example: Example) -> list[Rendered]:
        if self._is_chat(example):
            return self.chat.supervised(example.messages, example.tools)
        target = references(example)[0]
        if self.templated:
            return self.chat.supervised([*self._asked(example), {"role": "assistant", "content": target}])
        head = self.prompt_text(example)
        return [Rendered(head + target, ((len(head), len(head) + len(target)),), needs_eos=True)]

    def _tokens(self, rendered: Rendered) -> tuple[list[int], list[bool]]:
        """Token ids, and which of them lie in a span to learn.

        Spans are tokenised apart from what is around them. So no token lies half inside one, and what stands before
        the first has the very ids that `prompt_ids` gives the model: "Answer: 42" as a whole would be one token
        " 42", which no model can write after the space of a tokenised "Answer: ".
        """
        ids = [] if self.templated else self._bos(rendered.text)
        learned = [False] * len(ids)
        edges = [0, *(edge for span in rendered.spans for edge in span), len(rendered.text)]
        for index, piece in enumerate(self._pieces(rendered.text, edges)):
            in_span = index % 2 == 1
            if in_span and not ids:  # the answer to nothing follows an end of sequence, as in `prompt_ids`
                ids, learned = [self.tokenizer.eos_token_id], [False]
            ids += piece
            learned += [in_span] * len(piece)
        if rendered.needs_eos:
            ids, learned = [*ids, self.tokenizer.eos_token_id], [*learned, True]
        return ids, learned

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def _pieces(self, text: str, edges: Sequence[int]) -> Iterator[list[int]]:
        """Ids of the pieces of a text, in one call of the tokenizer: calling it takes as long as a row's text.

        Many tokenizers put a space where a text begins, some after a special token, so a piece goes on after something.
        """
        pieces, tokens = [text[start:end] for start, end in itertools.pairwise(edges)], self.chat.special
        anchors = [next((t for t in tokens if text.endswith(t, 0, e)), self.anchor) if e else "" for e in edges[:-1]]
        texts = [*(a + p for a, p in zip(anchors, pieces, strict=True)), *anchors]
        found = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        for piece, ids, known in zip(pieces, found, found[len(pieces) :], strict=False):
            yield list(ids[len(known) :]) if ids[: len(known)] == known else self._ids(piece)

    def _bos(self, text: str) -> list[int]:
        return [] if self.bos and text.startswith(self.tokenizer.bos_token) else list(self.bos)

    def _blocks(self, text: str) -> list[Encoded]:
        """Plain text, all of it learned; what exceeds `max_length` goes on in further rows.

        Each row starts with the last token of the one before, so that every token but the first is predicted once.
        """
        if self.task == "seq2seq":
            raise TemplateError("an encoder-decoder needs rows with a prompt and a completion, not plain text")
        ids = [*self._bos(text), *self._ids(text), self.tokenizer.eos_token_id]
        blocks = [ids[i : i + self.max_length] for i in range(0, len(ids) - 1, self.max_length - 1)]
        return [Encoded(input_ids=block, labels=[IGNORE, *block[1:]]) for block in blocks]

    def _pair(self, example: Example) -> tuple[list[Encoded], bool]:
        source = list(self.tokenizer(self.prompt_text(example))["input_ids"]) or [self.tokenizer.eos_token_id]
        target = list(self.tokenizer(text_target=references(example)[0])["input_ids"])
        if not target or target[-1] != self.tokenizer.eos_token_id:
            target.append(self.tokenizer.eos_token_id)
        cut = max(len(source), len(target)) > self.max_length
        source, _ = truncate(source, [False] * (len(source) - 1) + [True], self.max_length)
        return [Encoded(input_ids=source, labels=target[: self.max_length])], cut

    # -- prompts to answer ---------------------------------------------------------------------------------------

    def prompt_text(self, example: Example) -> str:
        """What the model is given before it answers the row (its last assistant turn in a chat)."""
        if self.templated or self._is_chat(example):
            return self.chat.text(self._asked(example), tools=example.tools, generation=True)
        if example.messages:
            return self._joined(str(example.messages[0]["content"]))
        return self._joined(f"{example.system}\n\n{example.prompt}" if example.system else example.prompt)

    def _is_chat(self, example: Example) -> bool:
        """Whether the row needs a chat template even of a model without: more than a question and its answer."""
        roles = [m["role"] for m in example.messages]
        answered = roles == ["user", "assistant"] and not example.messages[1].get("tool_calls")
        return bool(roles) and (self.templated or not answered)

    def _joined(self, prompt: str) -> str:
        return prompt if self.task == "seq2seq" or not prompt or prompt[-1].isspace() else prompt + "\n"

    def prompt_ids(self, example: Example, room: int = 0) -> list[int]:
        """Token ids to generate from, leaving `room` tokens of `max_length` for the answer."""
        text, limit = self.prompt_text(example), max(self.max_length - room, self.max_length // 2)
        if self.task == "seq2seq":
            ids = list(self.tokenizer(text)["input_ids"])
        else:
            ids, _ = self._tokens(Rendered(text, (), needs_eos=False))
        return truncate(ids, [False] * (len(ids) - 1) + [True], limit)[0] if ids else [self.tokenizer.eos_token_id]

    def _asked(self, example: Example) -> list[Any]:
        if example.messages:
            last = max(i for i, m in enumerate(example.messages) if m["role"] == "assistant")
            return list(example.messages[:last])
        system = [{"role": "system", "content": example.system}] if example.system else []
        return [*system, {"role": "user", "content": example.prompt}]

    def stop_ids(self) -> list[int]:
        """Tokens that end an answer: end of sequence, and the template's end of turn."""
        turn = self.chat.end_of_turn() if self.templated else None
        extra = [self.tokenizer.convert_tokens_to_ids(turn)] if turn else []
        return list(dict.fromkeys([self.tokenizer.eos_token_id, *extra]))


def references(example: Example) -> tuple[str, ...]:
    """The gold answers of a generative row: its references, its completion, or a chat's last assistant turn."""
    if example.messages:
        return (next(str(m["content"]) for m in reversed(example.messages) if m["role"] == "assistant"),)
    return example.references or ((example.completion,) if example.completion is not None else ())


class LabelEncoder:
    """Rows for classification (`labels` are the class names, in index order) and regression (`labels` is None)."""

    def __init__(self, tokenizer: Any, labels: Sequence[str] | None, *, max_length: int = 512) -> None:
        self.tokenizer, self.labels, self.max_length = tokenizer, labels, max_length
        self.index = {name: i for i, name in enumerate(labels or ())}

    def encode(self, example: Example) -> tuple[list[Encoded], bool]:
        """One row, and if it was cut; raises `DataError` for a class that training never saw."""
        if self.labels is None:
            label: float | int = float(example.label)  # type: ignore[arg-type]
        elif example.label in self.index:
            label = self.index[str(example.label)]
        else:
            raise DataError(
                f"{example.origin}: label {example.label!r} does not occur in the training data "
                f"({', '.join(self.labels[:8])}{', …' if len(self.labels) > 8 else ''})"
            )
        row, cut = self._inputs(str(example.text), example.text_pair)
        row["labels"] = label
        return [row], cut

    def inputs(self, text: str, text_pair: str | None = None) -> Encoded:
        """A text, or a pair, as model inputs without a label; the longer of a pair is cut first."""
        return self._inputs(text, text_pair)[0]

    def _inputs(self, text: str, text_pair: str | None) -> tuple[Encoded, bool]:
        out = self.tokenizer(text, text_pair, verbose=False)  # it would warn of the length, which is cut here
        cut = len(out["input_ids"]) > self.max_length
        if cut:
            out = self.tokenizer(text, text_pair, truncation="longest_first", max_length=self.max_length)
        row = Encoded(input_ids=list(out["input_ids"]))
        if "token_type_ids" in out:
            row["token_type_ids"] = list(out["token_type_ids"])
        return row, cut


def encode_dataset(
    dataset: Dataset | Iterable[Example], encoder: TextEncoder | LabelEncoder
) -> tuple[list[Encoded], Summary]:
    """All rows encoded, and what was cut or left out; `DataError` if the template refuses a row or none is left."""
    rows: list[Encoded] = []
    summary = Summary()
    for example in dataset:
        try:
            encoded, cut = encoder.encode(example)
        except TemplateError as reason:
            raise DataError(f"{example.origin}: {reason}") from reason
        if not encoded:
            summary.dropped.append(example.origin)
        if cut:
            summary.shortened.append(example.origin)
        summary.longest = max(summary.longest, *(len(row["input_ids"]) for row in encoded), 0)
        rows += encoded
        summary.origins += [example.origin] * len(encoded)
    if not rows:
        raise DataError(f"no row has a token to learn from; dropped: {', '.join(summary.dropped[:3])}")
    summary.rows = len(rows)
    summary.tokens = sum(len(row["input_ids"]) for row in rows)
    if isinstance(rows[0]["labels"], list):
        if isinstance(encoder, TextEncoder) and encoder.task == "seq2seq":
            summary.tokens += sum(len(row["labels"]) for row in rows)
        summary.supervised = sum(label != IGNORE for row in rows for label in row["labels"])
    return rows, summary
