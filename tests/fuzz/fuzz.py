"""Bytes in; rows, a config, an adapter or a `TrivetError` out, and never anything else.

`python tests/fuzz/fuzz.py --minutes 10` tries for so long and ends with 1 where something else came out.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from trivet.adapter.load import read_config, read_notes
from trivet.config import FORMATS
from trivet.configio import dump, keys, load
from trivet.data import load_dataset
from trivet.data.read import SUFFIXES
from trivet.errors import TrivetError

#: What came out, by kind: a program that only ever refuses, or only ever accepts, tries nothing.
SEEN: collections.Counter[str] = collections.Counter()

# -- material ----------------------------------------------------------------------------------------------------------

ROWS: list[dict[str, Any]] = [
    {"prompt": "a", "completion": "b"},
    {"prompt": "a", "completion": "#### 4", "system": "s", "answer": 4},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": []},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
    {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
    {"instruction": "a", "input": "b", "output": "c"},
    {"text": "a b c"},
    {"text": "a", "label": "x", "text_pair": "b"},
    {"text": "a", "label": 0.5},
    {"prompt": "a", "choices": ["x", "y"], "answer": "B"},
    {"prompt": "a", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answer": "1"},
    {"prompt": "a", "references": ["x", "y"]},
]
TABLE = 'text,label\na,x\n"b, c",y\n'
CONFIG = dump(load(None, values={"train": "rows.jsonl", "name": "gpt2", "method": {"rank": {"name": "squeeze"}}}))
ADAPTER = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "rank_pattern": {"h.0.q": 2},
    "base_model_name_or_path": "gpt2", "task_type": "CAUSAL_LM", "modules_to_save": None,
}  # fmt: skip
NOTES = {
    "base_model": "gpt2", "revision": None, "dtype": "float32", "task": "causal-lm", "labels": None,
    "data": {"max_length": 8, "chat_template": "auto", "loss_on": "all"},
}  # fmt: skip

#: What breaks readers: ends of strings, nesting, numbers out of range, halves of characters, marks of other encodings.
PIECES = [
    *(bytes([c]) for c in b"\0\r\n\"'\\,\t{}[]:"),
    b"&a ", b"*a", b"<<: ", b"? ", b"- ", b"| ", b"> ", b"!!int ", b"!!binary ", b"!!timestamp ", b"!!set ", b"!!omap ",
    b"!!python/name:os.system ", b"%YAML 9.9\n", b"---\n", b"...\n", b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff",
    b"\xe4", b"\xc3", b"\xed\xa0\x80", b"\\ud83d", b"\\u0000", b"\xe2\x80\xa8", b"\xc2\x85",
    b"NaN", b"Infinity", b"-Infinity", b"1e999", b"9" * 5000, b"-0", b"0x1f", b"0b", b"1:2:3", b"2001-99-99",
    b"true", b"null", b"~", b"[" * 2000, b"{\"a\":" * 2000, b"\"text\": 1, ", b"a" * 70_000, b"PAR1", b"\x1f\x8b",
]  # fmt: skip

_words = st.sampled_from(["a", "", " ", "user", "assistant"])
_leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), _words)
_inner = {"role", "content", "from", "value", "tool_calls"}
_names = st.sampled_from(sorted({key for row in ROWS for key in row} | _inner))
_values = st.recursive(
    _leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_names | st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """`whole` after a few cuts, flips, insertions and repetitions."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(content)))
        end = min(len(content), at + draw(st.integers(0, 40)))
        kind = draw(st.sampled_from(["cut", "flip", "piece", "bytes", "again", "end"]))
        if kind == "cut":
            del content[at:end]
        elif kind == "flip" and at < len(content):
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "piece":
            content[at:at] = draw(st.sampled_from(PIECES))
        elif kind == "bytes":
            content[at:at] = draw(st.binary(max_size=6))
        elif kind == "again":
            content[at:at] = content[at:end]
        elif kind == "end":
            del content[at:]
    return bytes(content)


def parquet(rows: list[dict[str, Any]]) -> bytes:
    import io

    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


#: Made once: what is written to it has no bearing on what is drawn.
PARQUET = [parquet([row, row]) for row in ROWS]


@st.composite
def data_files(draw: st.DrawFn) -> tuple[str, bytes]:
    """The name and the bytes of a data file."""
    suffix = draw(st.sampled_from(SUFFIXES))
    rows = draw(st.lists(st.sampled_from(ROWS) | st.dictionaries(_names, _values, max_size=4), max_size=4))
    if suffix == ".jsonl":
        whole = "".join(json.dumps(row) + "\n" for row in rows).encode()
    elif suffix == ".json":
        whole = json.dumps(draw(st.sampled_from([rows, {"data": rows}, rows[:1]]))).encode()
    elif suffix == ".parquet":
        whole = draw(st.sampled_from(PARQUET))
    else:
        whole = TABLE.replace(",", "\t" if suffix == ".tsv" else ",").encode()
    content = draw(damaged(whole))
    if draw(st.booleans()) and suffix != ".parquet":
        return f"rows{suffix}.gz", draw(damaged(gzip.compress(content, mtime=0)))
    return f"rows{suffix}", content


