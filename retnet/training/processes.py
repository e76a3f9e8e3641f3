"""Device, processes and precision of a run, and what the environment says of them."""

import os

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin

from retnet.errors import UserError
from retnet.training.spec import TrainSpec

LAUNCHED_WITH = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # beside WORLD_SIZE
# how the libraries take the number of processes from mpirun
MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# of variables that decide on the processes; all of them are shown when that fails
NAMES = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "FORK_LAUNCHED", *LAUNCHED_WITH)
PREFIXES = ("ACCELERATE_", "FSDP_", "PMI_", "OMPI_COMM_", "MV2_COMM_", "MPI_LOCAL")


def build_accelerator(spec: TrainSpec) -> Accelerator:
    """Device, processes and precision; a ``UserError`` where they are not to be had."""
    cuda = torch.cuda.is_available()
    if spec.device == "cuda" and not cuda:
        raise UserError("train.device (cuda) is not available here: use auto or cpu")
    cpu = spec.device == "cpu" or not cuda
    bf16 = spec.precision == "bf16"
    if spec.precision == "auto":
        bf16 = not cpu and torch.cuda.is_bf16_supported()
    world_size = _world_size()
    AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
    try:
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision="bf16" if bf16 else "no",
            log_with=list(spec.trackers) or None,
            project_dir=str(spec.run_folder),
            # ACCELERATE_GRADIENT_ACCUMULATION_STEPS divides the loss where the plugin is left out
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        )
    except Exception as error:  # each library has its own kinds
        AcceleratorState._reset_state(reset_partial_state=True)  # it is half set up
        named = (name for name in sorted(os.environ) if name in NAMES or name.startswith(PREFIXES))
        shown = ", ".join(f"{name}={os.environ[name]}" for name in named) or "none is set"
        raise UserError(
            f"the processes can't be set up ({str(error) or type(error).__name__}): look at the "
            f"environment variables that say how ({shown}), and unset those you did not mean"
        ) from error
    if accelerator.num_processes != world_size:
        raise UserError(
            f"WORLD_SIZE ({world_size}) is set, but accelerate runs {accelerator.num_processes} "
            "process: start several processes with torchrun"
        )
    return accelerator


def _world_size() -> int:
    """The number of processes that the environment speaks of, as torchrun sets it.

    Where it can't be had, libraries would end in a traceback or wait for the others.
    """
    if "WORLD_SIZE" not in os.environ:
        for name in MPI_SIZES:
            if os.environ.get(name, "1") != "1":
                raise UserError(
                    f"{name} ({os.environ[name]}) is set, but WORLD_SIZE not: unset it, or start "
                    "several processes with torchrun instead of mpirun"
                )
        return 1
    size = _number("WORLD_SIZE", least=1)
    missing = [name for name in LAUNCHED_WITH if name not in os.environ]
    if size > 1 and missing:
        raise UserError(
            f"WORLD_SIZE ({size}) is set, but {', '.join(missing)} not: unset it, or start several "
            "processes with torchrun, which sets them all"
        )
    for name in ("RANK", "LOCAL_RANK"):
        if name in os.environ and (rank := _number(name, least=0)) >= size:
            raise UserError(
                f"{name} ({rank}) must be below WORLD_SIZE ({size}): unset them, or start several "
                "processes with torchrun, which sets them all"
            )
    return size


def _number(name: str, *, least: int) -> int:
    """The value of an environment variable that torchrun sets."""
    text = os.environ[name]
    if not (text.isascii() and text.isdecimal()) or int(text) < least:
        raise UserError(
            f"{name} ({text}) must be a whole number of at least {least}: unset it, or start "
            "several processes with torchrun, which sets it"
        )
    return int(text)
