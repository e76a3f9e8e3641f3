"""Going on from a checkpoint: its weights and moments, put back where they came from."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from retnet.checkpoints.format import (
    CHECKPOINTS,
    COPY_AGAIN,
    OPTIMIZER,
    TRAINING_STATE,
    WEIGHTS,
    Progress,
)
from retnet.checkpoints.match import TAKE_OVER, check_same_model
from retnet.checkpoints.save import flatten_moments
from retnet.checkpoints.weights import read_weights
from retnet.errors import UserError
from retnet.files import read_json


def load_checkpoint_state(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Progress:
    """Put a checkpoint's weights and moments into model and optimizer.

    Raises:
        UserError: The folder is no checkpoint to go on from.
    """
    for name in (WEIGHTS, OPTIMIZER, TRAINING_STATE):
        if not (folder / name).is_file():
            raise UserError(
                f"checkpoint ({folder}) has no {name}: go on from one in {CHECKPOINTS}/, or use "
                "its weights alone with model.init_from"
            )
    weights: dict[str, Any] = dict(read_weights(folder, tied=True))
    what, fix = f"checkpoint ({folder})", TAKE_OVER
    own: Any = get_model_state_dict(model)
    check_same_model(own, weights, what, fix)
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, weights, options=options)
    moments: Any = get_optimizer_state_dict(model, optimizer, options=options)
    stored = load_file(folder / OPTIMIZER)
    check_same_model(flatten_moments(moments), stored, what, fix)  # tied weights have one
    for name, values in moments["state"].items():
        for key in values:
            values[key] = stored[f"{name}/{key}"]
    set_optimizer_state_dict(model, optimizer, moments, options=options)
    return Progress(**read_json(folder / TRAINING_STATE, COPY_AGAIN))
