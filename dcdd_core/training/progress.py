"""The progress of a running training: a bar in a terminal, a line at intervals elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TextIO

from tqdm import tqdm

from ..pipelines.progress import memory

#: Seconds between two lines where there is no terminal [choice].
_LINE_EVERY = 30.0


class ProgressBar:
    """Shows a training's updates and their rate, the remaining time, the last numbers of the log, and the memory.

    Args:
        name: of the run.
        steps: updates of the whole run.
        stream: where to write; None for standard error.
        every: seconds between two lines, if the stream is not a terminal.
    """

    def __init__(self, name: str, steps: int, *, stream: TextIO | None = None, every: float = _LINE_EVERY):
        self.name = name
        self.steps = steps
        self.stream = stream or sys.stderr
        self.every = every
        self._bar: tqdm | None = None
        self._numbers: dict[str, float] = {}
        self._first = self._step = 0
        self._started = self._said = time.monotonic()

    def start(self, step: int) -> None:
        """Starts the display at the step from which the run continues."""
        self._first = self._step = step
        self._started = self._said = time.monotonic()
        if self.stream.isatty():
            self._bar = tqdm(desc=self.name, total=self.steps, initial=step, unit="update", file=self.stream)

    def advance(self, step: int, numbers: Mapping[str, float], *, evaluated: bool) -> None:
        """Shows that a step is done.

        Args:
            step: updates done so far.
            numbers: those of the log's line; empty if there is none.
            evaluated: whether the line is an evaluation's, which is always shown.
        """
        self._step = step
        self._numbers |= {name: value for name, value in numbers.items() if name not in ("step", "seconds")}
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join((*_words(self._numbers), memory())), refresh=False)
            self._bar.update(step - self._bar.n)
            if evaluated:
                self._bar.write(self._line(), file=self.stream)
        elif evaluated or step == self.steps or time.monotonic() - self._said >= self.every:
            self._said = time.monotonic()
            print(self._line(), file=self.stream, flush=True)

    def close(self) -> None:
        """Ends the bar's line."""
        if self._bar is not None:
            self._bar.close()

    def _line(self) -> str:
        done = self._step - self._first
        seconds = max(time.monotonic() - self._started, 1e-9)
        left = tqdm.format_interval((self.steps - self._step) * seconds / max(done, 1))
        words = [f"{self.name} {self._step}/{self.steps}", *_words(self._numbers)]
        return ", ".join((*words, f"{done / seconds:.3g} updates/s", f"{left} left", memory()))


def _words(numbers: Mapping[str, float]) -> list[str]:
    return [f"{name} {value:.4g}" for name, value in numbers.items()]
