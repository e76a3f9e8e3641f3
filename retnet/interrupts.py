"""Ctrl-C, of which a burst is one: what answers it is not interrupted again, or not at once."""

import atexit
import functools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar, cast

BURST_S = 1.0  # Ctrl-C that comes again within this time is the same one
F = TypeVar("F", bound=Callable[..., int])


class _Interrupt:
    """SIGINT's handler: one KeyboardInterrupt of a burst, so that nothing interrupts its answer.

    When all has ``ended`` but the interpreter, the signal ends that too, without a traceback.
    """

    def __init__(self) -> None:
        self._last, self.ended = -math.inf, False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._last < BURST_S:
            return
        self._last = now
        if self.ended:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        raise KeyboardInterrupt


def interrupted_once(run: F) -> F:
    """Have ``run`` see one KeyboardInterrupt of many Ctrl-C, and a process none after it."""

    @functools.wraps(run)
    def guarded(main: Any, argv: Sequence[str] | None = None) -> int:
        usual = signal.default_int_handler
        main_thread = threading.current_thread() is threading.main_thread()
        if not main_thread or signal.getsignal(signal.SIGINT) != usual:
            return run(main, argv)
        interrupt = _Interrupt()
        signal.signal(signal.SIGINT, interrupt)
        try:
            return run(main, argv)
        finally:
            interrupt.ended = True
            if argv is not None:  # this is not the end of the process
                signal.signal(signal.SIGINT, usual)
            else:  # the interpreter takes handlers away before it is gone
                atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)

    return cast(F, guarded)


@contextmanager
def ctrl_c_noticed() -> Iterator[Callable[[], bool]]:
    """Have Ctrl-C leave the block alone, which asks the function that it gets for it.

    A later one does what it did before. Signals belong to the main thread: in another there is
    none to notice.
    """
    noticed = [False]
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    usual = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: FrameType | None) -> None:
        if noticed[0] and callable(usual):
            usual(number, frame)
        noticed[0] = True

    signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: noticed[0]
    finally:
        signal.signal(signal.SIGINT, usual)
