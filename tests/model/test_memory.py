"""Prefill takes memory linear in the length of the text."""

import subprocess
import sys

import pytest
import torch

from tests.model.conftest import make_model, random_ids
from tests.model.recorders import LargestTensor


def largest(model, length: int, **arguments) -> int:
    """Bytes of the largest tensor that a forward pass makes."""
    ids = random_ids(1, length)
    with torch.no_grad(), LargestTensor() as recorder:
        model(ids, logits_to_keep=1, **{k: make(ids) for k, make in arguments.items()})
    return recorder.bytes


@pytest.mark.parametrize(
    "arguments",
    [{}, {"attention_mask": torch.ones_like}, {"segment_ids": lambda ids: ids // 30}],
    ids=["plain", "mask", "documents"],
)
def test_no_tensor_of_a_prefill_grows_faster_than_the_text(arguments: dict) -> None:
    model = make_model("retention", torch.float32, chunk_size=16)
    config = model.config
    short, long = (largest(model, length, **arguments) for length in (1024, 4096))
    assert long <= 4.1 * short
    head_values = config.value_size // config.num_heads
    a_state_per_token = 4 * 4096 * config.num_heads * config.head_dim * head_values
    assert long < a_state_per_token / 4
    assert long < 4 * 4096 * 4096 / 4


def test_decoding_makes_no_tensor_that_grows_with_the_text() -> None:
    model = make_model("retention", torch.float32)
    sizes = []
    for length in (16, 2048):
        cache = model.new_cache()
        with torch.no_grad():
            model(random_ids(1, length), past_key_values=cache)
            with LargestTensor() as recorder:
                model(random_ids(1, 1), past_key_values=cache)
        sizes.append(recorder.bytes)
    assert sizes[0] == sizes[1]


def test_the_parallel_form_would_be_found() -> None:
    """The recorder sees [T, T]: otherwise the tests above would show nothing."""
    model = make_model("retention", torch.float32, chunk_size=2048)
    assert largest(model, 1024) >= 4 * 1024**2


@pytest.mark.parametrize(
    ("form", "most"),  # of its outputs: favor makes all features of q and k too
    [("retention.retention_recurrent", 2), ("favor.favor_recurrent", 8)],
)
def test_token_by_token_no_room_is_lost_between_the_states(form: str, most: int) -> None:
    """What stays of each token must not lie where the states of before lay; no tensor shows that.

    In a process of its own, whose memory the peak is.
    """
    module, name = form.split(".")
    code = (
        "import resource, torch\n"
        f"from retnet.model.ops.{module} import {name} as form\n"
        "q, k, v = (torch.randn(32, 1, 2000, 64) for _ in range(3))\n"
        "more = torch.tensor([-0.1]) if 'retention' in form.__name__ else torch.randn(64, 64)\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "with torch.no_grad():\n"
        "    form(q[:, :, :2], k[:, :, :2], v[:, :, :2], more)\n"
        "    before = peak()\n"
        "    form(q, k, v, more)\n"
        "print(1024 * (peak() - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    outputs = 4 * 32 * 2000 * 64
    assert int(done.stdout) < most * outputs
