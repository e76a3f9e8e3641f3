"""What a block has beside its mixer: norms and the feed-forward network."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .configuration import DecoderConfig
from .mixers.base import Part, State, Step


def make_norm(config: DecoderConfig) -> nn.Module:
    """A norm of the residual stream."""
    kind = nn.LayerNorm if config.norm == "layernorm" else nn.RMSNorm
    return kind(config.hidden_size, eps=config.norm_eps)


class FeedForwardStep(Step):
    """``FeedForward`` for one token per row."""

    def __init__(self, ffn: "FeedForward") -> None:
        self.gated = ffn.gate_proj is not None

    def __call__(self, joined: Tensor, shared: Any, state: State) -> Tensor:
        if self.gated:
            gate, inner = joined.chunk(2, dim=1)
            return F.silu(gate) * inner
        return F.gelu(joined)


class FeedForward(Part):
    """gelu: W_down gelu(W_up x); swiglu: W_down (swish(W_gate x) * W_up x)."""

    joint = ("gate_proj", "up_proj")
    output = "down_proj"
    step = FeedForwardStep

    def __init__(self, config: DecoderConfig, layer_idx: int = 0) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        gated = config.ffn == "swiglu"
        self.gate_proj = nn.Linear(hidden, inner, bias=False) if gated else None
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(
        self, hidden: Tensor, shared: Any = None, state: State | None = None, mode: Any = None
    ) -> tuple[Tensor, State]:
        if self.gate_proj is not None:
            inner = F.silu(self.gate_proj(hidden)) * self.up_proj(hidden)
        else:
            inner = F.gelu(self.up_proj(hidden))
        return self.down_proj(inner), {}