# -- what is tried -----------------------------------------------------------------------------------------------------


def only_trivet_errors(what: str, call: Callable[[], object]) -> None:
    """Run `call`; a `TrivetError` has a message of one kind and no other error comes out."""
    try:
        call()
    except TrivetError as error:
        assert str(error).strip(), f"{what}: an error without a message"
        SEEN[f"{what}: {type(error).__name__}"] += 1
    else:
        SEEN[f"{what}: accepted"] += 1


def try_data(file: tuple[str, bytes], form: str, bad: str, columns: dict[str, str]) -> None:
    name, content = file
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content)
        only_trivet_errors(
            "data", lambda: load_dataset(path, format=form, on_bad_row=bad, columns=columns).shuffled(1).fingerprint
        )


def try_config(content: bytes, overrides: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        path.write_bytes(content)

        def call() -> None:
            found = load(path, overrides)
            path.write_text(dump(found), encoding="utf-8")
            assert load(path) == found, "a config that is written does not read back"

        only_trivet_errors("config", call)


def try_adapter(config: bytes, weights: bytes, notes: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in (
            ("adapter_config.json", config), ("adapter_model.safetensors", weights), ("trivet.json", notes),
        ):  # fmt: skip
            Path(folder, name).write_bytes(content)
        only_trivet_errors("adapter", lambda: read_config(Path(folder)))
        only_trivet_errors("notes", lambda: read_notes(Path(folder)))


def weights() -> bytes:
    import torch
    from safetensors.torch import save

    start = "base_model.model.h.0.q.lora_"
    return save({f"{start}A.weight": torch.ones(2, 3), f"{start}B.weight": torch.ones(4, 2)})


_mappings = st.dictionaries(
    st.sampled_from(list(ADAPTER))
    | st.sampled_from(["layer_replication", "auto_mapping", "alpha_pattern", "use_dora"]),
    _values | st.sampled_from(["(a+)+$", "all-linear", 10**12]),
    max_size=3,
)
_texts = st.sampled_from(PIECES).map(lambda piece: piece.decode("latin-1")) | st.text()
TARGETS: dict[str, tuple[Callable[..., None], dict[str, st.SearchStrategy[Any]]]] = {
    "data": (
        try_data,
        {
            "file": data_files(),
            "form": st.sampled_from(FORMATS),
            "bad": st.sampled_from(["refuse", "skip"]),
            "columns": st.just({}) | st.dictionaries(_names, _names, max_size=2),
        },
    ),
    "config": (
        try_config,
        {
            "content": damaged(CONFIG.encode()) | damaged(b"model: {name: a}\nmethod: {rank: fixed}") | st.binary(),
            "overrides": st.lists(st.builds("{}={}".format, st.sampled_from([*keys(), "x", ""]), _texts), max_size=2),
        },
    ),
    "adapter": (
        try_adapter,
        {
            "config": damaged(json.dumps(ADAPTER).encode()) | _mappings.map(lambda m: json.dumps(ADAPTER | m).encode()),
            "weights": st.just(weights()) | damaged(weights()),
            "notes": damaged(json.dumps(NOTES).encode()) | _values.map(lambda v: json.dumps(v).encode()),
        },
    ),
}  # fmt: skip


def attempt(name: str, examples: int, *, repeatable: bool = False) -> None:
    """Try one target with so many inputs; a failure comes out with the smallest input that shows it."""
    function, strategies = TARGETS[name]
    checks = settings(
        max_examples=examples,
        deadline=None,
        derandomize=repeatable,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    checks(given(**strategies)(function))()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long")
    parser.add_argument("--only", choices=list(TARGETS), help="one target")
    asked = parser.parse_args()
    end, failures = time.monotonic() + 60 * asked.minutes, 0
    while time.monotonic() < end:
        for name in [asked.only] if asked.only else TARGETS:
            try:
                attempt(name, 300)
            except Exception as error:  # noqa: BLE001 - whatever comes out is what is looked for
                failures += 1
                notes = "\n".join(getattr(error, "__notes__", []))
                print(f"{name}: {type(error).__name__}: {str(error)[:300]}\n{notes[:1500]}\n", flush=True)
    print(f"{sum(SEEN.values()):,} inputs, {failures} failures; {dict(sorted(SEEN.items()))}")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
