"""Stopping a training in an orderly way: after a signal it finishes its update, saves a checkpoint and ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

#: Signals within this many seconds count as one: torchrun passes on a Ctrl-C that its processes got themselves.
_ONE_SIGNAL = 1.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TrainingStopped(KeyboardInterrupt):
    """A signal ended the training after an update, and the checkpoint is saved.

    Attributes:
        status: exit status for the process, 128 + the signal's number: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.status = 128 + number


class StopRequest:
    """Records whether a signal was received.

    Attributes:
        number: the signal's; 0 for none yet.
    """

    def __init__(self):
        self.number = 0
        self._since = 0.0

    def receive(self, number: int, _frame: object) -> None:
        """The signal handler; raises KeyboardInterrupt for a second signal, more than 1 s after the first."""
        if self.number:
            if time.monotonic() - self._since > _ONE_SIGNAL:
                raise KeyboardInterrupt
            return
        self.number, self._since = number, time.monotonic()
        # Not print: a handler may run during another print, which Python refuses.
        with suppress(OSError):
            os.write(2, b"\nstopping after this update; once more to stop at once\n")


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Records Ctrl-C and SIGTERM while the context lasts; a second one raises KeyboardInterrupt.

    Signals that the process ignores (nohup) stay ignored. Outside the main thread, the only one that receives signals,
    nothing is recorded.
    """
    request = StopRequest()
    with _handled(_SIGNALS, request.receive):
        yield request


@contextmanager
def stop_at_once(message: str) -> Iterator[None]:
    """While the context lasts, SIGTERM raises an exception, as Ctrl-C does, so that partly written files are removed.

    Raises:
        TrainingStopped: with this message.
    """

    def stop(number: int, _frame: object) -> None:
        raise TrainingStopped(message, number)

    with _handled((signal.SIGTERM,), stop):
        yield


@contextmanager
def _handled(signals: Iterable[int], handler: Callable[[int, object], None]) -> Iterator[None]:
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in signals}
    handled = [number for number, own in before.items() if own not in (signal.SIG_IGN, None)]
    for number in handled:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, before[number])
