"""Every mixer on a GPU: what it computes on the CPU."""

import statistics
import time

import pytest
import torch

from retnet.generation import decode_one, make_step, prefill
from retnet.model import MIXERS
from tests.generation.builders import tiny_model
from tests.model.fast_decode.cases import random_ids

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_logits_and_grads_are_those_of_the_cpu(mixer: str) -> None:
    """In float64, on rows of four chunks."""
    results = []
    for device in ("cpu", "cuda"):
        model = tiny_model(mixer, dtype=torch.float64).to(device)
        ids = random_ids(2, 16).to(device)
        output = model(ids, labels=ids)
        output.loss.backward()
        grads = [x.grad.cpu() for x in model.parameters()]
        results.append([output.loss.detach().cpu(), output.logits.detach().cpu(), *grads])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_steps_are_those_of_the_model(mixer: str) -> None:
    """The fast step, where there is one, after a prompt."""
    model = tiny_model(mixer, dtype=torch.float32).cuda().eval()
    ids = random_ids(2, 12).cuda()
    cache, plain, step = model.new_cache(), model.new_cache(), make_step(model)
    for memory in (cache, plain):
        prefill(model, ids[:, :5], memory)
    for token in ids.T[5:]:
        expected = decode_one(model, token, plain)
        torch.testing.assert_close(step(token, cache), expected, rtol=1e-3, atol=1e-3)
    assert step.path.startswith("fast step"), step.path


def test_a_growing_cache_plans_nothing_anew_for_each_token() -> None:
    """cuDNN's kernels would, in 40 ms and more."""
    model = tiny_model("attention", dtype=torch.bfloat16).cuda().eval()
    cache, step = model.new_cache(), make_step(model)
    ids, seconds = random_ids(1, 14).cuda(), []
    prefill(model, ids[:, :2], cache)
    for token in ids.T[2:]:
        torch.cuda.synchronize()
        started = time.perf_counter()
        step(token, cache)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    assert statistics.median(seconds) < 0.02
