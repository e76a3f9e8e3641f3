"""Every contender computes what its equation says, in float64 and in the float32 that is timed."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.layer.laws import config_of
from benchmarks.layer.mixing import ALL, CONTENDERS, NAIVE, SDPA, Inputs, make_layer
from retnet.model import MIXERS
from retnet.model.ops.random_features import favor_projection
from retnet.model.ops.rwkv_init import time_decay, time_first

CPU = torch.device("cpu")
ROWS, LENGTH, WIDTH = 2, 150, 16  # several chunks of each


def weighted(weights: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    weights = weights.tril() if causal else weights
    return weights @ v / weights.sum(-1, keepdim=True)


def of_softmax(causal: bool):
    return lambda q, k, v: weighted((q @ k.mT / WIDTH**0.5).exp(), v, causal)


def of_linear(causal: bool):
    return lambda q, k, v: weighted((F.elu(q) + 1) @ (F.elu(k) + 1).mT, v, causal)


def of_performer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    count = config_of("performer", WIDTH).num_features
    assert count == 44  # D ln D
    matrix = favor_projection(count, WIDTH, seed=0).double()
    q, k = (
        (x @ matrix.mT - x.square().sum(-1, keepdim=True) / 2).exp()
        for x in (q * WIDTH**-0.25, k * WIDTH**-0.25)
    )
    return weighted(q @ k.mT, v)


def of_aft(window: int):
    def aft(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(0)
        w_u, w_v = (0.1 * torch.randn(2, LENGTH, 64)).double()
        w = w_u @ w_v.mT
        since = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
        w = torch.where(since < window, w, 0.0)
        weights = (k[:, None] + w[..., None]).exp() * (since >= 0)[..., None]  # [B, t, s, d]
        return q.sigmoid() * (weights * v[:, None]).sum(2) / weights.sum(2)

    return aft


def of_rwkv(r: Tensor, k: Tensor, v: Tensor) -> Tensor:
    decay = time_decay(0, 1, WIDTH).float().double().exp()
    bonus = time_first(WIDTH).float().double()
    outputs = []
    for t in range(LENGTH):
        age = torch.arange(t - 1, -1, -1, dtype=torch.float64)[:, None]
        weights = torch.cat((k[:, :t] - age * decay, (k[:, t] + bonus)[:, None]), 1).exp()
        outputs.append((weights * v[:, : t + 1]).sum(1) / weights.sum(1))
    return r.sigmoid() * torch.stack(outputs, 1)


def of_retention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    since = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    decays = torch.where(since >= 0, (1 - 2.0**-5) ** since.double(), 0.0)
    out = (q @ k.mT * WIDTH**-0.5 * decays) @ v
    return F.layer_norm(out, (WIDTH,), eps=1e-6)


REFERENCES = {
    NAIVE: of_softmax(True),
    NAIVE + ALL: of_softmax(False),
    SDPA: of_softmax(True),
    SDPA + ALL: of_softmax(False),
    "linear": of_linear(True),
    "linear" + ALL: of_linear(False),
    "performer": of_performer,
    "aft, local": of_aft(32),
    "aft, full": of_aft(LENGTH),
    "rwkv": of_rwkv,
    "retention, parallel": of_retention,
    "retention, chunkwise": of_retention,
    "retention, recurrent": of_retention,
}


def test_there_is_a_reference_for_each_and_a_mixer() -> None:
    assert REFERENCES.keys() == CONTENDERS.keys()
    assert {one.mixer for one in CONTENDERS.values()} == {*MIXERS} - {"gated_retention"}
    assert all(one.causal != name.endswith(ALL) for name, one in CONTENDERS.items())


@pytest.mark.parametrize("name", CONTENDERS)
def test_outputs_are_those_of_the_equation(name: str) -> None:
    inputs = Inputs.draw(ROWS, LENGTH, WIDTH, CPU)
    assert not torch.equal(*inputs.mixed[:2])
    wide = [x.double() for x in inputs.mixed]
    expected = REFERENCES[name](*wide)
    torch.manual_seed(0)
    exact = CONTENDERS[name].make(LENGTH, WIDTH, CPU)(*wide)
    # linear attention's own eps is what the two differ by
    torch.testing.assert_close(exact, expected, rtol=0, atol=1e-7 if "linear" in name else 1e-9)
    torch.manual_seed(0)
    timed = CONTENDERS[name].make(LENGTH, WIDTH, CPU)(*inputs.mixed)
    assert timed.dtype == torch.float32
    torch.testing.assert_close(timed.double(), expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("name", [name for name in CONTENDERS if "aft" not in name])
def test_projections_stand_around_the_mixing(name: str) -> None:
    """(AFT draws weights of its own after those of the projections.)"""
    inputs = Inputs.draw(ROWS, LENGTH, WIDTH, CPU)
    torch.manual_seed(0)
    w_q, w_k, w_v, w_o = (torch.randn(4, WIDTH, WIDTH) * WIDTH**-0.5).double()
    x = inputs.hidden.double()
    expected = REFERENCES[name](x @ w_q.mT, x @ w_k.mT, x @ w_v.mT) @ w_o.mT
    out = make_layer(CONTENDERS[name], inputs, True)()
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-4)
    plain = make_layer(CONTENDERS[name], inputs, False)()
    assert not torch.allclose(out, plain, atol=0.1)
    assert out.shape == plain.shape == (ROWS, LENGTH, WIDTH)
    assert out.is_inference()  # no graph is made


@pytest.mark.parametrize(
    ("name", "time", "space"),
    [
        (NAIVE, 2, 2), (SDPA, 2, 1), ("linear" + ALL, 1, 1), ("linear", 1, 1),
        ("performer", 1, 1), ("aft, local", 1, 1), ("aft, full", 2, 2), ("rwkv", 1, 1),
        ("retention, parallel", 2, 2), ("retention, chunkwise", 1, 1),
        ("retention, recurrent", 1, 1),
    ],
)  # fmt: skip
def test_laws_grow_as_the_surveys_say(name: str, time: int, space: int) -> None:
    one, far = CONTENDERS[name], 2**24
    for count, power in ((one.operations, time), (one.numbers, space)):
        assert count(2 * far, 64, False) / count(far, 64, False) == pytest.approx(2**power, 1e-3)
        assert count(far, 64, True) > count(far, 64, False)


def test_laws_have_the_sizes_of_the_defaults() -> None:
    """Written out at T = 1024, d = 64: C 64 (linear, Performer 128), m 266, s 32."""
    t, d = 1024, 64
    counted = {name: one.operations(t, d, False) / t for name, one in CONTENDERS.items()}
    assert counted["retention, chunkwise"] == (64 + 64) * 64
    assert counted["linear"] == (128 + 64) * 64
    assert counted["performer"] == 266 * (64 + 128) + 128 * 64
    assert counted["aft, local"] == 32 * 64
    assert counted["retention, recurrent"] == 64 * 64
    kept = CONTENDERS["retention, chunkwise"].numbers(t, d, False)
    assert kept == t * 64 + t / 64 * 64 * 64 + t * d
