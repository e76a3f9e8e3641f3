"""The retention matrix of a short text."""

import numpy as np
import pytest

from retnet.evaluation.token_weights import TOKENS, token_weights
from tests.generation.builders import byte_tokenizer, tiny_model

TOKENIZER = byte_tokenizer()
LONG = "the state of the state of the art, again and again"


@pytest.mark.parametrize("mixer", ["retention", "attention"])
def test_the_first_tokens_of_a_document_that_is_long_enough(mixer: str) -> None:
    model = tiny_model(mixer)
    found = token_weights(model, TOKENIZER, ["short", LONG, LONG[::-1]])
    assert found.tokens == ["<bos>", *LONG[: TOKENS - 1]]
    assert found.matrix.shape == (TOKENS, TOKENS) and not np.triu(found.matrix, 1).any()
    np.testing.assert_allclose(np.abs(found.matrix).max(axis=1), 1)
    assert (found.layer, found.head) == (1, 1), "of two layers and two heads"
    again = token_weights(model, TOKENIZER, [LONG])
    np.testing.assert_array_equal(again.matrix, found.matrix)  # and no hook is left
    assert not any(layer.mixer._forward_pre_hooks for layer in model.model.layers)


def test_the_longest_where_all_are_short() -> None:
    found = token_weights(tiny_model("retention"), TOKENIZER, ["a", "short"])
    assert found.tokens == ["<bos>", *"short", "<eos>"]


def test_none_where_each_channel_has_its_own() -> None:
    assert token_weights(tiny_model("rwkv"), TOKENIZER, [LONG]) is None
