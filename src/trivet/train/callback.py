"""What a run says while it trains: one JSON object a step in log.jsonl, and one live line for the person."""

from __future__ import annotations

import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text
from transformers import TrainerCallback

from trivet.errors import StorageError
from trivet.memory import current_memory, gib
from trivet.runfolder import storage, write_text
from trivet.train.numbers import Spikes, listed


def _clock(seconds: float) -> str:
    minutes, rest = divmod(max(int(seconds), 0), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


class RunLog(TrainerCallback):  # type: ignore[misc]
    """Writes log.jsonl and shows progress. `bind` gives it the trainer, which counts the tokens of each step."""

    def __init__(self, path: Path, console: Console) -> None:
        self.path, self.console = path, console
        self.trainer: Any = None
        self.file: TextIO | None = None
        self.live: Live | None = None
        self.steps: list[dict[str, Any]] = []  # this process's steps, for the summary
        self.validation: float | None = None
        self.spikes = Spikes()
        #: Why the log could not be written to its end; None where it was.
        self.unwritten: StorageError | None = None
        self.began = self.ended = 0.0

    def bind(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        kept = []
        if self.path.exists():  # resuming: steps after the checkpoint are about to be trained again
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    row = json.loads(line)
                    if row["step"] <= state.global_step:
                        kept.append(line)
                        if row.get("loss") is not None:
                            self.spikes.found(row["loss"])
                except (ValueError, KeyError, TypeError, AttributeError):
                    continue  # a line that a killed run left unfinished
        write_text(self.path, "".join(line + "\n" for line in kept))
        with storage(f"log {self.path}"):
            self.file = self.path.open("a", encoding="utf-8")
        if self.console.is_terminal:
            self.live = Live(console=self.console, auto_refresh=False, transient=False)
            self.live.start()
        self.began = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ended = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if self.trainer is None or logs is None or not state.is_world_process_zero:
            return
        row: dict[str, Any] = {"step": state.global_step}
        if "loss" in logs:
            row |= {
                "loss": logs["loss"],
                "learning_rate": logs["learning_rate"],
                "grad_norm": logs.get("grad_norm"),
                "step_seconds": round(self.ended - self.began, 4),
                "tokens": self.trainer.step_tokens,
                "supervised_tokens": self.trainer.step_supervised,
                "epoch": round(logs.get("epoch", 0.0), 4),
                "memory_bytes": current_memory(),
                "adapter_parameters": self.trainer.ranks.parameters,
            }
            self._point_out(row)
            self.steps.append(row)
            self._show(row, state)
        elif "eval_loss" in logs:
            self.validation = logs["eval_loss"]
            row |= {"validation_loss": logs["eval_loss"], "validation_accuracy": logs.get("eval_accuracy")}
            self._say(f"step {state.global_step}: validation loss {self.validation:.4f}")
        else:
            return
        if self.file is None:
            return
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        try:
            with storage(f"log {self.path}"):
                self.file.write(json.dumps(finite, ensure_ascii=False) + "\n")
                self.file.flush()
        except StorageError as error:
            self.unwritten, self.file = error, None
            self._say(f"{error}. Training goes on without a log")

    def _point_out(self, row: dict[str, Any]) -> None:
        """Add to `row`, and say, that its step was not taken or that its loss is suddenly high."""
        reason = self.trainer.watch.reason
        if reason:
            row |= {"skipped": reason, "rows": self.trainer.step_rows()}
            self._say(f"step {row['step']} was not taken: {reason}; its rows: {listed(row['rows'])}")
        elif self.spikes.found(row["loss"]):
            row |= {"spike": True, "rows": self.trainer.step_rows()}
            self._say(f"step {row['step']}: the loss is suddenly {row['loss']:.4f}; its rows: {listed(row['rows'])}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()
        if self.steps and (left := self.trainer.ranks.parameters) < (wide := self.steps[-1]["adapter_parameters"]):
            self._say(f"cut from {wide:,} to {left:,} parameters")

    def close(self) -> None:
        """Ends the live line and the file, also when training was interrupted."""
        if self.live is not None:
            self.live.stop()
            self.live = None
        if self.file is not None:
            with contextlib.suppress(OSError):  # each line was flushed, and what failed was said
                self.file.close()
            self.file = None

    @property
    def tokens_per_second(self) -> float:
        """Tokens trained on per second of steps, without padding, validation and checkpoints."""
        seconds = sum(row["step_seconds"] for row in self.steps)
        return sum(row["tokens"] for row in self.steps) / seconds if seconds else 0.0

    def _show(self, row: dict[str, Any], state: Any) -> None:
        recent = self.steps[-20:]
        seconds = sum(r["step_seconds"] for r in recent)
        speed = sum(r["tokens"] for r in recent) / seconds if seconds else 0.0
        left = (state.max_steps - state.global_step) * seconds / len(recent)
        line = (
            f"step {row['step']}/{state.max_steps}  loss {row['loss']:.4f}  lr {row['learning_rate']:.2e}  "
            f"{row['adapter_parameters']:,} parameters  {speed:,.0f} tokens/s  ETA {_clock(left)}  "
            f"memory {gib(row['memory_bytes'])}"
        )
        if self.live is not None:
            self.live.update(Text(line), refresh=True)
        elif state.global_step == 1 or state.global_step % max(1, state.max_steps // 20) == 0:
            self._say(line)

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)
