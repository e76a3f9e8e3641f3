"""Where a run's numbers always go: metrics.jsonl and the console. (``trackers.py`` has others.)

metrics.jsonl has one line for each optimizer step, in order; an evaluation's figures stand in the
line of its step.
"""

import errno
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from retnet.checkpoints.format import METRICS
from retnet.errors import UserError, memory_errors, os_errors
from retnet.files import write_text
from retnet.terminal import shown

logger = logging.getLogger(__name__)

EVALUATED = "val/loss"  # stands in the lines of steps with an evaluation
MOST_LOSS = torch.finfo(torch.float32).max  # a run's are of that type, and finite


class MetricsFile:
    """The run's metrics.jsonl, opened to go on after ``step`` completed steps.

    ``losses`` are those of training in the steps that are in the file already, ``evaluation`` the
    line of the last step with figures of the validation text.
    """

    def __init__(self, run: Path, step: int) -> None:
        self.path = run / METRICS
        kept = _lines_until(self.path, step)
        rows: list[dict[str, Any]] = [*map(json.loads, kept)]
        self.losses = [row["train/loss"] for row in rows]
        self.evaluation = next((row for row in reversed(rows) if EVALUATED in row), None)
        write_text(self.path, "".join(line + "\n" for line in kept))
        self._file = self.path.open("ab", buffering=0)

    def write(self, values: dict[str, Any]) -> None:
        """Append one step; an ``OSError`` where it is not in the file (full disk, file gone)."""
        line = json.dumps(values).encode() + b"\n"
        if self._file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._check_place()
        if EVALUATED in values:
            self.evaluation = dict(values)  # a tracker takes its own apart

    def _check_place(self) -> None:
        """Raise where the file is gone, or another run's is in its place.

        What is written into a removed file is lost, and what is saved beside another run's spoils
        that one.
        """
        if not os.path.samestat(os.fstat(self._file.fileno()), self.path.stat()):
            raise UserError(
                f"train.out_dir ({self.path.parent}) is another run's folder now, this run's was "
                "moved away: what it saved is there, and train.out_dir=THAT FOLDER goes on with it"
            )

    def sync(self) -> None:
        """Have all lines on disk, before a checkpoint that counts on them."""
        os.fsync(self._file.fileno())
        self._check_place()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def check_metrics(run: Path) -> None:
    """Raise a ``UserError`` where a run could not go on with its metrics.jsonl; writes nothing."""
    file = run / METRICS
    _lines_of(file)
    if file.exists():
        with os_errors(f"{file} cannot be written", "change its permissions"):
            file.open("ab").close()


def _lines_of(path: Path) -> list[bytes]:
    """The lines of a metrics file; a ``UserError`` where memory does not take them."""
    with memory_errors(path):
        return path.read_bytes().split(b"\n") if path.exists() else []


def _lines_until(path: Path, step: int) -> list[str]:
    """The lines of the steps up to ``step``, each once and in order.

    A damaged one is left out with a warning, and one warning says when steps are missing, there
    twice or out of order; of a step that is there twice the later line stands.
    """
    lines = _lines_of(path)
    steps: list[int] = []
    kept: dict[int, str] = {}
    for number, line in enumerate(lines, 1):
        found = _step_of_line(line)
        if found is None:
            if number < len(lines):  # the last has no end: an interruption cut it off
                logger.warning(f"{path} line {number} can't be read and is left out")
        elif found <= step:  # else that step comes again
            steps.append(found)
            kept[found] = line.decode()
    # a run that began with another run's checkpoint has none of the steps before it
    missing = set(range(min(kept), step + 1)) - kept.keys() if kept else set()
    if missing or steps != sorted(kept):
        logger.warning(
            f"{path} should have each step up to {step} once and in order: {len(missing)} are "
            f"missing, {len(steps) - len(kept)} are there twice; it is put in order"
        )
    return [kept[found] for found in sorted(kept)]


def _step_of_line(line: bytes) -> int | None:
    """The step that a line of metrics.jsonl is of; None when it is none that a run wrote."""
    try:
        entry = json.loads(line.decode())  # other encodings than UTF-8 would be guessed
        step, loss = entry["step"], entry["train/loss"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    whole = type(step) is int and step >= 1  # True is an int too
    return step if whole and isinstance(loss, float) and abs(loss) <= MOST_LOSS else None


class Console:
    """A progress bar on a terminal, otherwise one aligned line in each interval."""

    def __init__(self, *, done: int, total: int, every: int) -> None:
        self._total, self._every = total, every
        self._begin, self._first = time.monotonic(), done
        # without a terminal it is disabled
        self._bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True, disable=None)

    def step(self, values: dict[str, float]) -> None:
        """Show the metrics of a step."""
        step, total, loss = int(values["step"]), self._total, values["train/loss"]
        speed = f"{values['perf/tokens_per_s']:,.0f}"
        if not self._bar.disable:
            self._bar.update()
            self._bar.set_postfix_str(f"loss {loss:.3f}, {speed} tokens/s")
        elif step % self._every == 0 or step == total:
            elapsed = time.monotonic() - self._begin
            left = elapsed / max(1, step - self._first) * (total - step)
            logger.info(
                f"step {step:{len(str(total))}}/{total}  loss {loss:7.4f}  lr "
                f"{values['optim/lr']:.2e}  {speed:>8} tokens/s  {format_seconds(left)} left"
            )

    def say(self, text: str) -> None:
        """A line that does not disturb the bar."""
        if self._bar.disable:
            logger.info(text)
        else:
            self._bar.write(shown(text, sys.stderr), file=sys.stderr)

    def close(self) -> None:
        """Finish the bar."""
        self._bar.close()


def format_seconds(seconds: float) -> str:
    """65 -> "1:05", 3700 -> "1:01:40"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
