"""How fast is a training step, beside PEFT, TRL and the bare matrix products? `python bench/speed.py --data FOLDER`.

Every contender ("side") loads its model in a process of its own and then waits. The processes take turns, one optimizer
step each, so that whatever else the machine does falls on all of them; a round is one turn of each. The first two
rounds (on GPUs three: then trivet has recorded its passes) warm up and are kept apart. One JSON line a workload is
appended to bench/results/speed.jsonl, of a GPU to speed_gpu.jsonl: each side's step times, rates, memory and start;
how many times as fast the workload's first side is, round by round; and machine, versions and command. A side that
can't run here says why, and the others go on.

Without --data the workloads that need no file run: `dense` (SmolLM2-135M, 4 rows of 256 random tokens, all of them
labels), `gpt2` (the same with GPT-2's size and random weights), `four-bit` (as `dense`, frozen weights in 4 bits
beside whole ones, and PEFT with bitsandbytes), `types` (as `dense`, trivet alone in float32 and in bfloat16),
`kernels` (as `dense`, trivet alone with its C kernels and without a compiler),
`lengths` (trivet alone, one row of 512, 1024 and 2048) and `seq2seq` (BART base's size, random weights). With it also
`e2e`, `snips`, `gsm8k` (prompt and completion; TRL with its defaults and with its two best settings), `e2e-chat`,
`snips-chat`, `gsm8k-chat` (the same rows in the model's chat template, on all sides) and `trec` (a classifier; each
side in its own default type, `trec-fp32` in float32). --device cuda runs `dense` with a Llama of --size, or what
--workloads names, beside TRL and Unsloth, and reports model FLOPs utilisation. A side can have a Python of its own,
where its packages don't go with trivet's: --python unsloth=FOLDER/bin/python.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import json
import os
import platform
import re
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speed_table import peak_flops, ratios, table, utilisation
from speed_turns import Child, take_turns
from versions import processor, versions

HERE = Path(__file__).resolve().parent
RESULTS = {"cpu": HERE / "results" / "speed.jsonl", "cuda": HERE / "results" / "speed_gpu.jsonl"}
WARMUP = 2  # and one more on GPUs
TRL = ("trivet", "trivet-padded", "trl", "trl-grouped", "trl-packed")
CHAT = ("trivet", "trivet-unshared", "trl", "trl-grouped", "trl-packed")


@dataclass(frozen=True)
class Workload:
    """The first side is the one that the others are compared with."""

    kind: str
    sides: tuple[str, ...]
    rows: int
    length: int = 0
    rank: int = 16
    file: str | None = None
    dtype: str = "auto"
    pack_length: int = 0  # of TRL's packs: about the tokens of the other sides' steps
    chat: bool = False  # rows in the model's chat template
    random: str = ""  # a model with random weights instead of the base model


WORKLOADS = {
    "dense": Workload("dense", ("trivet", "peft-bf16", "peft-fp32", "peft-best", "floor"), 4, 256),
    "gpt2": Workload("dense", ("trivet", "peft-bf16", "peft-fp32", "peft-best"), 4, 256, random="gpt2"),
    "four-bit": Workload("dense", ("trivet-4bit", "trivet", "peft-4bit"), 4, 256),
    "types": Workload("dense", ("trivet-fp32", "trivet-bf16"), 4, 256),
    "kernels": Workload("dense", ("trivet", "trivet-uncompiled"), 4, 256),
    "lengths": Workload("dense", ("trivet-512", "trivet-1024", "trivet-2048"), 1),
    "seq2seq": Workload("seq2seq", ("trivet", "peft-bf16", "peft-fp32"), 8, 128),
    "e2e": Workload("rows", TRL, 16, file="d2t_e2e_train.jsonl.gz", pack_length=1024),
    "snips": Workload("rows", TRL, 16, file="extract_snips_train.jsonl", pack_length=1024),
    "gsm8k": Workload("rows", TRL, 8, file="math_gsm8k_train.jsonl.gz", pack_length=1536),
    "e2e-chat": Workload("rows", CHAT, 16, file="d2t_e2e_train.jsonl.gz", pack_length=1400, chat=True),
    "snips-chat": Workload("rows", CHAT, 16, file="extract_snips_train.jsonl", pack_length=1344, chat=True),
    "gsm8k-chat": Workload("rows", CHAT, 8, file="math_gsm8k_train.jsonl.gz", pack_length=1792, chat=True),
    "trec": Workload("labels", ("trivet", "peft"), 16, rank=8, file="cls_trec_train.jsonl"),
    "trec-fp32": Workload("labels", ("trivet", "peft"), 16, rank=8, file="cls_trec_train.jsonl", dtype="float32"),
}
CUDA = Workload(
    "dense",
    ("trivet", "trivet-unrecorded", "peft-bf16", "peft-best", "trl", "trl-best", "trl-liger", "unsloth"),
    8,
    1024,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), help="default: all that can run")
    parser.add_argument("--sides", nargs="+", help="only these of each workload's")
    parser.add_argument("--rounds", type=int, help=f"turns of each side, the first {WARMUP} to warm up (default 9)")
    parser.add_argument("--data", type=Path, help="folder of the task files; their first 2,000 rows are used")
    parser.add_argument("--base", default="demo", help="the model: demo (trec: demo-encoder), or a local folder")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=("0.1b", "0.5b", "1b", "8b"), help="Llama with random weights (cuda: 1b)")
    parser.add_argument("--batch", type=int, help="rows of a dense step (4; cuda: 8)")
    parser.add_argument("--length", type=int, help="tokens of each of them (256; cuda: 1024)")
    parser.add_argument("--peak-tflops", type=float, help="of a GPU that is not known here, in bfloat16")
    parser.add_argument("--python", nargs="+", default=[], metavar="SIDE=PYTHON", help="the interpreter of a side")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each side (default: all cores)")
    parser.add_argument("--out", type=Path, help="the file that gets the lines, and that --table reads")
    parser.add_argument("--tiny", action="store_true", help="tiny models: does it run? (kept only if --out is given)")
    parser.add_argument("--table", action="store_true", help="only print what is there, as Markdown")
    arguments = parser.parse_args()
    keep = arguments.out is not None or not arguments.tiny
    arguments.out = arguments.out or RESULTS[arguments.device]
    if arguments.table:
        if not arguments.out.exists():
            parser.error(f"{arguments.out} is not there yet: nothing was measured")
        print(table([json.loads(line) for line in arguments.out.read_text(encoding="utf-8").splitlines()]))
        return
    arguments.rounds = arguments.rounds or (2 if arguments.tiny else 9)
    if arguments.rounds < 2 or arguments.threads < 1:
        parser.error("--rounds must be at least 2 (one to warm up, one to measure), --threads at least 1")
    arguments.python = dict(pair.partition("=")[::2] for pair in arguments.python)
    if not all(arguments.python.values()):
        parser.error("--python: SIDE=PYTHON, for example unsloth=unsloth/bin/python")
    for name in chosen(parser, arguments):
        print(f"{name}:", flush=True)
        line = measure(name, arguments)
        if all("failed" in side for side in line["sides"].values()):
            raise SystemExit(f"{name}: no side could run here, so nothing was kept")
        if keep:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        print(table([line]), flush=True)


def chosen(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> list[str]:
    """The workloads to run; what can't be run as asked ends the program with one line."""
    names = arguments.workloads
    if arguments.device == "cuda" and not names:
        names = ["dense"]
    for name in names or ():
        if WORKLOADS[name].file and arguments.data is None:
            parser.error(f"--workloads {name}: --data is needed, the folder that holds {WORKLOADS[name].file}")
    names = names or [name for name, work in WORKLOADS.items() if not work.file or arguments.data is not None]
    for name in names:
        if (file := WORKLOADS[name].file) and not (arguments.data / file).is_file():
            parser.error(f"--workloads {name}: {file} is not in the folder given by --data")
    return names


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One workload, all sides in turns; the line to keep."""
    cuda = arguments.device == "cuda"
    work = CUDA if cuda and name == "dense" else WORKLOADS[name]
    sides = [side for side in work.sides if arguments.sides is None or side in arguments.sides]
    if not sides:
        raise SystemExit(f"--sides: {name} has {', '.join(work.sides)}")
    spec = vars(work) | {"device": arguments.device, "rounds": arguments.rounds, "base": arguments.base}
    spec |= {"warmup": min(WARMUP + cuda, arguments.rounds - 1), "size": arguments.size}
    if work is CUDA:
        spec["size"] = spec["size"] or "1b"
    if work.kind == "labels" and spec["base"] == "demo":
        spec["base"] = "demo-encoder"
    if name in ("dense", "types", "gpt2", "four-bit"):
        spec |= {"rows": arguments.batch or work.rows, "length": arguments.length or work.length}
    if arguments.tiny:
        spec |= {"size": "tiny", "rows": min(2, spec["rows"]), "length": min(32, spec["length"])}
    from trivet.demo import DEMO_MODELS, demo_path

    if spec["base"] in DEMO_MODELS and not spec["size"] and not work.random and work.kind != "seq2seq":
        demo_path(spec["base"])  # once, before the sides look for it
    if any(side.startswith(("trl", "unsloth")) for side in sides) and work.kind == "dense":
        spec["tokenizer"] = str(demo_path("demo"))  # which both insist on, for a model of random weights
    with tempfile.TemporaryDirectory() as folder:
        if work.file:
            spec["rows_file"] = str(first_rows(arguments.data / work.file, Path(folder) / "rows.jsonl", 2000))
        children = {
            side: Child(spec | {"side": side} | length_of(side), arguments.threads, folder, arguments.python.get(side))
            for side in sides
        }
        done = take_turns(children, arguments.rounds, spec["warmup"], together=cuda)  # it has cores to spare
    machine, peak = processor(arguments.device), arguments.peak_tflops
    flops = peak * 1e12 if peak else peak_flops(machine)
    if cuda and flops:
        for side in done.values():
            if "frozen" in side:
                side["utilisation"] = utilisation(side, flops)
    model = Path(spec["base"]).name
    if work.kind == "seq2seq":
        model = f"bart-{'tiny' if arguments.tiny else 'base'} (random)"
    if work.kind == "dense" and (work.random or spec["size"]):
        model = f"{work.random or 'llama'}{'-' * bool(spec['size'])}{spec['size'] or ''} (random)"
    shape = f"{spec['rows']} {'row' if spec['rows'] == 1 else 'rows'}"
    shape += f" of {spec['length']} tokens" if spec["length"] else ""
    return {
        "workload": name, "model": model, "shape": shape, "rank": work.rank,
        "rounds": arguments.rounds, "warmup": spec["warmup"], "sides": done, "ratios": ratios(done),
        "device": arguments.device, "machine": machine, "cores": os.cpu_count(), "threads": arguments.threads,
        "peak_flops": flops if cuda else None, "system": platform.platform(),
        "versions": versions("trl", "liger_kernel"), "command": command(sys.argv),
        "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip


def length_of(side: str) -> dict[str, int]:
    """`trivet-512` is trivet with a row of 512 tokens."""
    tail = side.rpartition("-")[2]
    return {"length": int(tail)} if tail.isdigit() else {}


def first_rows(source: Path, target: Path, count: int) -> Path:
    """The first rows of a JSON-lines file, unpacked, for all sides alike."""
    with (gzip.open if source.suffix == ".gz" else open)(source, "rt", encoding="utf-8") as file:
        target.write_text("".join(line for line, _ in zip(file, range(count), strict=False)), encoding="utf-8")
    return target


def command(words: list[str]) -> str:
    """As it was typed, but for folders, of which only the names matter."""
    return shlex.join(["python", "bench/speed.py", *(re.sub(r"[^=]*/", "", word) for word in words[1:])])


if __name__ == "__main__":
    main()
