"""Every mixer on a GPU: what it computes on the CPU."""

import statistics
import time

import pytest
import torch

from retnet.generation import decode_one, make_step, prefill
from retnet.model import MIXERS
from retnet.model.quantised import FORMATS, replace_linears
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


@pytest.mark.parametrize("weights", FORMATS)
def test_quantised_weights_are_those_of_the_cpu(weights: str) -> None:
    """Their step, whose activations are rounded to bfloat16, beside plain products of them."""
    model = tiny_model("retention", dtype=torch.float32).eval()
    replace_linears(model, weights)
    ids, cache = random_ids(2, 9), model.new_cache()
    expected = model(ids).logits[:, 4:].detach()
    model.cuda()
    step = make_step(model)
    cache = model.new_cache()
    prefill(model, ids[:, :4].cuda(), cache)
    found = torch.stack([step(token, cache) for token in ids[:, 4:].T.cuda()], dim=1)
    assert step.path == f"fast step, CUDA graph, {weights} weights"
    torch.testing.assert_close(
        found.cpu(), expected, rtol=0, atol=0.05 * expected.abs().max().item()
    )
