"""Weights of another model are refused, also those that would fit by name and shape."""

from pathlib import Path

import pytest
import torch

from retnet.checkpoints.match import check_finite, check_same_meaning, check_same_model
from retnet.errors import UserError
from tests.checkpoints.folders import change_config
from tests.generation.builders import tiny_model


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ({"a": (2, 3)}, "b is absent there and (4,) here"),
        ({"a": (2, 3), "b": (4,), "c": (1,)}, "c is (1,) there and absent here"),
        ({"a": (3, 2), "b": (5,)}, "a is (3, 2) there and (2, 3) here"),
    ],
)
def test_names_and_shapes(stored: dict[str, tuple[int, ...]], words: str) -> None:
    own = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    check_same_model(own, {name: value + 1 for name, value in own.items()}, "this", "fix it")
    with pytest.raises(UserError) as caught:
        other = {name: torch.zeros(shape) for name, shape in stored.items()}
        check_same_model(own, other, "checkpoint (x)", "fix it")
    assert str(caught.value) == f"checkpoint (x) is another model: {words}; fix it"


def test_options_that_change_what_weights_mean(copy: Path) -> None:
    model = tiny_model("retention")
    change_config(copy, chunk_size=99, dropout=0.5)  # not among them
    check_same_meaning(model, copy, "checkpoint (x)", "fix it")
    change_config(copy, head_norm="none")
    with pytest.raises(UserError, match=r"model\.head_norm is none there and groupnorm here"):
        check_same_meaning(model, copy, "checkpoint (x)", "fix it")
    change_config(copy, head_norm="groupnorm", rotary_layout="half")
    with pytest.raises(UserError) as caught:
        check_same_meaning(model, copy, "checkpoint (x)", "fix it")
    assert str(caught.value) == (
        "checkpoint (x) is another model: model.rotary_layout is half there and interleaved here; "
        "fix it"
    )


@pytest.mark.parametrize("value", [1e300, float("inf"), float("nan")])
def test_numbers_that_are_none_in_training(value: float) -> None:
    """In float64 there are more of them than in float32, to which they are converted."""
    weights = {"a": torch.full((2,), 1e38, dtype=torch.float64), "b": torch.zeros(2)}
    check_finite(weights, "this")
    weights["a"][1] = value
    with pytest.raises(UserError, match=r"this has values that are not finite \(a\)"):
        check_finite(weights, "this")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_numbers_in_which_nothing_is_computed(dtype: torch.dtype) -> None:
    with pytest.raises(UserError, match=r"this has numbers of type torch\.float8_\w+ \(a\), in"):
        check_finite({"a": torch.zeros(2, dtype=dtype)}, "this")
