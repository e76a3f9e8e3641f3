"""The optimizer of a run, and the learning rate as a function of the step."""

import logging
import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from retnet.errors import UserError
from retnet.model.mixers.base import Part
from retnet.training.muon import Muon
from retnet.training.spec import RATES, TrainSpec

logger = logging.getLogger(__name__)


def settled_optimizer(
    train: TrainSpec, in_file: Mapping[str, Any], given: Collection[str]
) -> TrainSpec:
    """The section with its learning rates.

    Where only the command line names the optimizer, the file's rate is the other one's.

    Args:
        in_file: The values of the recipe, by ``section.key``.
        given: Keys of the command line.

    Raises:
        UserError: A key of the command line has no effect.
    """
    rate, rest = train.learning_rate, train.adamw_learning_rate
    names = ("optimizer", "learning_rate", "adamw_learning_rate")
    keys = {name: in_file[key] for name in names if (key := f"train.{name}") in in_file}
    before = replace(TrainSpec(), **keys)
    if train.optimizer != before.optimizer and "train.learning_rate" not in given:
        rate = before.adamw_peak if train.optimizer == "adamw" else RATES["muon"]
        logger.info(
            f"train.learning_rate ({before.peak:g}) is that of {before.optimizer}: with "
            f"{train.optimizer} it is {rate:g}"
        )
    if train.optimizer == "adamw" and rest is not None:
        if "train.adamw_learning_rate" in given:
            raise UserError(
                f"train.adamw_learning_rate ({rest}) has no meaning with train.optimizer=adamw: "
                "set train.learning_rate"
            )
        rest = None
    if train.schedule != "wsd" and "train.decay_fraction" in given:
        raise UserError(
            f"train.decay_fraction ({train.decay_fraction}) has no meaning with "
            f"train.schedule={train.schedule}: leave it out, or set train.schedule=wsd"
        )
    if train.schedule == "constant" and "train.final_learning_rate" in given:
        raise UserError(
            f"train.final_learning_rate ({train.final_learning_rate}) has no meaning with "
            "train.schedule=constant: leave it out, or set another schedule"
        )
    train = replace(train, learning_rate=rate, adamw_learning_rate=rest)
    rest = train.adamw_peak if train.optimizer == "muon" else None
    return replace(train, learning_rate=train.peak, adamw_learning_rate=rest)


def build_optimizer(model: nn.Module, spec: TrainSpec) -> torch.optim.Optimizer:
    """AdamW, or Muon with it for what is no matrix of a block.

    Vectors, and what a mixer says is no matrix, are not decayed. Groups have a ``share`` of
    ``learning_rate``.
    """
    parts = [part for part in model.modules() if isinstance(part, Part)]
    others = {id(getattr(part, name)) for part in parts for name in part.no_matrices}
    layers = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    inside = {id(p) for module in layers for p in module.parameters()}
    blocks: list[nn.Parameter] = []  # matrices of them
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in (p for p in model.parameters() if p.requires_grad):
        if parameter.dim() < 2 or id(parameter) in others:
            vectors.append(parameter)
        elif spec.optimizer == "muon" and id(parameter) in inside and parameter.dim() == 2:
            blocks.append(parameter)
        else:
            matrices.append(parameter)
    share = spec.adamw_peak / spec.peak
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": spec.weight_decay, "share": share},
        {"params": vectors, "weight_decay": 0.0, "share": share},
    ]
    adamw: dict[str, Any] = {
        "lr": spec.peak,
        "betas": (spec.beta1, spec.beta2),
        "fused": spec.fused_optimizer,
    }
    if spec.optimizer == "adamw":
        return torch.optim.AdamW(groups, **adamw)
    own = {"params": blocks, "weight_decay": spec.weight_decay, "share": 1.0, "muon": True}
    return Muon([own, *groups], **adamw)


def learning_rate(step: int, spec: TrainSpec) -> float:
    """The learning rate of optimizer step 1, 2, ..., max_steps."""
    peak, floor = spec.peak, spec.final_learning_rate
    if step <= spec.warmup_steps:
        return peak * step / spec.warmup_steps
    if spec.schedule == "constant":
        return peak
    falling = spec.max_steps - spec.warmup_steps
    if spec.schedule == "wsd":
        falling = min(falling, round(spec.decay_fraction * spec.max_steps))
    progress = max(0, step - (spec.max_steps - falling)) / max(1, falling)
    cosine = spec.schedule == "cosine"
    shape = (1 + math.cos(math.pi * progress)) / 2 if cosine else 1 - progress
    return peak * (floor + (1 - floor) * shape)
