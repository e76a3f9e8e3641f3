"""One token per row through a model, in as few operators as it takes.

The plain form of this is the model's own forward pass, ``decode_one``: right for every model, but
made for whole texts. For one token its cost is not arithmetic, it is the modules called, the
operators started, and the weights read at less than the memory's speed. ``DecodeStep`` computes the
same (the tests compare the two) and differs in three things:

* Projections of the same input are one product, where ``lay_out_for_decoding`` has stored their
  weights one after the other.
* Decays are computed once, rotations once a step; nothing is looked up in the configuration.
* The state is updated in place; nothing that a step allocates outlives it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import CausalAttention
from .cache import DecoderCache, KVCache, KVLayer, RetentionLayer, locked
from .configuration import DecoderConfig
from .decay import head_log_decay
from .layers import FeedForward, MultiScaleRetention, head_norm
from .linear import Linear, bmm, linear
from .modeling import (
    DecoderForCausalLM,
    DecoderLayer,
    RetNetForCausalLM,
    RetNetModel,
    TransformerForCausalLM,
    TransformerModel,
)
from .precision import full_precision
from .rotary import Rotation, rotary_theta, rotation
from .sequence import NEXT_POSITION, SEGMENT

# what a model is made of when nobody has wrapped, quantised or adapted a part of it
PLAIN_MODULES = {
    CausalAttention, DecoderLayer, FeedForward, MultiScaleRetention, RetNetForCausalLM, RetNetModel,
    TransformerForCausalLM, TransformerModel, Linear, nn.Dropout, nn.Embedding, nn.LayerNorm,
    nn.ModuleList, nn.RMSNorm,
}  # fmt: skip


def lay_out_for_decoding(model: nn.Module) -> None:
    """Store the weights that ``DecodeStep`` multiplies together one after the other, in place."""
    for module in model.modules():
        linears = _same_input(module)
        if len(linears) > 1 and len(_weights(linears)) > 1:
            whole = torch.cat([linear.weight.detach() for linear in linears])
            parts = whole.split([linear.out_features for linear in linears])
            for linear, part in zip(linears, parts, strict=True):
                linear.weight.data = part


def _same_input(module: nn.Module) -> list[nn.Linear]:
    """The projections in a mixer or feed-forward network that all read its input."""
    if isinstance(module, MultiScaleRetention):
        found = [module.q_proj, module.k_proj, module.v_proj, module.g_proj]
    elif isinstance(module, CausalAttention):
        found = [module.q_proj, module.k_proj, module.v_proj]
    elif isinstance(module, FeedForward):
        found = [module.gate_proj, module.up_proj]
    else:
        found = []
    return [linear for linear in found if linear is not None]


def _weights(linears: Sequence[nn.Linear]) -> list[Tensor]:
    """Their weights; as a single matrix [sum of out, in] where they are stored as one."""
    weights = [linear.weight.detach() for linear in linears]
    first, inputs = weights[0], weights[0].shape[1]
    offset = first.storage_offset()
    for weight in weights:
        same = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and weight.is_contiguous() and weight.storage_offset() == offset):
            return weights
        offset += weight.numel()
    outputs = sum(weight.shape[0] for weight in weights)
    return [first.as_strided((outputs, inputs), (inputs, 1))]


def _project(x: Tensor, weights: list[Tensor]) -> Tensor:
    """[B, in] -> [B, sum of out]."""
    if len(weights) == 1:
        return linear(x, weights[0])
    return torch.cat([linear(x, weight) for weight in weights], dim=1)


class RetentionStep:
    """``MultiScaleRetention`` for one token per row, its state updated in place."""

    def __init__(self, mixer: MultiScaleRetention) -> None:
        config = mixer.config
        self.inputs, self.output = _weights(_same_input(mixer)), mixer.o_proj.weight.detach()
        self.heads, self.gated = config.num_heads, config.gate
        self.head_norm, self.eps = config.head_norm, config.head_norm_eps
        gate = config.value_size if config.gate else 0
        self.parts = [2 * config.hidden_size, config.value_size, gate]
        self.odd = sum(self.parts) % 2 == 1

    def __call__(self, x: Tensor, turn: Rotation, decay: Tensor, memory: RetentionLayer) -> Tensor:
        """[B, d] -> [B, d]; ``decay`` is [H, 1, 1], ``turn`` for queries and keys together."""
        rows, heads, state = x.shape[0], self.heads, memory.state
        assert state is not None
        qk, v, gate = _project(x, self.inputs).split_with_sizes(self.parts, dim=1)
        if self.odd:  # pairs must begin at even places
            qk = qk.contiguous()
        with full_precision(x.device):
            q, k = turn(qk.view(rows, 2 * heads, 1, -1)).split(heads, dim=1)  # [B, H, 1, K]
            v = v.view(rows, heads, 1, -1).to(state.dtype)
            if torch.compiler.is_compiling():  # so the new state is written once, and not read
                out = _read(q, state) * decay + (q * k).sum(-1, keepdim=True) * v
                state.mul_(decay).addcmul_(k.mT, v)
            else:
                state.mul_(decay).addcmul_(k.mT, v)
                out = _read(q, state)
            out = out.view(rows, heads, -1)
            out = head_norm(out, self.head_norm, self.eps).view(rows, -1)
        out = out.to(x.dtype)
        return linear(F.silu(gate) * out if self.gated else out, self.output)


def _read(q: Tensor, state: Tensor) -> Tensor:
    """q S: [B, H, 1, K], [B, H, K, V] -> [B, H, 1, V]."""
    rows, heads, _, width = q.shape
    # strides as of a matrix of one row, also where compilers think them irrelevant: see linear
    q = q.contiguous().as_strided((rows * heads, 1, width), (width, width, 1))
    return bmm(q, state.flatten(0, 1)).view(rows, heads, 1, -1)


class AttentionStep:
    """``CausalAttention`` for one token per row, its keys and values appended to the cache."""

    def __init__(self, mixer: CausalAttention) -> None:
        self.heads = mixer.config.num_heads
        self.inputs, self.output = _weights(_same_input(mixer)), mixer.o_proj.weight.detach()

    def __call__(self, x: Tensor, turn: Rotation, decay: Tensor, memory: KVLayer) -> Tensor:
        """[B, d] -> [B, d]; there is no decay in it."""
        rows, heads = x.shape[0], self.heads
        qkv = _project(x, self.inputs).view(rows, 3 * heads, 1, -1)
        q, k = turn(qkv[:, : 2 * heads]).to(qkv.dtype).split(heads, dim=1)
        keys, values = memory.append(k, qkv[:, 2 * heads :])
        out = F.scaled_dot_product_attention(q, keys, values)
        return linear(out.view(rows, -1), self.output)


class FeedForwardStep:
    """``FeedForward`` for few rows."""

    def __init__(self, ffn: FeedForward) -> None:
        self.gated = ffn.gate_proj is not None
        self.inputs, self.output = _weights(_same_input(ffn)), ffn.down_proj.weight.detach()

    def __call__(self, x: Tensor) -> Tensor:
        inner = _project(x, self.inputs)
        if self.gated:
            gate, inner = inner.chunk(2, dim=1)
            return linear(F.silu(gate) * inner, self.output)
        return linear(F.gelu(inner), self.output)


def _norm(norm: Any) -> Callable[[Tensor], Tensor]:
    """The norm without its module; ``make_norm`` knows two kinds."""
    weight = norm.weight.detach()
    if isinstance(norm, nn.LayerNorm):
        shape, bias, eps = norm.normalized_shape, norm.bias.detach(), norm.eps
        return lambda x: torch.layer_norm(x, shape, weight, bias, eps)
    assert isinstance(norm, nn.RMSNorm)
    shape, rms_eps = norm.normalized_shape, norm.eps
    return lambda x: torch.rms_norm(x, shape, weight, rms_eps)


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

    It holds the model's weights as they are stored when it is made, and copies none.

    Args:
        model: For which ``is_plain`` holds.
    """

    def __init__(self, model: DecoderForCausalLM) -> None:
        config: DecoderConfig = model.config
        self.compute = self._compute
        self.grows = isinstance(model, TransformerForCausalLM)  # the cache
        self.embedding = model.model.embed_tokens.weight.detach()
        mixer_step: Callable = AttentionStep if self.grows else RetentionStep
        self.layers = [
            (
                _norm(layer.mixer_norm),
                mixer_step(layer.mixer),
                _norm(layer.ffn_norm),
                FeedForwardStep(layer.ffn),
            )
            for layer in model.model.layers
        ]
        self.norm, self.output = _norm(model.model.norm), model.lm_head.weight.detach()
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
        compiled = torch.compile(self._compute, dynamic=self.grows, fullgraph=True)
        for _, mixer, _, ffn in self.layers:
            for weight in (*mixer.inputs, mixer.output, *ffn.inputs, ffn.output):
                torch._dynamo.mark_static(weight)
        torch._dynamo.mark_static(self.embedding)
        torch._dynamo.mark_static(self.output)

        def compute(tokens: Tensor, positions: Tensor, memories: Sequence[Any]) -> Tensor:
            torch._dynamo.mark_static(tokens)
            torch._dynamo.mark_static(positions)
            return compiled(tokens, positions, memories)

        self.compute = compute
        return self

    def __call__(self, tokens: Tensor, cache: DecoderCache) -> Tensor:
        """tokens int64 [B] -> logits [B, vocab]; ``fits(cache)`` must hold."""
        assert cache.record is not None
        logits = self.compute(tokens, cache.record[:, NEXT_POSITION], cache.layers)
        cache.record[:, :SEGMENT] += 1
        cache.length += 1
        cache.last_hidden = None
        return logits

    def _compute(self, tokens: Tensor, positions: Tensor, memories: Sequence[Any]) -> Tensor:
        hidden = F.embedding(tokens, self.embedding)
        angles = positions[:, None, None] * self.theta  # float64 [B, 1, K/2]
        cos, sin = rotation(angles, self.wide, tokens.device)
        turn = Rotation(cos * self.scale, sin * self.scale, self.layout)
        for (norm, mixer, ffn_norm, ffn), memory in zip(self.layers, memories, strict=True):
            hidden = hidden + mixer(norm(hidden), turn, self.decay, memory)
            hidden = hidden + ffn(ffn_norm(hidden))
        return linear(self.norm(hidden), self.output)
