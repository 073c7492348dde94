"""Kills a run at many moments and resumes it: `python tests/train/kill.py config.yaml --times 40`.

The config's run goes through once for reference. Then, again and again, it is started afresh, killed (SIGKILL) and
resumed to its end, and its adapter must have the reference's bytes. A third of the moments are drawn from the clock, a
third are in the midst of writing a checkpoint, and a third in the midst of a change of rank. Children are forked from a
process that has imported everything and computed nothing: what has computed has threads, which a fork lacks. Prints one
JSON line a kill; exit code 1 if any run ended otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot  # noqa: F401 - this and the next: what a run would import on its way
import transformers.models.llama.modeling_llama  # noqa: F401
from rich.console import Console

import trivet.adapter.resize as resize
import trivet.evaluate.text_metrics  # noqa: F401
import trivet.train.checkpoint as checkpoint
from trivet.configio import load
from trivet.run import train

#: Where a process can be made to die: the module, its function, and about how often a run calls it.
PLACES = {"writing": (checkpoint, ("_sum", "_flush")), "resizing": (resize, ("_swap", "_carry"))}


def die_in(module: Any, name: str, after: int) -> None:
    """End this process at the call number `after` of a function, before or in the midst of what its caller does."""
    function = getattr(module, name)
    calls = 0

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == after:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(module, name, dying)


def forked(work: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """The id of a child that does `work` and exits with 0."""
    child = os.fork()
    if child:
        return child
    try:
        work(*args, **kwargs)
    except BaseException:  # noqa: BLE001 - whatever it was, a child must not return into its parent's code
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def whole(config: Path, out: Path, *, resume: bool = False) -> None:
    """The run, to its end."""
    train(load(config, values={"output_dir": str(out)}), resume=resume, console=Console(quiet=True))


def doomed(config: Path, out: Path, place: str, name: str, after: int) -> None:
    """The run, which dies at a call of a function."""
    die_in(PLACES[place][0], name, after)
    whole(config, out)


def killed(config: Path, out: Path, number: int, lasts: float, chance: random.Random) -> dict[str, Any]:
    """Start the run and kill it; how, when, and what it left."""
    kind = ("clock", *PLACES)[number % 3]
    if kind == "clock":
        moment: Any = chance.uniform(0.05, 1.0) * lasts
        child = forked(whole, config, out)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
    else:
        moment = (chance.choice(PLACES[kind][1]), chance.randint(1, 100))
        child = forked(doomed, config, out, kind, *moment)
    _, status = os.waitpid(child, 0)
    kept = sorted(path.name for path in out.glob("checkpoints/checkpoint-*"))
    ended = (out / "result.json").exists()  # killed while it tidied up, if at all: nobody resumes it
    return {"kind": kind, "moment": moment, "killed": os.WIFSIGNALED(status), "kept": kept, "ended": ended}


def resumed(config: Path, out: Path) -> bool:
    """Take a killed run to its end, as a person would; whether that went well."""
    if (out / "result.json").exists():
        return True
    begun = (out / "config.yaml").exists()
    if not begun:
        shutil.rmtree(out, ignore_errors=True)
    return os.waitpid(forked(whole, config, out, resume=begun), 0)[1] == 0


def adapter(out: Path) -> bytes:
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--times", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    config, folder, chance = arguments.config, arguments.config.parent, random.Random(arguments.seed)
    began = time.monotonic()
    if os.waitpid(forked(whole, config, folder / "reference"), 0)[1]:
        sys.exit("the reference run failed")
    lasts = time.monotonic() - began
    expected, failures = adapter(folder / "reference"), 0
    for number in range(arguments.times):
        out = folder / f"run{number}"
        row = killed(config, out, number, lasts, chance)
        same = resumed(config, out) and adapter(out) == expected
        failures += not same
        print(json.dumps({**row, "same": same, "left": [path.name for path in out.rglob(".*")]}), flush=True)
        if same:
            shutil.rmtree(out)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
