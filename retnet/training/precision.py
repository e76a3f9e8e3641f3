"""In which numbers a run computes: decided where it begins, and kept when it goes on."""

import functools
import logging
import os
import time
from dataclasses import replace
from typing import Any

import torch

from retnet.checkpoints.format import TRAINING_STATE
from retnet.errors import UserError
from retnet.files import read_json
from retnet.machine import computes_in_bfloat16
from retnet.paths import expand
from retnet.training.config import load_config
from retnet.training.processes import asked_precision, runs_on_cpu
from retnet.training.run_folder import CONFIG
from retnet.training.spec import Config, TrainSpec

logger = logging.getLogger(__name__)

TOO_SLOW = 1.5  # times float32's seconds, above which bfloat16 is not taken
ROUNDS = 8  # of the timing, the first of which warms up
PAUSE = 0.1  # seconds before a second look


def settled_precision(config: Config, *, for_all: bool = False) -> Config:
    """The configuration with fp32 or bf16 in the place of auto.

    A run that is gone on with keeps its own, whatever this machine would choose; unless it must be
    that of all runs of an experiment (``for_all``).
    """
    train = config.train
    if train.precision != "auto":
        return config
    chosen: Any = asked_precision() or (None if for_all else _recorded(train)) or _fastest(train)
    return replace(config, train=replace(train, precision=chosen))


def precision_before_it_was_recorded(train: TrainSpec) -> str:
    """What "auto" in a run's own config.yaml meant: bf16 on GPUs alone."""
    on_gpu = not runs_on_cpu(train) and torch.cuda.is_bf16_supported()
    return "bf16" if on_gpu else "fp32"


def _recorded(train: TrainSpec) -> str | None:
    """That of the run to go on with; None where there is none, or none to be read.

    What is wrong with it is said where the run is looked at.
    """
    if train.resume == "never":
        return None
    try:
        if train.resume == "auto":
            file = train.run_folder / CONFIG
            if not file.is_file():
                return None
            found = load_config(file, recorded=True).train.precision
        else:
            file = expand(train.resume, "train.resume") / TRAINING_STATE
            found = read_json(file, "").get("precision") or "auto"
    except (UserError, OSError):
        return None
    if found not in ("auto", "fp32", "bf16"):
        return None
    return precision_before_it_was_recorded(train) if found == "auto" else str(found)


def _fastest(train: TrainSpec) -> str:
    """bf16 where the device says that it computes in it, and a CPU is not slower for it."""
    if not runs_on_cpu(train):
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    if not computes_in_bfloat16():
        return "fp32"
    if os.environ.get("WORLD_SIZE", "1") != "1":  # processes must not find different answers
        return "bf16"
    return "fp32" if _bfloat16_is_slow() else "bf16"


@functools.cache
def _bfloat16_is_slow() -> bool:
    ratio = _times_as_long()
    if ratio > TOO_SLOW:  # or something else was busy: look again
        time.sleep(PAUSE)
        ratio = min(ratio, _times_as_long())
    slow = ratio > TOO_SLOW
    if slow:
        logger.info(f"train.precision (auto): fp32, as bfloat16 takes {ratio:.1f} times as long")
    return slow


def _times_as_long() -> float:
    """What bfloat16 takes, in units of float32's time, for a product of small models' size.

    The best of a few each, in turn, so that a busy moment of the machine is both's.
    """
    operands = [torch.ones(512, 512, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    seconds: list[list[float]] = [[], []]
    for _ in range(ROUNDS):
        for x, own in zip(operands, seconds, strict=True):
            began = time.perf_counter()
            x @ x
            own.append(time.perf_counter() - began)
    narrow, wide = map(min, seconds)
    return narrow / wide
