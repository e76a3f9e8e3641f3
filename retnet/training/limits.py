"""Sizes that this machine can't hold, found before anything is built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from retnet.errors import UserError
from retnet.machine import memory_of

if TYPE_CHECKING:
    from retnet.training.config import Config

INT64 = 2**63 - 1
MOST = {
    "model.num_hidden_layers": 10_000,
    "train.gradient_accumulation_steps": 1_000_000,
}
BYTES_IN_TRAINING = 16  # of a parameter in float32: itself, its gradient, AdamW's two moments
CPU = torch.device("cpu")


def beyond_bounds(config: Config) -> Iterator[str]:
    """The problems of whole numbers that no machine could do, each with key, value and fix."""
    for section in ("model", "data", "train"):
        for key, value in vars(getattr(config, section)).items():
            most = MOST.get(f"{section}.{key}", INT64)
            if isinstance(value, int) and value > most:
                yield f"{section}.{key} ({value}) must be at most {most}"


def check_run_fits(config: Config) -> None:
    """Raise a ``UserError`` when this machine has less than the least memory that the run takes."""
    model, rows, length = config.model, config.train.batch_size, config.data.seq_len
    on_cpu = config.train.device == "cpu" or not torch.cuda.is_available()
    memory = memory_of(CPU)  # where every model is built
    weights = (BYTES_IN_TRAINING if on_cpu else 4) * _least_parameters(config)
    if memory is not None and weights > memory:
        named = "intermediate_size", "hidden_size", "num_hidden_layers"
        values = [f"model.{key} ({value})" for key in named if (value := getattr(model, key))]
        raise UserError(
            f"{', '.join(values)} need at least {weights:,} bytes for the parameters, and this "
            f"machine has {memory:,}: make the model smaller"
        )
    # every block's input is kept for the backward pass, in bfloat16 at least
    activations = 2 * rows * length * model.hidden_size * model.num_hidden_layers
    memory = memory if on_cpu else memory_of(torch.device("cuda", torch.cuda.current_device()))
    if memory is not None and activations > memory:
        raise UserError(
            f"train.batch_size ({rows}) rows of data.seq_len ({length}) tokens need at least "
            f"{activations:,} bytes, and there are {memory:,}: make them smaller; "
            "train.gradient_accumulation_steps gives larger batches in the same memory"
        )


def _least_parameters(config: Config) -> int:
    """Matrix parameters of the blocks, not counting what depends on the mixer."""
    model = config.model
    width, inner = model.hidden_size, model.intermediate_size
    block = 12 * width**2 if inner is None else 2 * width * (width + inner)
    return model.num_hidden_layers * block
