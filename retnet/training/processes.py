"""Device, processes and precision of a run, and what the environment says of them.

``accelerate launch`` hands its options on as variables of the environment. Each of them is followed
or refused: ACCELERATE_MIXED_PRECISION and ACCELERATE_USE_CPU where train.precision and train.device
leave it open, DEBUG_MODE, CPU_AFFINITY, TORCH_DEVICE and FSDP by accelerate itself.
"""

import os

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, str_to_bool

from retnet.errors import UserError
from retnet.training.spec import TrainSpec

LAUNCHED_WITH = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # beside WORLD_SIZE
# how the libraries take the number of processes from mpirun
MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# of variables that decide on the processes; all of them are shown when that fails
NAMES = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "FORK_LAUNCHED", *LAUNCHED_WITH)
PREFIXES = ("ACCELERATE_", "FSDP_", "PMI_", "OMPI_COMM_", "MV2_COMM_", "MPI_LOCAL")
MIXED_PRECISION = "ACCELERATE_MIXED_PRECISION"
PRECISIONS = {"bf16": "bf16", "no": None}  # "no" is also what stands there when nothing was asked
USE_CPU = "ACCELERATE_USE_CPU"
# what accelerate can do and this program not, and what to do instead
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "use several processes with torchrun, or FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "use several processes with torchrun, or FSDP",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "use several processes with torchrun, or FSDP",
    "ACCELERATE_USE_SAGEMAKER": "use several processes with torchrun, or FSDP",
    "ACCELERATE_GRADIENT_CLIPPING": "set train.grad_clip",
    "ACCELERATE_DYNAMO_BACKEND": "set train.compile=true",
}


def build_accelerator(spec: TrainSpec) -> Accelerator:
    """Device, processes and precision, of a spec that says fp32 or bf16 (``precision.py``).

    A ``UserError`` where they are not to be had.
    """
    if spec.device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device (cuda) is not available here: use auto or cpu")
    _check_environment(spec)
    cpu = runs_on_cpu(spec)
    world_size = _world_size()
    # an earlier run of this process may have had another precision, or another device
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    try:
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision="bf16" if spec.precision == "bf16" else "no",
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
    device, wanted = accelerator.device, "cpu" if cpu else "cuda"
    if device.type != wanted:
        AcceleratorState._reset_state(reset_partial_state=True)
        raise UserError(
            f"ACCELERATE_TORCH_DEVICE ({device}) is not train.device ({spec.device}), which is "
            f"{wanted} here: unset it"
        )
    return accelerator


def runs_on_cpu(spec: TrainSpec) -> bool:
    """Whether the run's device is the CPU."""
    return spec.device == "cpu" or not torch.cuda.is_available() or _is_on(USE_CPU)


def asked_precision() -> str | None:
    """What ``accelerate launch --mixed_precision`` asks for; None where it leaves it open."""
    return PRECISIONS.get(os.environ.get(MIXED_PRECISION, "no").lower())


def _check_environment(spec: TrainSpec) -> None:
    """Raise a ``UserError`` for what ``accelerate launch`` asks and this run would not follow."""
    precision = os.environ.get(MIXED_PRECISION, "no").lower()
    if precision not in PRECISIONS:
        raise UserError(f"{MIXED_PRECISION} ({precision}) is not possible: use bf16 or no")
    if PRECISIONS[precision] not in (None, spec.precision):
        raise UserError(
            f"{MIXED_PRECISION} ({precision}) contradicts train.precision ({spec.precision}): "
            "leave one of them out"
        )
    if _is_on(USE_CPU) and spec.device == "cuda":
        raise UserError(
            f"{USE_CPU} ({os.environ[USE_CPU]}) contradicts train.device (cuda): leave one of them "
            "out"
        )
    for key, off in (("optimizer", "adamw"), ("lora_rank", 0)):
        if _is_on("ACCELERATE_USE_FSDP") and getattr(spec, key) != off:
            raise UserError(
                f"train.{key} ({getattr(spec, key)}) needs whole matrices, and ACCELERATE_USE_FSDP "
                f"(true) divides them: use torchrun alone, or train.{key}={off}"
            )
    if _is_on("ACCELERATE_USE_FSDP") and (spec.device == "cpu" or not torch.cuda.is_available()):
        raise UserError("ACCELERATE_USE_FSDP (true) needs a GPU: unset it, or use torchrun alone")
    for name, instead in REFUSED.items():
        value = os.environ.get(name, "no")
        if value.lower() not in ("no", "none", "false", "0", ""):
            raise UserError(f"{name} ({value}) is not possible here: unset it, and {instead}")
    name, steps = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", spec.gradient_accumulation_steps
    if os.environ.get(name, str(steps)) != str(steps):
        raise UserError(
            f"{name} ({os.environ[name]}) is not train.gradient_accumulation_steps ({steps}): "
            "unset it, and set that key"
        )


def _is_on(name: str) -> bool:
    """Whether a variable says yes; what is neither yes nor no is left to accelerate to report."""
    try:
        return bool(str_to_bool(os.environ.get(name, "no").lower()))
    except ValueError:
        return False


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
        if os.environ.get("RANK", "0") != "0":  # such a process says nothing
            raise UserError(
                f"RANK ({os.environ['RANK']}) is set, but WORLD_SIZE not: unset it, or start "
                "several processes with torchrun, which sets both"
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
