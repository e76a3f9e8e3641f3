"""Whether a checkpoint's weights are those of a model: by name and shape, and by what they mean."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from retnet.checkpoints.format import CONFIG, COPY_AGAIN
from retnet.checkpoints.weights import NUMBERS
from retnet.errors import UserError
from retnet.files import read_json

TAKE_OVER = "take over the model section of its run's config.yaml"  # where they are not


def check_same_model(
    own: Mapping[str, Tensor], stored: Mapping[str, Tensor], what: str, fix: str
) -> None:
    """Raise a ``UserError`` when the names or shapes of two models' weights differ, or their kind.

    Numbers of any precision are of one kind, integers and others of none. The message begins with
    ``what``, the checkpoint, and ends with ``fix``.
    """
    for name in sorted(own.keys() | stored.keys()):
        here = tuple(own[name].shape) if name in own else "absent"
        there = tuple(stored[name].shape) if name in stored else "absent"
        if here != there:
            raise UserError(
                f"{what} is another model: {name} is {there} there and {here} here; {fix}"
            )
        if not stored[name].is_floating_point():
            raise UserError(f"{what} is no model: {name} is of {stored[name].dtype}; {COPY_AGAIN}")


def check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise a ``UserError`` when numbers of a checkpoint's are none; it begins with ``what``.

    Training is in float32, beyond whose range those of float64 are none either. Nor are those of
    types in which nothing is computed.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype not in NUMBERS:
            raise UserError(
                f"{what} has numbers of type {tensor.dtype} ({name}), in which nothing is computed "
                "here: save them as floating-point numbers of 16 bits or more"
            )
        narrow = tensor.float() if tensor.dtype == torch.float64 else tensor
        if not narrow.isfinite().all():
            raise UserError(
                f"{what} has values that are not finite ({name}), of a run that diverged or "
                "damaged: take another checkpoint"
            )


def check_same_meaning(model: PreTrainedModel, folder: Path, what: str, fix: str) -> None:
    """Raise a ``UserError`` when a checkpoint's weights, of the same shapes, are for another model.

    The message is like that of ``check_same_model``.
    """
    stored = read_json(folder / CONFIG, COPY_AGAIN)
    own = model.config.to_dict()
    options = fields(model.config)
    for key in (option.name for option in options if option.metadata.get("meaning")):
        if key in own and key in stored and own[key] != stored[key]:
            raise UserError(
                f"{what} is another model: model.{key} is {stored[key]} there and {own[key]} here; "
                f"{fix}"
            )
