"""Causal softmax attention, the mixer of the Transformer, and its mask."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import KVCache, KVLayer
from .configuration import TransformerConfig
from .layers import MixerInputs, make_rotation, split_heads
from .linear import Linear
from .products import fast_products
from .sequence import TokenInfo


class CausalAttention(nn.Module):
    """Multi-head softmax attention with rotary positions."""

    def __init__(self, config: TransformerConfig, layer_idx: int = 0) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        hidden = config.hidden_size
        self.q_proj = Linear(hidden, hidden, bias=False)
        self.k_proj = Linear(hidden, hidden, bias=False)
        self.v_proj = Linear(hidden, hidden, bias=False)
        self.o_proj = Linear(hidden, hidden, bias=False)

    @staticmethod
    def shared_inputs(
        config: TransformerConfig, tokens: TokenInfo, hidden: Tensor, mask: Tensor | None = None
    ) -> MixerInputs:
        """What is the same for all layers of a forward pass."""
        turn = make_rotation(config, tokens.positions, hidden)
        return MixerInputs(tokens, turn, turn, mask=mask)

    def forward(
        self,
        hidden: Tensor,
        inputs: MixerInputs,
        memory: KVLayer | None = None,
        mode: str | None = None,
    ) -> tuple[Tensor, None]:
        """Mix the tokens of each row; ``memory`` is appended to. Returns [B, T, d] and None."""
        config = self.config
        q = split_heads(self.q_proj(hidden), config.num_heads)
        k = split_heads(self.k_proj(hidden), config.num_heads)
        v = split_heads(self.v_proj(hidden), config.num_heads)
        q, k = inputs.turn_queries(q).to(v.dtype), inputs.turn_keys(k).to(v.dtype)
        if memory is not None:
            k, v = memory.append(k, v)
        causal = inputs.mask is None and q.shape[2] > 1
        with fast_products(q.device):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=inputs.mask, is_causal=causal)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None


def attention_mask(tokens: TokenInfo, hidden: Tensor, cache: KVCache | None) -> Tensor | None:
    """Which columns each query may look at; the cache learns of padding and documents on the way.

    Returns:
        bool [B or 1, 1, T, past + T], or None where causality by itself is right.
    """
    batch, length = hidden.shape[:2]
    past = 0 if cache is None else cache.length
    column = torch.arange(past + length, device=hidden.device)
    query = column[past:, None]

    valid = tokens.valid
    earlier = None if cache is None else cache.valid
    if valid is not None or earlier is not None:
        if earlier is None:
            earlier = torch.ones(batch, past, dtype=torch.bool, device=hidden.device)
        if valid is None:
            valid = torch.ones(batch, length, dtype=torch.bool, device=hidden.device)
        valid = torch.cat((earlier, valid), dim=1)

    start = None if cache is None else cache.document_start
    if start is not None:
        start = start[:, None].expand(batch, length)
    if tokens.resets is not None:
        begin = torch.where(tokens.resets, column[past:], 0).cummax(1).values
        start = begin if start is None else torch.maximum(begin, start)

    if cache is not None:
        cache.valid = valid
        cache.document_start = None if start is None else start[:, -1]
    if valid is None and start is None:
        if past == 0 or length == 1:
            return None
        return (column <= query)[None, None]
    allowed = (column <= query)[None]
    if start is not None:
        allowed = allowed & (column >= start[..., None])
    if valid is not None:
        # padding sees itself, so that no query is left with nothing (softmax would give NaN)
        allowed = allowed & (valid[:, None] | (column == query))
    return allowed[:, None]
