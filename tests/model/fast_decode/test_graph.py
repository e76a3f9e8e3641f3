"""The decode step as a CUDA graph; on a CPU with stand-ins for CUDA's part, on a GPU as it is."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from retnet.generation import Usage, decode_one, generate, make_step, prefill
from retnet.model.fast_decode.graph import StepGraph
from retnet.model.fast_decode.step import DecodeStep
from tests.generation.builders import tiny_model
from tests.model.fast_decode.cases import random_ids


class Stream:
    def __init__(self, device: torch.device) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[StepGraph]:
    """CUDA graphs that replay by running the step again, into the logits of the capture."""
    seen: list[StepGraph] = []
    capture = StepGraph._capture

    class Graph:
        def replay(self) -> None:
            own, cache = seen[-1], self.cache
            length = cache.length
            own.logits.copy_(own.step(own.tokens, cache))
            cache.length = length  # a real replay runs no Python

    def captured(self: StepGraph, tokens: torch.Tensor, cache: Any, held: list) -> None:
        seen.append(self)
        capture(self, tokens, cache, held)
        self.graph.cache = cache

    monkeypatch.setattr(StepGraph, "_capture", captured)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: nullcontext())
    return seen


@torch.inference_mode()
def test_it_is_captured_once_and_counts_no_token_twice(captures: list[StepGraph]) -> None:
    model, ids = tiny_model("retention"), random_ids(2, 12)
    cache, plain = model.new_cache(), model.new_cache()
    for memory in (cache, plain):
        prefill(model, ids[:, :7], memory)
    step, kept = StepGraph(DecodeStep(model)), []
    for t in range(7, 12):
        kept.append(step(ids[:, t], cache))
        torch.testing.assert_close(kept[-1], decode_one(model, ids[:, t], plain))
    assert len(captures) == 1
    assert cache.length == plain.length and cache.record.equal(plain.record)
    assert not kept[0].equal(kept[1])


@torch.inference_mode()
def test_it_follows_a_cache_whose_rows_change(captures: list[StepGraph]) -> None:
    model, ids = tiny_model("retention"), random_ids(1, 9)
    cache, plain = model.new_cache(), model.new_cache()
    step = StepGraph(DecodeStep(model))
    for memory in (cache, plain):
        prefill(model, ids[:, :7], memory)
    step(ids[:, 7], cache)
    decode_one(model, ids[:, 7], plain)
    for memory in (cache, plain):
        memory.batch_repeat_interleave(3)
    tokens = torch.tensor([1, 2, 3])
    torch.testing.assert_close(step(tokens, cache), decode_one(model, tokens, plain))
    assert len(captures) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("mixer", ["retention", "attention"])
def test_on_a_gpu(mixer: str, compile: bool) -> None:
    model = tiny_model(mixer, dtype=torch.float32).cuda()
    ids = random_ids(2, 9).cuda()
    prompt, usage = ids[:, :4], Usage()
    cache, plain, step = model.new_cache(), model.new_cache(), make_step(model, compile=compile)
    for memory in (cache, plain):
        prefill(model, prompt, memory)
    for token in ids.T[4:]:
        logits = step(token, cache)
        torch.testing.assert_close(logits, decode_one(model, token, plain), rtol=1e-3, atol=1e-3)
    assert len(list(generate(model, ids, max_new_tokens=20, compile=compile, usage=usage))) == 20
    assert usage.path.endswith("CUDA graph") is (mixer == "retention")
