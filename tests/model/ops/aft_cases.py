"""Cases of AFT with padding and documents, the definition written out, forms with gradients."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from retnet.model.ops.aft import aft_parallel, aft_recurrent

TOLERANCE = 1e-10
WINDOWS = {
    "simple_t37": 0,
    "full_t37": None,
    "local_t300_s32": 32,
    "hard_simple_ramp_t64": 0,
    "hard_full_spikes_t64": None,
}
FORMS = [aft_recurrent, aft_parallel]
T_MAX = 60
INPUTS = ("q", "k", "v", "positions", "w_u", "w_v")


def difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()


def run(form, case: dict, **options) -> tuple[Tensor, dict[str, Tensor]]:
    rest = {name: x for name, x in case.items() if name not in INPUTS}
    return form(*(case[name] for name in INPUTS), **rest, **options)


def count_positions(
    shape: tuple[int, int], valid: Tensor | None, resets: Tensor | None, before: Tensor
) -> Tensor:
    """Each document's own count from 0, the first one's from ``before`` [B]; -7 at padding."""
    positions = torch.full(shape, -7)
    for row in range(shape[0]):
        following = int(before[row])
        for t in range(shape[1]):
            if valid is None or valid[row, t]:
                following = 0 if resets is not None and resets[row, t] else following
                positions[row, t] = following
                following += 1
    return positions


def make_case(
    seed: int,
    rows: int = 2,
    length: int = 20,
    width: int = 3,
    window: int | None = 4,
    flags: tuple[str, ...] = (),
    prefix: int = 0,
    loud: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> dict:
    """Random inputs; the initial state is that after a prefix."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    case = {name: normal(rows, length, width) for name in "qkv"}
    case["k"] *= loud
    case |= {"w_u": 2 * normal(T_MAX, 3), "w_v": normal(T_MAX, 3), "window": window}
    for name, probability in (("valid", 0.7), ("resets", 0.15)):
        draws = torch.rand(rows, length, generator=generator) < probability
        case[name] = draws if name in flags else None
    before = torch.full((rows,), prefix)
    shape = (rows, length)
    case["positions"] = count_positions(shape, case["valid"], case["resets"], before)
    case["initial_state"] = None
    if prefix:
        q, k, v = (normal(rows, prefix, width) for _ in range(3))
        known = torch.arange(prefix)[None]
        w = case["w_u"], case["w_v"]
        case["initial_state"] = aft_recurrent(q, k, v, known, *w, window=window)[1]
    return case


@st.composite
def cases(draw: st.DrawFn) -> dict:
    return make_case(
        draw(st.integers(0, 2**31)),
        rows=draw(st.integers(1, 3)),
        length=draw(st.integers(1, 40)),
        width=draw(st.integers(1, 3)),
        window=draw(st.sampled_from([0, 1, 2, 5, 50, None])),
        flags=draw(st.sampled_from([(), ("valid",), ("resets",), ("valid", "resets")])),
        prefix=draw(st.sampled_from([0, 1, 9])),
        loud=draw(st.sampled_from([1.0, 50.0])),
    )


def direct(case: dict) -> Tensor:
    """The equation over all pairs, for a case without initial state; 0 at padding."""
    q, k, v, position, w_u, w_v = (case[name] for name in INPUTS)
    (rows, length, _), window, outputs = q.shape, case["window"], torch.zeros_like(q)
    for row in range(rows):
        document = []
        for t in range(length):
            if case["valid"] is not None and not case["valid"][row, t]:
                continue
            if case["resets"] is not None and case["resets"][row, t]:
                document = []
            document.append(t)
            ages = position[row, t] - position[row, document]
            w = w_v[position[row, document]] @ w_u[position[row, t]]
            w = w if window is None else torch.where(ages < window, w, 0.0)
            weights = (k[row, document] + w[:, None]).softmax(0)
            mean = (weights * v[row, document]).sum(0)
            outputs[row, t] = torch.sigmoid(q[row, t]) * mean
    return outputs


def run_with_gradients(form, case: dict, order: int = 1, **options) -> dict[str, Tensor]:
    """Outputs, state, and gradients of a fixed function of both, or second derivatives too."""
    leaves = {name: case[name].clone().requires_grad_() for name in ("q", "k", "v", "w_u", "w_v")}
    state = case["initial_state"]
    if state is not None:
        state = {name: x.clone() for name, x in state.items()}
        wanted = [name for name in state if name not in ("max", "positions")]
        leaves |= {name: state[name].requires_grad_() for name in wanted}
    inputs = {name: x for name, x in leaves.items() if name in case}
    out, last = run(form, {**case, **inputs, "initial_state": state}, **options)
    result = {"out": out, **{f"state {name}": x for name, x in last.items()}}
    generator = torch.Generator().manual_seed(1)
    cost = torch.zeros((), dtype=out.dtype)
    for name, x in result.items():
        probe = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(out.dtype)
        if name not in ("state max", "state positions"):
            if name == "out" and case["valid"] is not None:
                probe = probe * case["valid"][..., None]
            cost = cost + (x * probe).sum() + (x * probe).square().sum() * (order - 1)
    create = order > 1
    options = {"create_graph": create, "allow_unused": True, "materialize_grads": True}
    grads = torch.autograd.grad(cost, list(leaves.values()), **options)
    result |= {f"gradient of {name}": x for name, x in zip(leaves, grads, strict=True)}
    if create:
        cost = sum((x.square().sum() for x in grads), torch.zeros(()))
        options = {"allow_unused": True, "materialize_grads": True}
        second = torch.autograd.grad(cost, list(leaves.values()), **options)
        result |= {f"second of {name}": x for name, x in zip(leaves, second, strict=True)}
    if case["valid"] is not None:
        result["out"] = out * case["valid"][..., None]
    return {name: x.detach() for name, x in result.items()}


def assert_alike(mine: dict, expected: dict, tolerance: float = TOLERANCE) -> None:
    assert mine.keys() == expected.keys()
    for name, x in mine.items():
        assert torch.isfinite(x).all(), name
        assert x.shape == expected[name].shape, name
        assert difference(x, expected[name]) < tolerance, name
