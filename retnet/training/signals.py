"""Ctrl-C and what schedulers send: stop after saving, at once at a second Ctrl-C."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

EXIT_BY_SIGNAL = 128  # plus the signal's number, as shells report it


class StopRequest:
    """Whether someone asked the run to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._hurry: Any = signal.default_int_handler  # what a second Ctrl-C does

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """130 after SIGINT, 129 after SIGHUP, else 143: also where another process got a signal."""
        return EXIT_BY_SIGNAL + (self.signal or signal.SIGTERM)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # torchrun passes a Ctrl-C on as SIGTERM: only a second Ctrl-C is a person in a hurry
        if self.signal is None:
            self.signal = number
        elif number == signal.SIGINT:
            self._hurry(number, frame)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn the first SIGINT, SIGTERM or SIGHUP into a request.

    A later SIGINT does what it did before, it raises KeyboardInterrupt. A SIGHUP that is ignored
    (nohup) stays so. Signals belong to the main thread: outside of it there are no requests, which
    one line says.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        logger.info("outside of the main thread: signals and Ctrl-C do not stop and save this run")
        yield request
        return
    numbers, hang_up = [signal.SIGINT, signal.SIGTERM], getattr(signal, "SIGHUP", None)
    if hang_up is not None and signal.getsignal(hang_up) != signal.SIG_IGN:  # Windows has none
        numbers.append(hang_up)
    previous = {number: signal.getsignal(number) for number in numbers}
    if callable(previous[signal.SIGINT]):
        request._hurry = previous[signal.SIGINT]
    try:
        for number in numbers:
            signal.signal(number, request._handle)
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
