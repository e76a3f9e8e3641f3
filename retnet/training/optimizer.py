"""AdamW with weight decay on matrices only, and the learning rate as a function of the step."""

import math

import torch
from torch import nn

from retnet.model.mixers.base import Part
from retnet.training.spec import TrainSpec


def build_optimizer(model: nn.Module, spec: TrainSpec) -> torch.optim.AdamW:
    """AdamW over two groups: vectors, and what a mixer says is no matrix, are not decayed."""
    parts = [part for part in model.modules() if isinstance(part, Part)]
    others = {id(getattr(part, name)) for part in parts for name in part.no_matrices}
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in (p for p in model.parameters() if p.requires_grad):
        decayed = parameter.dim() >= 2 and id(parameter) not in others
        (matrices if decayed else vectors).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": spec.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    betas = spec.beta1, spec.beta2
    return torch.optim.AdamW(groups, spec.learning_rate, betas, fused=spec.fused_optimizer)


def learning_rate(step: int, spec: TrainSpec) -> float:
    """The learning rate of optimizer step 1, 2, ..., max_steps."""
    if step <= spec.warmup_steps:
        return spec.learning_rate * step / spec.warmup_steps
    if spec.schedule == "constant":
        return spec.learning_rate
    progress = (step - spec.warmup_steps) / max(1, spec.max_steps - spec.warmup_steps)
    shape = 1 - progress if spec.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    floor = spec.final_learning_rate
    return spec.learning_rate * (floor + (1 - floor) * shape)
