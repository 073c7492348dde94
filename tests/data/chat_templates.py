"""Chat templates of the kinds that models come with, and chats that are hard to mark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from conftest import bpe_tokenizer

Chat = list[dict[str, Any]]


@dataclass(frozen=True)
class Kind:
    """A template, its special tokens (the first is the tokenizer's eos_token), and what a turn looks like in it."""

    jinja: str | None
    special: tuple[str, ...]
    end: str  # what closes an assistant turn
    lead: str = ""  # what stands between the generation prompt and the answer
    trims: bool = False  # whether the template strips contents
    bos: str | None = None
    alternates: bool = False  # refuses chats in which user and assistant do not take turns

    def tokenizer(self) -> Any:
        tokenizer = bpe_tokenizer(self.special, **({"bos_token": self.bos} if self.bos else {}))
        tokenizer.chat_template = self.jinja
        return tokenizer

    def turn(self, content: str) -> str:
        """What must be learned of an assistant turn."""
        return self.lead + (content.strip() if self.trims else content) + self.end

    def takes(self, chat: Sequence[dict[str, Any]]) -> bool:
        roles = [m["role"] for m in chat if m["role"] != "system"]
        return not self.alternates or roles == [("user", "assistant")[i % 2] for i in range(len(roles))]


#: HuggingFaceTB/SmolLM2-135M-Instruct, letter by letter
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{- bos_token }}{% for m in messages %}"
    "{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% set ns = namespace(turn=0, system='') %}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{% set ns.system = m['content'] | trim + '\n\n' %}{% else %}"
    "{% if (m['role'] == 'user') != (ns.turn % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% set ns.turn = ns.turn + 1 %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + ns.system + m['content'] | trim + ' [/INST]' }}{% set ns.system = '' %}"
    "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endif %}{% endfor %}"
)
#: Vicuna's shape without its </s>: nothing ends a turn
NO_END = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}ASSISTANT: {{ m['content'] | trim }}\n"
    "{% else %}{{ m['role'] | upper }}: {{ m['content'] | trim }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
#: QwQ's way: what was thought before the last question is left out
REASONING = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set content = m['content'] %}"
    "{% if m['role'] == 'assistant' and loop.index0 < ns.last %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
#: Qwen3's way: the last answer gets a thought, if only an empty one
EMPTY_THOUGHT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
#: DeepSeek-R1-like: the generation prompt starts a thought that no turn of the chat shows
THINK_FIRST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{{ '<｜Assistant｜>' + m['content'] + eos_token }}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
#: DeepSeek-R1's own: and takes thoughts out of every turn
THINK_NEVER = THINK_FIRST.replace(
    "'<｜Assistant｜>' + m['content']", "'<｜Assistant｜>' + m['content'].split('</think>')[-1]"
)
#: Hermes-like: writes tools, calls and their results
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\ntools: ' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% for call in m['tool_calls'] or [] %}"
    "{{ '<tool_call>' + call['function'] | tojson + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

IM = ("<|im_end|>", "<|im_start|>")
KINDS: dict[str, Kind] = {
    "smollm2": Kind(SMOLLM2, IM, "<|im_end|>"),
    "llama3": Kind(
        LLAMA3,
        ("<|end_of_text|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
        trims=True,
        bos="<|begin_of_text|>",
    ),
    "chatml": Kind(CHATML, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "plain": Kind(None, ("<|endoftext|>",), "<|endoftext|>"),
    "mistral": Kind(MISTRAL, ("</s>", "<s>"), "</s>", lead=" ", trims=True, bos="<s>", alternates=True),
    "think-first": Kind(THINK_FIRST, ("<eos>", "<bos>", "<｜User｜>", "<｜Assistant｜>"), "<eos>", bos="<bos>"),
}


def chat(*turns: str, system: str | None = None) -> Chat:
    """User and assistant in turns."""
    said = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return said if system is None else [{"role": "system", "content": system}, *said]


def answers(messages: Sequence[dict[str, Any]]) -> list[str]:
    return [m["content"] for m in messages if m["role"] == "assistant"]


CHATS: dict[str, Chat] = {
    "one": chat("what colour is the sky ?", "blue"),
    "system": chat("hi", "hello", system="You are brief."),
    "several": chat("one", "two", "three", "four", "five", "six", system="Count."),
    "unicode": chat("Größe? 你好 🦙", "très 🦙👩‍👩‍👧 你好", "é", "é\u00a0ﬁ \u2028 end 🏳️‍🌈"),
    "whitespace": chat("  a \n", " \n lead and trail \n\n", "\t", "\n\n\nthree newlines", "c", "tab\tend\t"),
    "roles": chat("assistant", "assistant", "user", "a", "a", "user", "system", "system"),
    "repeated": chat("a", "a", "a", "a", "a", "a"),
    "same-twice": chat("tell me", "the sky is blue", "tell me", "the sky is blue", "tell me", "the sky is blue"),
    "quotes-later": chat("why do you say grey ?", "I say: blue", "you said I say: blue", "grey", "I say: blue", "you"),
    "quotes-user": chat("the cat sat", "the cat sat on the mat", "sat on", "the cat sat"),
    "marks": chat(
        "### Assistant:\n", "assistant\n", "[INST] x", "ASSISTANT: y", "USER:", "### User:\nz", "<", "<think"
    ),
    "ends-inside": chat("a", "one </s> two <|im_end|> three <eos>", "b", "four"),
    "one-letter": chat("b", "<", "c", "i", "d", "|", "e", "\n.\n"),
    "unanswered": chat("one", "two", "three"),
    "assistant-first": [{"role": "assistant", "content": "a"}, *chat("b", "im")],
    "only-assistant": [{"role": "assistant", "content": "s"}],
    "assistant-twice": [*chat("a", "b"), {"role": "assistant", "content": "b"}, *chat("c", "d")],
    "user-twice": [{"role": "user", "content": "a"}, *chat("a", "b")],
}

#: (kind, chat) for every kind that takes the chat
PAIRS = [(kind, name) for kind in KINDS for name in CHATS if KINDS[kind].takes(CHATS[name])]
