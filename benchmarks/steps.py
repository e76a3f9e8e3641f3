"""A whole training step: forward and backward pass in both precisions, and the optimizers."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.contenders import Contender, Field, Ours, make_retnet, make_transformer
from benchmarks.limits import linear_products
from benchmarks.measure import LIMIT, STEPS, Piece, Plan, Results, measure
from benchmarks.training import passes
from retnet.training.muon import Muon, parameters_of_muon
from retnet.training.optimizer import build_optimizer
from retnet.training.spec import TrainSpec

NARROW = ", bfloat16"
PASSES, UPDATES = "forward and backward pass, one row of {} tokens", "an optimizer's step, {}"
ADAMW, MUON = "AdamW", "Muon with AdamW for the rest"
MATRICES, TORCHS = "Muon, matrices alone", "torch.optim.Muon, matrices alone"


class Autocast(Contender):
    """A contender's loss with products in bfloat16, as under ``train.precision=bf16``."""

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(ids.device.type, dtype=torch.bfloat16):
            return super().loss(ids, targets)


class Narrow(Autocast, Ours):
    """One of ours."""


def steps(plan: Plan, results: Results) -> None:
    """RetNet and Transformer in both precisions, and what updates their weights."""
    field = Field(plan.device, torch.float32)
    for name, model in (
        ("RetNet", make_retnet(plan.size)),
        ("Transformer", make_transformer(plan.size)),
    ):
        field.add(Ours(name, model))
        field.add(Narrow(name + NARROW, model))
    results.note_field(plan.size, field)
    case, tokens = PASSES.format(plan.train_short), plan.train_short
    limits = [
        Piece(case, LIMIT + name, tokens, linear_products(field.contenders[0].model, tokens, dtype))
        for name, dtype in (("", torch.float32), (NARROW, torch.bfloat16))
    ]
    pieces = [*passes(field.contenders, 1, tokens, plan, case), *limits]
    measure(STEPS, pieces, plan, results)
    for one in field.contenders[::2]:
        measure(STEPS, _updates(one, plan), plan, results)


def _updates(one: Contender, plan: Plan) -> list[Piece]:
    """The optimizers of a model with gradients, each ``tokens`` a parameter."""
    for parameter in one.model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    adamw = build_optimizer(one.model, TrainSpec(learning_rate=1e-6))
    both = build_optimizer(one.model, TrainSpec(optimizer="muon", learning_rate=1e-6))
    matrices = parameters_of_muon(both)
    own = {"params": matrices, "muon": True, "weight_decay": 0.05}
    works = {
        ADAMW: adamw,
        MUON: both,
        MATRICES: Muon([own], lr=1e-6),
        TORCHS: torch.optim.Muon(matrices, lr=1e-6, adjust_lr_fn="match_rms_adamw"),
    }

    def prepare(optimizer: torch.optim.Optimizer) -> Callable[[], Callable[[], object]]:
        return lambda: optimizer.step

    case = UPDATES.format(one.name)
    return [Piece(case, name, one.num_parameters, prepare(work)) for name, work in works.items()]
