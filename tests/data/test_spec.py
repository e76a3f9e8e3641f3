"""The data section's own checks."""

import dataclasses

import pytest

from retnet.data import DataSpec
from retnet.errors import UserError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_fraction": 0.0}, r"data\.validation_fraction \(0\.0\)"),
        ({"validation_fraction": 1.0}, r"data\.validation_fraction \(1\.0\)"),
        ({"validation_fraction": float("nan")}, r"data\.validation_fraction \(nan\)"),
        ({"vocab_size": 259}, r"data\.vocab_size \(259\).*at least 260"),
        ({"seq_len": 0}, r"data\.seq_len \(0\)"),
        ({"max_tokens": 0}, r"data\.max_tokens \(0\)"),
        ({"source": " "}, r"data\.source \(' '\) must not be empty"),
        ({"validation": ""}, r"data\.validation \(''\) must not be empty"),
        ({"seq_len": -1, "vocab_size": 1}, r"data\.vocab_size.*data\.seq_len"),
    ],
)
def test_values_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DataSpec(**options).validate()  # type: ignore[arg-type]


def test_defaults_are_valid_and_explained() -> None:
    DataSpec().validate()
    DataSpec(tokenizer="bytes", vocab_size=1).validate()  # only a trained BPE has that size
    assert all(field.metadata["help"] for field in dataclasses.fields(DataSpec))
