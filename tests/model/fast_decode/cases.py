"""What tests of the decode step share."""

from typing import Any

import pytest
import torch

from retnet.model.mixers import MIXERS
from tests.generation.builders import VOCAB

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
both_mixers = pytest.mark.parametrize("mixer", [m for m in MIXERS if MIXERS[m].step])


def random_ids(rows: int, length: int, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(1))
