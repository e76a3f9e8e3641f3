"""A decode step as a CUDA graph: all its kernels in one launch.

A token through a small model is hundreds of kernels of a few microseconds each; launching them one
by one takes longer than running them. A state of constant size stays where it is, so what was
launched for one token can be launched again for the next.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..cache import DecoderCache
from .step import DecodeStep

WARM_UPS = 3  # runs before the capture, in which libraries and compilers settle


class StepGraph:
    """``DecodeStep`` on a GPU, captured at the first token of a cache whose size is constant.

    It is captured anew when the cache's tensors have moved, as after a change of its rows. The
    step may be compiled; its model's state must not grow.
    """

    def __init__(self, step: DecodeStep) -> None:
        self.step = step
        self.places: list[tuple[int, torch.Size]] = []  # of the tensors that the graph updates
        self.graph: Any = None
        self.tokens: Tensor
        self.logits: Tensor

    def __call__(self, tokens: Tensor, cache: DecoderCache) -> Tensor:
        """tokens int64 [B] -> logits [B, vocab], as ``DecodeStep``."""
        assert cache.record is not None
        cache.rows.pop("last_hidden", None)
        held = list(cache.tensors().values())
        places = [(x.data_ptr(), x.shape) for x in held]
        if places != self.places:
            self._capture(tokens, cache, held)
            self.places = places
        self.tokens.copy_(tokens)
        self.graph.replay()
        cache.length += 1
        return self.logits.clone()  # the next replay writes over it

    def _capture(self, tokens: Tensor, cache: DecoderCache, held: list[Tensor]) -> None:
        before, length = [x.clone() for x in held], cache.length
        self.tokens = tokens.clone()
        current, stream = torch.cuda.current_stream(tokens.device), torch.cuda.Stream(tokens.device)
        stream.wait_stream(current)
        on_stream: AbstractContextManager[Any] = torch.cuda.stream(stream)
        with on_stream:
            for _ in range(WARM_UPS):
                self.step(self.tokens, cache)
        current.wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self.logits = self.step(self.tokens, cache)
        for x, old in zip(held, before, strict=True):  # what the warm-ups have changed
            x.copy_(old)
        cache.length = length
