"""One token per row through a model, in as few operators as it takes.

The plain form of this is the model's own forward pass, ``decode_one``: right for every model, but
made for whole texts. For one token its cost is not arithmetic, it is the modules called, the
operators started, and the weights read at less than the memory's speed. ``DecodeStep`` computes the
same (the tests compare the two) and differs in this:

* Projections of the same input are one product, where ``lay_out_for_decoding`` has stored their
  weights one after the other.
* Decays are computed once, rotations once a step; nothing is looked up in the configuration.
* The state is updated in place; nothing that a step allocates outlives it.
* For many rows side by side the weights are packed once, where that pays.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import CausalAttention
from .cache import DecoderCache, KVCache, locked
from .configuration import DecoderConfig
from .decay import head_log_decay
from .layers import FeedForward, MultiScaleRetention
from .linear import MOST_LEFT, Linear, PackedWeight, pack, product
from .modeling import (
    DecoderForCausalLM,
    DecoderLayer,
    RetNetForCausalLM,
    RetNetModel,
    TransformerForCausalLM,
    TransformerModel,
)
from .products import fast_products
from .rotary import Rotation, rotary_theta, rotation
from .sequence import NEXT_POSITION, SEGMENT
from .step_parts import AttentionStep, FeedForwardStep, RetentionStep, StepPart, step_norm

# what a model is made of when nobody has wrapped, quantised or adapted a part of it
PLAIN_MODULES = {
    CausalAttention, DecoderLayer, FeedForward, MultiScaleRetention, RetNetForCausalLM, RetNetModel,
    TransformerForCausalLM, TransformerModel, Linear, nn.Dropout, nn.Embedding, nn.LayerNorm,
    nn.ModuleList, nn.RMSNorm,
}  # fmt: skip
MOST_COMPILED = 256  # models and numbers of rows that a process may compile a step for
MOST_PACKED = 2**30  # bytes of weights that may be copied to make the steps of many rows faster


def is_plain(model: nn.Module) -> bool:
    """Whether ``DecodeStep`` may stand for the model.

    It must consist of its own modules and plain weights, nothing wrapped, hooked, compiled or in
    training, on a device that has float64 for the angles.
    """
    has_float64 = next(model.parameters()).device.type != "mps"
    return (
        has_float64
        and not model.training
        and all(type(weight) is nn.Parameter for weight in model.parameters())
        and all(
            type(module) in PLAIN_MODULES
            and "forward" not in vars(module)
            and module._compiled_call_impl is None
            and not module._forward_hooks
            and not module._forward_pre_hooks
            for module in model.modules()
        )
    )


class DecodeStep:
    """One token per row: tokens [B] in, the logits that follow [B, vocab] out, the cache updated.

    It holds the model's weights as they are stored when it is made, and copies none; except on a
    CPU whose kernels are faster with packed ones, for more rows than a few, up to ``MOST_PACKED``.

    Args:
        model: For which ``is_plain`` holds.
    """

    def __init__(self, model: DecoderForCausalLM) -> None:
        config: DecoderConfig = model.config
        self.compute = self._compute
        self.may_pack = sum(weight.nbytes for weight in model.parameters()) <= MOST_PACKED
        self.grows = isinstance(model, TransformerForCausalLM)  # the cache
        self.embedding = model.model.embed_tokens.weight.detach()
        mixer_step: Callable = AttentionStep if self.grows else RetentionStep
        self.layers = [
            (
                step_norm(layer.mixer_norm),
                mixer_step(layer.mixer),
                step_norm(layer.ffn_norm),
                FeedForwardStep(layer.ffn),
            )
            for layer in model.model.layers
        ]
        self.norm = step_norm(model.model.norm)
        self.output: Tensor | PackedWeight = model.lm_head.weight.detach()
        self.wide = torch.promote_types(self.embedding.dtype, torch.float32)
        self.layout, device = config.rotary_layout, self.embedding.device
        self.theta = rotary_theta(
            config.head_dim,
            frequencies=config.rotary_frequencies,
            base=config.rotary_base,
            device=device,
        )
        # queries and keys are rotated together, [B, 2H, 1, K]; retention's keys carry the scale
        ones = torch.ones(config.num_heads, 1, 1, dtype=self.wide, device=device)
        self.scale = torch.cat((ones, ones if self.grows else ones * config.head_dim**-0.5))
        self.decay = ones
        if not self.grows:
            log_decay = head_log_decay(config.decay, config.num_heads, device)
            self.decay = log_decay.to(self.wide).exp()[:, None, None]

    def fits(self, cache: DecoderCache) -> bool:
        """Whether the cache holds something, nothing that needs a mask, and can be written here."""
        masked = isinstance(cache, KVCache) and (
            cache.valid is not None or cache.document_start is not None
        )
        return cache.length > 0 and not masked and not locked(cache.record)

    def compile(self) -> "DecodeStep":
        """Compile the step at its first call; a growing cache compiles nothing anew.

        Only that cache's sizes are left open: with those of rows and weights, which are no
        parameters where they are joined, the compiler would be busy for minutes.
        """
        options: dict[str, Any] = {"recompile_limit": MOST_COMPILED}  # left out of the stubs
        compiled = torch.compile(self._compute, dynamic=self.grows, fullgraph=True, **options)
        for weight in (self.embedding, *self._weights()):
            plain = weight if isinstance(weight, Tensor) else weight.weight
            torch._dynamo.mark_static(plain)

        def compute(tokens: Tensor, positions: Tensor, memories: Sequence[Any]) -> Tensor:
            torch._dynamo.mark_static(tokens)
            torch._dynamo.mark_static(positions)
            # of few rows the blocks of ``linear`` are the faster products
            with fast_products(tokens.device) if len(tokens) > MOST_LEFT else nullcontext():
                return compiled(tokens, positions, memories)

        self.compute = compute
        return self

    def __call__(self, tokens: Tensor, cache: DecoderCache) -> Tensor:
        """tokens int64 [B] -> logits [B, vocab]; ``fits(cache)`` must hold."""
        assert cache.record is not None
        if self.may_pack and len(tokens) > MOST_LEFT:
            self.may_pack = False
            self._pack(len(tokens))
        logits = self.compute(tokens, cache.record[:, NEXT_POSITION], cache.layers)
        cache.record[:, :SEGMENT] += 1
        cache.length += 1
        cache.last_hidden = None
        return logits

    def _parts(self) -> Iterator[StepPart]:
        for _, mixer, _, ffn in self.layers:
            yield from (mixer, ffn)

    def _weights(self) -> Iterator[Tensor | PackedWeight]:
        yield self.output
        for part in self._parts():
            yield from (*part.inputs, part.output)

    def _pack(self, rows: int) -> None:
        for part in self._parts():
            part.pack(rows)
        self.output = pack(self.output, rows)

    def _compute(self, tokens: Tensor, positions: Tensor, memories: Sequence[Any]) -> Tensor:
        hidden = F.embedding(tokens, self.embedding)
        angles = positions[:, None, None] * self.theta  # float64 [B, 1, K/2]
        cos, sin = rotation(angles, self.wide, tokens.device)
        turn = Rotation(cos * self.scale, sin * self.scale, self.layout)
        for (norm, mixer, ffn_norm, ffn), memory in zip(self.layers, memories, strict=True):
            hidden = hidden + mixer(norm(hidden), turn, self.decay, memory)
            hidden = hidden + ffn(ffn_norm(hidden))
        return product(self.norm(hidden), self.output)
