"""What a block has beside its mixer: norms and the feed-forward network."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .configuration import DecoderConfig
from .mixers.base import Part, State, Step
from .ops.precision import for_products


def make_norm(config: DecoderConfig) -> nn.Module:
    """A norm of the residual stream."""
    kind = nn.LayerNorm if config.norm == "layernorm" else nn.RMSNorm
    return kind(config.hidden_size, eps=config.norm_eps)


GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu, "geglu": F.gelu, "reglu": F.relu,
}  # fmt: skip


class FeedForwardStep(Step):
    """``FeedForward`` for one token per row."""

    def __init__(self, ffn: "FeedForward") -> None:
        self.activation = ffn.activation

    def __call__(self, joined: Tensor, shared: Any, state: State) -> Tensor:
        if self.activation is not None:
            gate, inner = joined.chunk(2, dim=1)
            return self.activation(gate) * inner
        return F.gelu(joined)


class FeedForward(Part):
    """gelu: W_down gelu(W_up x); swiglu: W_down (swish(W_gate x) * W_up x).

    geglu and reglu have gelu and relu in the place of swish.
    """

    joint = ("gate_proj", "up_proj")
    output = "down_proj"
    step = FeedForwardStep

    def __init__(self, config: DecoderConfig, layer_idx: int = 0) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.activation = GATES.get(config.ffn)
        self.gate_proj = None
        if self.activation is not None:
            self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(
        self, hidden: Tensor, shared: Any = None, state: State | None = None, mode: Any = None
    ) -> tuple[Tensor, State]:
        if self.activation is not None and self.gate_proj is not None:
            x = for_products(hidden)
            inner = self.activation(self.gate_proj(x)) * self.up_proj(x)
        else:
            inner = F.gelu(self.up_proj(hidden))
        return self.down_proj(inner), {}
