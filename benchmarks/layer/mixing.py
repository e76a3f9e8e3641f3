"""The contenders: mixers of one head, from queries, keys and values to outputs, and their costs.

All are functions of q, k, v [B, T, d], and give [B, T, d]; with projections three d x d matrices
make q, k and v of the input and a fourth ends the layer, the same for all. Left out are rotations,
gates of retention, and wider values, so that all mix as much; retention's head norm and the
sigmoids of AFT and RWKV take part, as softmax's and linear attention's denominators do. Forms and
sizes are the repository's defaults for a head of that width.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.layer.laws import (
    CHANNELS,
    CHANNELS_AND_W,
    FEATURES,
    FLASH,
    PAIRS,
    PERFORMER,
    PERFORMER_SPACE,
    SCORES,
    STATE,
    STEPS,
    WINDOW,
    Law,
    chunks,
    config_of,
)
from retnet.model.mixers.aft import BIAS_STD
from retnet.model.ops.aft import aft_parallel
from retnet.model.ops.decay import head_log_decay
from retnet.model.ops.favor import favor_chunkwise
from retnet.model.ops.gated_norm import head_norm
from retnet.model.ops.linear_attention import (
    elu_features,
    linear_attention_chunkwise,
    normalised,
    with_ones,
)
from retnet.model.ops.random_features import favor_projection
from retnet.model.ops.retention import (
    retention_chunkwise,
    retention_parallel,
    retention_recurrent,
)
from retnet.model.ops.rwkv_init import time_decay, time_first
from retnet.model.ops.wkv import wkv_chunkwise

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v [B, T, d] -> [B, T, d]
Make = Callable[[int, int, torch.device], Mix]  # T, d, where


@dataclass(frozen=True)
class Contender:
    """A mixer in one of its forms.

    Attributes:
        name: In tables.
        mixer: Its name among the repository's mixers, which decides its colour.
        causal: Whether a token sees only what came before it.
        make: The function; weights of its own are drawn by torch's generator.
        time: Operations, but for the projections' 4 T d^2.
        space: Numbers that are kept meanwhile, beside inputs and outputs.
    """

    name: str
    mixer: str
    causal: bool
    make: Make
    time: Law
    space: Law

    def operations(self, length: int, width: int, projected: bool) -> float:
        """As the law counts them."""
        return self.time.count(length, width) + (4 * length * width**2 if projected else 0)

    def numbers(self, length: int, width: int, projected: bool) -> float:
        """As the law counts them, and the outputs; with projections also q, k, v and theirs."""
        return self.space.count(length, width) + (5 if projected else 1) * length * width


def naive(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """Softmax attention whose scores are made in full, [B, T, T]."""
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    if causal:
        ahead = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu_(1)
        scores.masked_fill_(ahead, -torch.inf)
    return scores.softmax(-1) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """Softmax attention by torch's own kernel, which never has all scores."""
    return _by_head(lambda *x: F.scaled_dot_product_attention(*x, is_causal=causal), q, k, v)


