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
    """Show a bar named ``name`` while the block runs and log what it counted at the end.

    Args:
        name: What is being done ("reading", "tokenising").
        total: Bytes of text to come, where known.

    Yields:
        The counter to advance.
    """
    started = time.perf_counter()
    # disable=None: a bar on a terminal only.
    with tqdm(
        total=total, desc=name, unit="B", unit_scale=True, disable=None, dynamic_ncols=True
    ) as bar:
        counter = Phase(bar)
        yield counter
    logger.info(
        "%s: %s documents, %s bytes, %.1f s",
        name,
        f"{counter.documents:,}",
        f"{counter.num_bytes:,}",
        time.perf_counter() - started,
    )
