"""Rotation against its definition, at any position, in both layouts."""

import math

import pytest
import torch

from retnet.model.ops.rotary import Rotation, rotary_angles, rotation

CPU = torch.device("cpu")


def rotated(x: torch.Tensor, positions: torch.Tensor, layout: str, frequencies: str):
    angles = rotary_angles(positions, x.shape[-1], frequencies=frequencies, base=10000.0)
    return Rotation(*rotation(angles, x.dtype, CPU), layout)(x)


def test_frequencies() -> None:
    one = torch.ones(1, 1, dtype=torch.int64)
    linspace = rotary_angles(one, 8, frequencies="linspace", base=10000.0)
    assert linspace.flatten().tolist() == pytest.approx(
        [1, 10000 ** (-1 / 3), 10000 ** (-2 / 3), 1e-4]
    )
    standard = rotary_angles(one, 8, frequencies="standard", base=10000.0)
    assert standard.flatten().tolist() == pytest.approx([1, 0.1, 0.01, 0.001])
    assert rotary_angles(one, 2, frequencies="linspace", base=10000.0).item() == 1
    with pytest.raises(ValueError, match="rotary_frequencies"):
        rotary_angles(one, 8, frequencies="linear", base=10000.0)


@pytest.mark.parametrize(("layout", "pairs"), [("interleaved", (0, 1)), ("half", (0, 2))])
def test_a_pair_turns_by_its_angle(layout: str, pairs: tuple[int, int]) -> None:
    x = torch.zeros(1, 1, 1, 4, dtype=torch.float64)
    x[..., pairs[0]], x[..., pairs[1]] = 1.0, 2.0
    out = rotated(x, torch.tensor([[3]]), layout, "standard").flatten()
    assert out[pairs[0]].item() == pytest.approx(math.cos(3) - 2 * math.sin(3))
    assert out[pairs[1]].item() == pytest.approx(2 * math.cos(3) + math.sin(3))


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_scores_depend_on_the_distance_only(layout: str) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    near, far = torch.tensor([[5]]), torch.tensor([[10_000_005]])
    score = rotated(q, near + 7, layout, "linspace") @ rotated(k, near, layout, "linspace").mT
    shifted = rotated(q, far + 7, layout, "linspace") @ rotated(k, far, layout, "linspace").mT
    assert shifted.item() == pytest.approx(score.item(), abs=1e-7)


def test_positions_are_distinct_where_low_precision_merges_them() -> None:
    """arange(1024) in bfloat16 has 513 distinct values."""
    positions = torch.arange(1024)[None]
    x = torch.ones(1, 1, 1024, 2, dtype=torch.bfloat16)
    angles = rotary_angles(positions, 2, frequencies="linspace", base=10000.0)
    out = Rotation(*rotation(angles, torch.float32, CPU), "interleaved")(x)
    assert out.dtype == torch.float32
    assert len(out[0, 0].unique(dim=0)) == 1024


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_complex_and_the_real_form_are_one(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 7, 3, 8).to(dtype).transpose(1, 2).requires_grad_()  # strided, as from heads
    angles = rotary_angles(torch.arange(7)[None], 8, frequencies="linspace", base=10000.0)
    cos, sin = rotation(angles, torch.promote_types(dtype, torch.float32), CPU)
    results = []
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        out = Rotation(cos, sin, "interleaved")(x)
        (gradient,) = torch.autograd.grad((out * torch.arange(8)).sum(), x)
        results.append((out, gradient))
    for fast, plain in zip(*results, strict=True):
        assert fast.dtype == plain.dtype
        tolerance = 0.02 if fast.dtype == torch.bfloat16 else 1e-5
        assert torch.allclose(fast, plain, rtol=tolerance, atol=tolerance)
