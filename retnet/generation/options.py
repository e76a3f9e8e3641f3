"""The command-line options that say how checkpoints are loaded, shared by the entry points."""

import argparse
import warnings
from typing import Any

import torch

from retnet.checkpoints.quantised import AS_SAVED, CHOICES
from retnet.errors import UserError

DTYPES = ("auto", "float32", "bfloat16", "float64")


def add_loading_options(parser: argparse.ArgumentParser) -> None:
    """Add --base, --device, --dtype, --weights and --trust-remote-code."""
    add = parser.add_argument
    base = "the model that an adapter of PEFT is for: a folder (the one that the adapter names)"
    add("--base", metavar="CHECKPOINT", help=base)
    add("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1 (auto)")
    dtype = "the type that the model computes in; auto: that of its weights as saved (auto)"
    add("--dtype", default="auto", choices=DTYPES, help=dtype)
    weights = "how the matrices are stored; bf16, int8, int4: less to read for each token and a "
    weights += "little less exact, the model computes in float32 (auto: as saved)"
    add("--weights", default=AS_SAVED, choices=CHOICES, help=weights)
    code = "run model code that lies in the checkpoint's folder; only if you have read it"
    add("--trust-remote-code", action="store_true", help=code)


def loading_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of ``load_checkpoint``; a ``UserError`` for a device there is not."""
    return {
        "device": device_of(arguments.device),
        "dtype": None if arguments.dtype == "auto" else getattr(torch, arguments.dtype),
        "trust_remote_code": arguments.trust_remote_code,
        "base": arguments.base,
        "weights": arguments.weights,
    }


def device_of(name: str) -> torch.device:
    """What --device means; a ``UserError`` for one that there is not."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with warnings.catch_warnings(action="ignore"):  # of names that torch has given up
            device = torch.device(name)
            torch.zeros(1, device=device).tolist()  # meta is a device, and holds no numbers
    except Exception as error:  # each kind of device that is not there has an error of its own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"--device ({name}) cannot be used ({reason}): try --device cpu") from error
    return device
