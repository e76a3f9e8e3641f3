"""Device, processes and precision of a run, and what the environment says of them."""

import os
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin

from retnet.errors import UserError
from retnet.training.config import TrainSpec

LAUNCHED_WITH = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # beside WORLD_SIZE
# how the libraries take the number of processes from mpirun
MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
PREFIXES = ("ACCELERATE_", "FSDP_", "PMI_", "OMPI_COMM_", "MV2_COMM_", "MPI_LOCAL")


def build_accelerator(spec: TrainSpec) -> Accelerator:
    """Device, processes and precision.

    Raises:
        UserError: They are not to be had here.
    """
    cuda = torch.cuda.is_available()
    if spec.device == "cuda" and not cuda:
        raise UserError("train.device (cuda) is not available here: use auto or cpu")
    cpu = spec.device == "cpu" or not cuda
    precision = spec.precision
    if precision == "auto":
        precision = "bf16" if not cpu and torch.cuda.is_bf16_supported() else "fp32"
    world_size = _world_size()
    AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
    try:
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision="bf16" if precision == "bf16" else "no",
            log_with=list(spec.trackers) or None,
            project_dir=spec.out_dir,
            # ACCELERATE_GRADIENT_ACCUMULATION_STEPS divides the loss where the plugin is left out
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        )
    except Exception as error:  # each library has its own kinds
        AcceleratorState._reset_state(reset_partial_state=True)  # it is half set up
        names = ", ".join(_launch_variables()) or "none is set"
        raise UserError(
            f"the processes can't be set up ({str(error) or type(error).__name__}): look at the "
            f"environment variables that say how ({names}), and unset those you did not mean"
        ) from error
    if accelerator.num_processes != world_size:
        raise UserError(
            f"WORLD_SIZE ({world_size}) is set, but accelerate runs {accelerator.num_processes} "
            "process: start several processes with torchrun"
        )
    return accelerator


def _launch_variables() -> Iterator[str]:
    """NAME=value of what is set in the environment and decides on the processes."""
    exact = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "FORK_LAUNCHED", *LAUNCHED_WITH)
    for name, value in sorted(os.environ.items()):
        if name in exact or name.startswith(PREFIXES):
            yield f"{name}={value}"


def _world_size() -> int:
    """The number of processes that the environment speaks of, as torchrun sets it.

    Raises:
        UserError: It can't be had; libraries would end in a traceback or wait for the others.
    """
    size = _number("WORLD_SIZE", least=1, default=1)
    missing = [name for name in LAUNCHED_WITH if name not in os.environ]
    if size > 1 and missing:
        raise UserError(
            f"WORLD_SIZE ({size}) is set, but {', '.join(missing)} not: unset it, or start several "
            "processes with torchrun, which sets them all"
        )
    for name in MPI_SIZES:
        if "WORLD_SIZE" not in os.environ and os.environ.get(name, "1") != "1":
            raise UserError(
                f"{name} ({os.environ[name]}) is set, but WORLD_SIZE not: unset it, or start "
                "several processes with torchrun instead of mpirun"
            )
    for name in ("RANK", "LOCAL_RANK") if "WORLD_SIZE" in os.environ else ():
        rank = _number(name, least=0, default=0)
        if rank >= size:
            raise UserError(
                f"{name} ({rank}) must be below WORLD_SIZE ({size}): unset them, or start several "
                "processes with torchrun, which sets them all"
            )
    return size


def _number(name: str, *, least: int, default: int) -> int:
    """An environment variable that torchrun sets."""
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdecimal()) or int(text) < least:
        raise UserError(
            f"{name} ({text}) must be a whole number of at least {least}: unset it, or start "
            "several processes with torchrun, which sets it"
        )
    return int(text)
