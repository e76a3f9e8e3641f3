"""Ctrl-C and what schedulers send: stop after saving, at once at a second Ctrl-C."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_BY_SIGNAL = 128  # plus the signal's number, as shells report it


class StopRequest:
    """Whether someone asked the run to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """130 after SIGINT, 143 after SIGTERM or a signal that only another process got."""
        return EXIT_BY_SIGNAL + (self.signal or signal.SIGTERM)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # torchrun passes a Ctrl-C on as SIGTERM: only a second Ctrl-C is a person in a hurry
        if self.signal is None:
            self.signal = number
        elif number == signal.SIGINT:
            raise KeyboardInterrupt


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request; a later SIGINT raises KeyboardInterrupt."""
    request = StopRequest()
    previous = {n: signal.signal(n, request._handle) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
