"""Cases of WKV with padding and documents, and its forms with their gradients."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from retnet.model.ops.wkv import (
    WKVState,
    wkv_chunkwise,
    wkv_recurrent,
)

TOLERANCE = 1e-10
INPUTS = ("k", "v", "time_decay", "time_first")
FORMS = [(wkv_recurrent, {}), (wkv_chunkwise, {"chunk_size": 2}), (wkv_chunkwise, {})]


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference in units of the largest value, or of 1."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1)).item()


@st.composite
def cases(draw: st.DrawFn) -> dict:
    """Tensors of random shapes, perhaps with initial state, padding and several documents."""
    batch, length, width = (draw(st.integers(1, n)) for n in (3, 30, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def flags(probability: float) -> Tensor:
        return torch.rand(batch, length, generator=generator) < probability

    state, padding = None, draw(st.sampled_from(["none", "left", "right", "anywhere"]))
    if draw(st.booleans()):
        state = WKVState(normal(batch, width), normal(batch, width).exp(), normal(batch, width))
    valid = None if padding == "none" else flags(0.6)
    if padding in ("left", "right"):
        count = torch.randint(0, length + 1, (batch, 1), generator=generator)
        valid = torch.arange(length) < count
        valid = valid.flip(1) if padding == "left" else valid
    return {
        "k": normal(batch, length, width) * draw(st.sampled_from([0.0, 1.0, 30.0])),
        "v": normal(batch, length, width),
        "time_decay": normal(width) + draw(st.sampled_from([-60.0, -1.0, 3.0])),
        "time_first": normal(width),
        "initial_state": state,
        "valid": valid,
        "resets": flags(0.2) if draw(st.booleans()) else None,
    }


def run(form, case: dict, **options) -> tuple[Tensor, WKVState]:
    rest = {key: value for key, value in case.items() if key not in INPUTS}
    return form(*(case[name] for name in INPUTS), **rest, **options)


def with_leaves(case: dict, leaves: list[Tensor]) -> dict:
    state = WKVState(*leaves[4:]) if len(leaves) > 4 else None
    return case | dict(zip(INPUTS, leaves[:4], strict=True)) | {"initial_state": state}


def leaves_of(case: dict) -> list[Tensor]:
    values = [case[name] for name in INPUTS] + list(case["initial_state"] or ())
    return [x.detach().clone().requires_grad_() for x in values]


def cost(form, case: dict, leaves: list[Tensor], power: int = 1, **options) -> tuple[Tensor, list]:
    """A fixed function of outputs and state, and these."""
    out, state = run(form, with_leaves(case, leaves), **options)
    generator = torch.Generator().manual_seed(1)
    total = sum(
        (x.pow(power) * torch.randn(x.shape, generator=generator).to(x.dtype)).sum()
        for x in (out, state.num, state.den)
    )
    return total, [out.detach(), *(x.detach() for x in state)]


def run_with_gradients(form, case: dict, **options) -> list[Tensor]:
    leaves = leaves_of(case)
    total, results = cost(form, case, leaves, **options)
    return results + list(torch.autograd.grad(total, leaves))


def in_units_of(state: WKVState, unit: Tensor) -> list[Tensor]:
    """A state with another's max: for the same sums it may differ in its last digits."""
    factor = (state.max.double() - unit).exp()
    return [state.num * factor, state.den * factor, state.max]


def agree(mine: list[Tensor], expected: list[Tensor], tolerance: float = TOLERANCE) -> None:
    for a, b in zip(mine, expected, strict=True):
        assert torch.isfinite(a).all()
        assert relative(a, b) < tolerance


def random_case(length: int, *, rows: int = 2, width: int = 3, dtype: Any = torch.float64) -> dict:
    generator = torch.Generator().manual_seed(0)
    k, v, decay, bonus = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in [(rows, length, width)] * 2 + [(width,)] * 2
    )
    empty = dict.fromkeys(("initial_state", "valid", "resets"))
    return {"k": k, "v": v, "time_decay": decay, "time_first": bonus, **empty}
