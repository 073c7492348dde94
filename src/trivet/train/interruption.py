"""Ctrl-C and SIGTERM: the step under way is finished and kept; a second signal ends the process at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from trivet import processes


class Interruption(TrainerCallback):  # type: ignore[misc]
    """Ends training with a checkpoint, in all processes after the same step, once one of them was sent a signal."""

    def __init__(self, console: Console, then: str = "finishing the step and saving it") -> None:
        self.console, self.then = console, then
        #: The signal's number; None while there was none.
        self.signal: int | None = None

    @property
    def name(self) -> str:
        """The signal's name, once there was one."""
        assert self.signal is not None  # noqa: S101
        return signal.Signals(self.signal).name

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Catches signals in the block; only the main thread can, elsewhere they go where they went."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # A shell's background jobs ignore SIGINT, and are to go on doing so.
        wanted = [s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) is not signal.SIG_IGN]
        before = {s: signal.signal(s, self._caught) for s in wanted}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _caught(self, number: int, _: Any) -> None:
        self.signal = number
        for further, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
            if signal.getsignal(further) is not signal.SIG_IGN:
                signal.signal(further, handler)
        self.console.print(f"{self.name}: {self.then}; once more to stop at once", highlight=False)

    def _stop(self, control: Any) -> None:
        if number := processes.largest(self.signal or 0):
            self.signal = number
            control.should_training_stop = control.should_save = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._stop(control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._stop(control)  # a validation may have taken minutes
