"""The parts of ``DecodeStep``: mixers and feed-forward network for one token per row, and norms."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import CausalAttention
from .cache import KVLayer, RetentionLayer
from .layers import FeedForward, MultiScaleRetention, head_norm
from .linear import PackedWeight, bmm, pack, product
from .precision import full_precision
from .rotary import Rotation


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


def _project(x: Tensor, weights: Sequence[Tensor | PackedWeight]) -> Tensor:
    """[B, in] -> [B, sum of out]."""
    if len(weights) == 1:
        return product(x, weights[0])
    return torch.cat([product(x, weight) for weight in weights], dim=1)


class StepPart:
    """A part of a layer: what it multiplies its input with, and what the product of that.

    Attributes:
        inputs: Weights [out, in].
        output: Weight [d, in].
    """

    inputs: Sequence[Tensor | PackedWeight]
    output: Tensor | PackedWeight

    def __init__(self, inputs: Sequence[nn.Linear], output: nn.Linear) -> None:
        self.inputs, self.output = _weights(inputs), output.weight.detach()

    def pack(self, rows: int) -> None:
        """Pack the weights for that many rows, where it pays."""
        self.inputs = [pack(weight, rows) for weight in self.inputs]
        self.output = pack(self.output, rows)


class RetentionStep(StepPart):
    """``MultiScaleRetention`` for one token per row, its state updated in place."""

    def __init__(self, mixer: MultiScaleRetention) -> None:
        super().__init__(_same_input(mixer), mixer.o_proj)
        config = mixer.config
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
        return product(F.silu(gate) * out if self.gated else out, self.output)


def _read(q: Tensor, state: Tensor) -> Tensor:
    """q S: [B, H, 1, K], [B, H, K, V] -> [B, H, 1, V]."""
    rows, heads, _, width = q.shape
    # strides as of a matrix of one row, also where compilers think them irrelevant: see linear
    q = q.contiguous().as_strided((rows * heads, 1, width), (width, width, 1))
    return bmm(q, state.flatten(0, 1)).view(rows, heads, 1, -1)


class AttentionStep(StepPart):
    """``CausalAttention`` for one token per row, its keys and values appended to the cache."""

    def __init__(self, mixer: CausalAttention) -> None:
        super().__init__(_same_input(mixer), mixer.o_proj)
        self.heads = mixer.config.num_heads

    def __call__(self, x: Tensor, turn: Rotation, decay: Tensor, memory: KVLayer) -> Tensor:
        """[B, d] -> [B, d]; there is no decay in it."""
        rows, heads = x.shape[0], self.heads
        qkv = _project(x, self.inputs).view(rows, 3 * heads, 1, -1)
        q, k = turn(qkv[:, : 2 * heads]).to(qkv.dtype).split(heads, dim=1)
        keys, values = memory.append(k, qkv[:, 2 * heads :])
        out = F.scaled_dot_product_attention(q, keys, values)
        return product(out.view(rows, -1), self.output)


class FeedForwardStep(StepPart):
    """``FeedForward`` for few rows."""

    def __init__(self, ffn: FeedForward) -> None:
        super().__init__(_same_input(ffn), ffn.down_proj)
        self.gated = ffn.gate_proj is not None

    def __call__(self, x: Tensor) -> Tensor:
        inner = _project(x, self.inputs)
        if self.gated:
            gate, inner = inner.chunk(2, dim=1)
            return product(F.silu(gate) * inner, self.output)
        return product(F.gelu(inner), self.output)


def step_norm(norm: Any) -> Callable[[Tensor], Tensor]:
    """The norm without its module; ``make_norm`` knows two kinds."""
    weight = norm.weight.detach()
    if isinstance(norm, nn.LayerNorm):
        shape, bias, eps = norm.normalized_shape, norm.bias.detach(), norm.eps
        return lambda x: torch.layer_norm(x, shape, weight, bias, eps)
    assert isinstance(norm, nn.RMSNorm)
    shape, rms_eps = norm.normalized_shape, norm.eps
    return lambda x: torch.rms_norm(x, shape, weight, rms_eps)