def linear_over_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Linear attention where every token sees all: one sum [d, d + 1] of all keys and values."""
    return normalised(elu_features(q) @ (elu_features(k).mT @ with_ones(v)))


def _by_head(form: Callable[..., Any], *inputs: Tensor) -> Tensor:
    """A form of [B, H, T, .] with one head; of its results the first."""
    out = form(*(x[:, None] for x in inputs))
    first: Tensor = out[0] if isinstance(out, tuple) else out
    return first[:, 0]


def _softmax(mix: Callable[..., Tensor], causal: bool) -> Make:
    return lambda length, width, device: lambda q, k, v: mix(q, k, v, causal=causal)


def _linear(length: int, width: int, device: torch.device) -> Mix:
    size = config_of("linear", width).chunk_size

    def form(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return linear_attention_chunkwise(elu_features(q), elu_features(k), v, chunk_size=size)

    return lambda q, k, v: _by_head(form, q, k, v)


def _performer(length: int, width: int, device: torch.device) -> Mix:
    config = config_of("performer", width)
    matrix = favor_projection(config.num_features, width, seed=0).to(device)

    def form(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return favor_chunkwise(q, k, v, matrix, chunk_size=config.chunk_size)

    return lambda q, k, v: _by_head(form, q, k, v)


def _aft(variant: str) -> Make:
    def make(length: int, width: int, device: torch.device) -> Mix:
        values = {"aft_variant": variant, "max_position_embeddings": length}
        config = config_of("aft", width, **values)
        w = BIAS_STD * torch.randn(2, length, config.aft_rank).to(device)
        positions = torch.arange(length, device=device)[None]

        def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return aft_parallel(q, k, v, positions, *w, window=config.reach)[0]

        return mix

    return make


def _rwkv(length: int, width: int, device: torch.device) -> Mix:
    config = config_of("rwkv", width)
    own = [x.float().to(device) for x in (time_decay(0, 1, width), time_first(width))]

    def mix(r: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return r.sigmoid() * wkv_chunkwise(k, v, *own, chunk_size=config.chunk_size)[0]

    return mix


def _retention(retain: Callable[..., tuple[Tensor, Tensor]]) -> Make:
    def make(length: int, width: int, device: torch.device) -> Mix:
        config = config_of("retention", width)
        log_decay = head_log_decay(config.decay, 1, device)
        chunks = {"chunk_size": config.chunk_size} if retain is retention_chunkwise else {}

        def form(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out, _ = retain(q, k * width**-0.5, v, log_decay, **chunks)
            return head_norm(out, config.head_norm, config.head_norm_eps)

        return lambda q, k, v: _by_head(form, q, k, v)

    return make


NAIVE, SDPA, ALL = "softmax, naive", "SDPA", ", not causal"
LINEAR, CHUNKWISE = "linear", "retention, chunkwise"


def _contenders() -> Iterator[Contender]:
    full, flash = (PAIRS, SCORES), (PAIRS, FLASH)
    yield Contender(NAIVE, "attention", True, _softmax(naive, True), *full)
    yield Contender(NAIVE + ALL, "attention", False, _softmax(naive, False), *full)
    yield Contender(SDPA, "attention", True, _softmax(sdpa, True), *flash)
    yield Contender(SDPA + ALL, "attention", False, _softmax(sdpa, False), *flash)
    over_all = linear_over_all
    yield Contender(LINEAR + ALL, "linear", False, lambda *_: over_all, STEPS, FEATURES)
    yield Contender(LINEAR, "linear", True, _linear, *chunks("linear"))
    yield Contender("performer", "performer", True, _performer, PERFORMER, PERFORMER_SPACE)
    yield Contender("aft, local", "aft", True, _aft("local"), WINDOW, CHANNELS)
    yield Contender("aft, full", "aft", True, _aft("full"), PAIRS, CHANNELS_AND_W)
    yield Contender("rwkv", "rwkv", True, _rwkv, CHANNELS, CHANNELS)
    for name, form, laws in (
        ("retention, parallel", retention_parallel, full),
        (CHUNKWISE, retention_chunkwise, chunks("retention")),
        ("retention, recurrent", retention_recurrent, (STEPS, STATE)),
    ):
        yield Contender(name, "retention", True, _retention(form), *laws)


CONTENDERS = {one.name: one for one in _contenders()}


@dataclass(frozen=True)
class Inputs:
    """What all contenders get at one length: q, k, v [B, T, d] and the layer's input [B, T, d]."""

    mixed: tuple[Tensor, Tensor, Tensor]
    hidden: Tensor

    @classmethod
    def draw(cls, rows: int, length: int, width: int, device: torch.device) -> "Inputs":
        """The same standard normal numbers for everybody; the layer's input is the queries."""
        generator = torch.Generator().manual_seed(0)
        mixed = [torch.randn(rows, length, width, generator=generator) for _ in range(3)]
        q, k, v = (x.to(device) for x in mixed)
        return cls((q, k, v), q)


def make_layer(contender: Contender, inputs: Inputs, projected: bool) -> Callable[[], Tensor]:
    """The forward pass of a fresh layer on the inputs, without gradients: [B, T, d]."""
    _, length, width = inputs.hidden.shape
    torch.manual_seed(0)
    weights = (torch.randn(4, width, width) * width**-0.5).to(inputs.hidden)
    mix = contender.make(length, width, inputs.hidden.device)

    @torch.inference_mode()
    def forward() -> Tensor:
        if not projected:
            return mix(*inputs.mixed)
        q, k, v = (F.linear(inputs.hidden, own) for own in weights[:3])
        return F.linear(mix(q, k, v), weights[3])

    return forward
