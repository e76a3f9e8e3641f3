"""Muon for matrices and AdamW for the rest, as one optimizer.

Muon (Jordan 2024) takes the direction of a step from the nearest orthogonal matrix to the momentum
U S V^T, U V^T, which five Newton-Schulz iterations find approximately (its singular values end up
between 0.7 and 1.2). 0.2 sqrt(max(rows, columns)) gives it the root mean square of an AdamW step
(Liu et al. 2025, arXiv 2502.16982). The numbers are ``torch.optim.Muon``'s, which multiplies one
matrix at a time; here those of one shape are multiplied together.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from retnet.machine import computes_in_bfloat16

COEFFICIENTS = 3.4445, -4.7750, 2.0315
ITERATIONS = 5
EPS = 1e-7
MOMENTUM = 0.95


class Muon(torch.optim.Optimizer):
    """Muon for the groups with ``muon=True``, AdamW for the others.

    Groups of Muon take ``lr`` and ``weight_decay`` too; their matrices have one moment each,
    ``momentum_buffer``.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], **adamw: Any) -> None:
        groups = [{"muon": False} | group for group in groups]
        self.adamw = torch.optim.AdamW(groups, **adamw)  # its own groups are given to it at a step
        super().__init__(groups, self.adamw.defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of all parameters that have gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # those of now: loading a state puts new ones in their place
        self.adamw.param_groups = [group for group in self.param_groups if not group["muon"]]
        self.adamw.state = self.state
        self.adamw.step()
        for group in self.param_groups:
            if group["muon"]:
                self._step_matrices(group)
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        matrices = [p for p in group["params"] if p.grad is not None]
        if not matrices:
            return
        grads = [p.grad for p in matrices]
        for p in matrices:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        moments = [self.state[p]["momentum_buffer"] for p in matrices]
        torch._foreach_lerp_(moments, grads, 1 - MOMENTUM)
        updates = torch._foreach_lerp(grads, moments, MOMENTUM)  # Nesterov's
        rate = float(group["lr"])
        torch._foreach_mul_(matrices, 1 - rate * group["weight_decay"])
        for members in _by_shape(updates):
            found = orthogonalize(torch.stack([updates[i] for i in members]))
            size = 0.2 * math.sqrt(max(found.shape[-2:]))
            own = [matrices[i] for i in members]
            torch._foreach_add_(own, [*found.to(own[0].dtype).unbind()], alpha=-rate * size)


def _by_shape(matrices: Sequence[Tensor]) -> list[list[int]]:
    """Numbers of those of one shape."""
    found: dict[torch.Size, list[int]] = {}
    for i, x in enumerate(matrices):
        found.setdefault(x.shape, []).append(i)
    return [*found.values()]


def orthogonalize(x: Tensor) -> Tensor:
    """Of each matrix [n, rows, columns] nearly the nearest orthogonal one, in ``products_dtype``.

    Newton-Schulz: X <- a X + b (X X^T) X + c (X X^T)^2 X.
    """
    a, b, c = COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    x = x.to(products_dtype(x.device))
    x = x.mT if tall else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=EPS)
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def products_dtype(device: torch.device) -> torch.dtype:
    """bfloat16, as torch's, but for a CPU that does not compute in it."""
    has = device.type != "cpu" or computes_in_bfloat16()
    return torch.bfloat16 if has else torch.float32


def parameters_of_muon(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Those that it has in an optimizer; none in one of another kind."""
    return [p for group in optimizer.param_groups if group.get("muon") for p in group["params"]]
