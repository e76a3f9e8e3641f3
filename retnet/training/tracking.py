"""Where a run's numbers go: metrics.jsonl and the console always, other trackers when asked for.

metrics.jsonl has one line for each optimizer step, in order; an evaluation's figures stand in the
line of its step. Nothing here prompts or waits for a network.
"""

import errno
import importlib.util
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from retnet.errors import UserError
from retnet.training.checkpoint import replace_text
from retnet.training.config import Config, flatten

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
NETWORK_WAIT_S = 20  # for wandb, where WANDB_MODE asks for the network


class MetricsFile:
    """The run's metrics.jsonl, opened to go on after ``step`` completed steps.

    Attributes:
        losses: Training losses of the steps that are in the file already.
    """

    def __init__(self, run: Path, step: int) -> None:
        self.path = run / METRICS
        kept = list(_lines_until(self.path, step))
        self.losses = [json.loads(line)["train/loss"] for line in kept]
        replace_text(self.path, "".join(line + "\n" for line in kept))
        self._file = self.path.open("ab", buffering=0)

    def write(self, values: dict[str, Any]) -> None:
        """Append one step.

        Raises:
            OSError: The line is not in the file, because the disk is full or the file is gone.
        """
        line = json.dumps(values).encode() + b"\n"
        if self._file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.path.stat()  # what is written into a removed file is lost

    def sync(self) -> None:
        """Have all lines on disk, before a checkpoint that counts on them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _lines_until(path: Path, step: int) -> Iterator[str]:
    """The lines of the steps up to ``step``; a damaged one is left out with a warning."""
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            if entry["step"] > step:
                return  # that step comes again
            float(entry["train/loss"])
        except (ValueError, KeyError, TypeError):
            if number < len(lines):  # the last has no end: an interruption cut it off
                logger.warning("%s line %d can't be read and is left out", path, number)
        else:
            yield line.decode()


class Console:
    """A progress bar on a terminal, otherwise one aligned line in each interval."""

    def __init__(self, *, done: int, total: int, every: int) -> None:
        self._total, self._every = total, every
        self._begin, self._first = time.monotonic(), done
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)

    def step(self, step: int, loss: float, rate: float, speed: float) -> None:
        """Show a step: training loss (nats/token), learning rate, tokens/s."""
        if self._bar is not None:
            self._bar.update()
            self._bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s")
        elif step % self._every == 0 or step == self._total:
            elapsed = time.monotonic() - self._begin
            left = elapsed / max(1, step - self._first) * (self._total - step)
            logger.info(
                "step %*d/%d  loss %7.4f  lr %.2e  %8s tokens/s  %s left",
                len(str(self._total)),
                step,
                self._total,
                loss,
                rate,
                f"{speed:,.0f}",
                format_seconds(left),
            )

    def say(self, text: str) -> None:
        """A line that does not disturb the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            logger.info("%s", text)

    def close(self) -> None:
        """Finish the bar."""
        if self._bar is not None:
            self._bar.close()


def format_seconds(seconds: float) -> str:
    """65 -> "1:05", 3700 -> "1:01:40"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def check_trackers(config: Config) -> None:
    """Raise a ``UserError`` when a tracker of ``train.trackers`` can't be had; never prompts."""
    for tracker in config.train.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise UserError(f"train.trackers ({tracker}) is not installed: pip install {tracker}")
    mode = _wandb_mode()
    if "wandb" in config.train.trackers and mode not in ("offline", "disabled"):
        import wandb

        if not wandb.login(prompt=False, verify=False):
            raise UserError(
                f"WANDB_MODE ({mode}) needs an account for train.trackers (wandb): run wandb "
                "login, or unset it to write the run to files"
            )


def start_trackers(accelerator: Accelerator, config: Config) -> None:
    """Start the trackers of ``train.trackers``; they write into the run folder.

    wandb is offline unless the environment variable WANDB_MODE says otherwise: a run neither
    needs an account nor waits for a network.

    Raises:
        UserError: One of them can't be started.
    """
    if not config.train.trackers:
        return
    run = Path(str(config.train.out_dir))
    mode = _wandb_mode()
    wandb: dict[str, Any] = {"mode": mode, "dir": str(run), "name": run.name}
    if mode not in ("offline", "disabled"):
        wandb["settings"] = {"init_timeout": NETWORK_WAIT_S}
    try:
        accelerator.init_trackers(
            "retnet",
            config={
                k: str(v) if isinstance(v, list) else v
                for k, v in flatten(config).items()
                if v is not None
            },
            init_kwargs={"wandb": wandb},
        )
    except Exception as error:  # each library has its own kinds
        accelerator.trackers.clear()  # half started, they can't be ended either
        raise UserError(
            f"train.trackers ({', '.join(config.train.trackers)}) can't be started "
            f"({str(error) or type(error).__name__}): leave them out, or look at {run} and, for "
            f"wandb, at WANDB_MODE ({mode})"
        ) from error
    if "wandb" in config.train.trackers and mode == "offline":
        logger.info("wandb is offline; to upload the run later: wandb sync %s/wandb/*run-*", run)


def end_training(accelerator: Accelerator) -> None:
    """Close trackers and process group; a tracker that can't be closed does not hide an error."""
    try:
        accelerator.end_training()
    except OSError as error:
        logger.warning("train.trackers can't be closed (%s)", error.strerror or error)


def _wandb_mode() -> str:
    return os.environ.get("WANDB_MODE", "offline")
