"""AdamW with weight decay on matrices only, and the learning rate as a function of the step."""

import math

import torch
from torch import nn

from retnet.model.mixers.base import Part
from retnet.training.config import TrainSpec


def build_optimizer(model: nn.Module, spec: TrainSpec) -> torch.optim.AdamW:
    """AdamW over two groups: matrices are decayed, vectors (norms) are not.

    Nor is what a mixer says is no matrix.
    """
    parts = [part for part in model.modules() if isinstance(part, Part)]
    others = {id(getattr(part, name)) for part in parts for name in part.no_matrices}
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.dim() >= 2 and id(p) not in others]
    decayed = {id(p) for p in matrices}
    groups = [
        {"params": matrices, "weight_decay": spec.weight_decay},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=spec.learning_rate,
        betas=(spec.beta1, spec.beta2),
        fused=spec.fused_optimizer,
    )


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
