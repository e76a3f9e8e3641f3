"""Progress on stderr: a bar on a terminal, and one log line per finished phase everywhere."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

logger = logging.getLogger(__name__)


class Phase:
    """One phase of the preparation, counted in documents and bytes of text."""

    def __init__(self, bar: tqdm) -> None:
        self.documents = 0
        self.num_bytes = 0
        self._bar = bar

    def advance(self, num_bytes: int) -> None:
        """Count one more document of ``num_bytes`` bytes."""
        self.documents += 1
        self.num_bytes += num_bytes
        self._bar.update(num_bytes)


@contextmanager
def phase(name: str, *, total: int | None = None) -> Iterator[Phase]:
    """Show a bar (of ``total`` bytes, where known) in the block and log what was counted in it."""
    started = time.perf_counter()
    # disable=None: a bar on a terminal only.
    with tqdm(
        total=total, desc=name, unit="B", unit_scale=True, disable=None, dynamic_ncols=True
    ) as bar:
        counter = Phase(bar)
        yield counter
    facts = f"{counter.documents:,} documents, {counter.num_bytes:,} bytes"
    logger.info("%s: %s, %.1f s", name, facts, time.perf_counter() - started)
