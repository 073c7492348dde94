"""The parent's end of `bench/speed.py`: a process for each side, and whose turn it is."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from speed_table import summary

HERE = Path(__file__).resolve().parent
#: glibc keeps what is freed, and maps no block of up to 1 GiB anew.
KEEP_MEMORY = {
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TOP_PAD_": str(2**26),
}
#: Sides that get it; trivet runs as it is.
TUNED = ("peft-best", "trl-grouped", "trl-packed")


class Child:
    """A side's process. It is started by `launch`, and ended by closing its standard input."""

    def __init__(self, spec: dict[str, Any], threads: int, folder: str, python: str | None = None) -> None:
        self.spec, self.threads, self.python = spec, threads, python or sys.executable
        self.errors = Path(folder) / f"{spec['side']}.err"
        self.process: subprocess.Popen[str] | None = None

    def launch(self) -> None:
        self.launched = time.time()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        environment |= {"OMP_NUM_THREADS": str(self.threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        environment |= KEEP_MEMORY if self.spec["side"] in TUNED else {}
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [self.python, str(HERE / "speed_sides.py"), json.dumps(self.spec)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment,
            )  # fmt: skip

    def ready(self) -> tuple[dict[str, Any], float] | None:
        """What it says once it is ready, and how many seconds after its start that was; or None."""
        said = self._hear()
        return said and (said, said.pop("ready_at") - self.launched)

    def step(self) -> dict[str, Any] | None:
        """One optimizer step, or None where it failed."""
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return None
        return self._hear()

    def _hear(self) -> dict[str, Any] | None:
        line = self.process.stdout.readline()
        return json.loads(line) if line else None

    def why(self) -> str:
        """The last line of what it wrote about its end."""
        code = self.process.wait()
        lines = [line for line in self.errors.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip()[:300] if lines else f"it ended with code {code} and without a word"

    def stop(self) -> None:
        if self.process is None:
            return
        with contextlib.suppress(BrokenPipeError):  # it is gone already
            self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def take_turns(
    children: dict[str, Child], rounds: int, warmup: int, *, together: bool = False
) -> dict[str, dict[str, Any]]:
    """Start the sides one after the other, or all `together`, then let them step in turns.

    Returns each one's summary, or why it failed.
    """
    ready: dict[str, tuple[dict[str, Any], float]] = {}
    steps: dict[str, list[dict[str, Any]]] = {name: [] for name in children}
    failed: dict[str, str] = {}
    try:
        for child in children.values() if together else ():
            child.launch()
        for name, child in children.items():
            if not together:
                child.launch()
            said = child.ready()
            if said is None:
                failed[name] = child.why()
                print(f"  {name}: can't run: {failed[name]}", flush=True)
            else:
                ready[name] = said
        for turn in range(rounds):
            alive = [name for name in ready if name not in failed]
            first = turn % len(alive) if alive else 0
            for name in alive[first:] + alive[:first]:  # nobody is always the one after a certain other
                time.sleep(0.02)  # until the threads of the one before are asleep
                answer = children[name].step()
                if answer is None:
                    failed[name] = f"in step {turn + 1}: {children[name].why()}"
                    print(f"  {name}: {failed[name]}", flush=True)
                else:
                    steps[name].append(answer)
            took = (f"{name} {steps[name][-1]['seconds']:.3f}" for name in alive if name not in failed)
            print(f"  round {turn + 1}: {', '.join(took)}", flush=True)
    finally:
        for child in children.values():
            child.stop()
    return {
        name: {"failed": failed[name]} if name in failed else summary(steps[name], warmup, *ready[name])
        for name in children
    }
