"""What cannot fit is found before anything is made."""

import pytest

from retnet import RetNetConfig, RetNetForCausalLM
from retnet.errors import UserError
from retnet.generation.checks import bytes_of_row, check_length
from retnet.generation.sampling import NUMBERS_BYTES
from tests.generation.builders import VOCAB, tiny_model


def test_bytes_of_a_row() -> None:
    """Two layers of 2 heads of 8 x 16 in float64; 16 bytes for each entry of the vocabulary."""
    drawing = 16 * VOCAB
    assert bytes_of_row(tiny_model("attention")) == drawing  # all its state grows
    assert bytes_of_row(tiny_model("retention")) == drawing + 2 * 2 * 8 * 16 * 8


@pytest.mark.parametrize("mixer", ["retention", "attention"])
def test_samples_count(mixer: str, monkeypatch) -> None:
    """The state of each, its logits and random numbers were forgotten."""
    model = tiny_model(mixer)
    each = bytes_of_row(model) + NUMBERS_BYTES + 30 * (8 + model.bytes_per_token)
    monkeypatch.setattr("retnet.generation.checks.memory_of", lambda device: 1000 * each)
    check_length(model, 10, 20, 1000)
    with pytest.raises(UserError) as caught:
        check_length(model, 10, 20, 1001)
    assert str(caught.value) == (
        f"--num-samples (1,001) of 30 tokens need {1001 * each:,} bytes, {each:,} a sample, and "
        f"cpu has {1000 * each:,}: at most 1,000 can fit"
    )


def test_a_window_that_no_memory_holds(monkeypatch) -> None:
    """A ring of 1,000 keys and values is made at the first token."""
    sizes = {"vocab_size": 9, "hidden_size": 8, "num_heads": 2, "num_hidden_layers": 2}
    hybrid = {"attention_layers": [1], "attention_window": 1000}
    model = RetNetForCausalLM(RetNetConfig(**sizes, **hybrid))
    each = bytes_of_row(model)
    for memory in (each, each - 1):
        monkeypatch.setattr("retnet.generation.checks.memory_of", lambda device: memory)  # noqa: B023
        if memory == each:
            check_length(model, 1, 1, 1)
            continue
        with pytest.raises(UserError) as caught:
            check_length(model, 1, 1, 1)
    assert str(caught.value) == (
        f"with attention_window (1000) the state of a text needs {each:,} bytes, and cpu has "
        f"{each - 1:,}: make it smaller"
    )
