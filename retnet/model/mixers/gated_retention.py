"""Gated retention, the next step of the RetNet's authors (gRet of YOCO, arXiv 2405.05254, 2.2).

Retention whose decay is a function of the token: g_t = sigmoid(x_t W_D)^(1/16) for each head. The
rest is retention's: rotated queries and keys, a norm of each head, a swish gate, the same state.
"""

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ..configuration import option
from ..documents import TokenInfo
from ..ops.precision import wide_dtype
from .base import State, make_rotation
from .retention import HeadOptions, MultiScaleRetention, RetentionShared, RetentionStep

ROOT = 16  # of the sigmoid: 1/2 becomes a decay of 0.96


class GatedRetentionOptions(HeadOptions):
    """As its authors have them: values as wide as queries, a norm without mean."""

    value_share: ClassVar[int] = 1

    head_norm: str = option("rmsnorm", "groupnorm, rmsnorm or none", meaning=True)


class GatedRetentionStep(RetentionStep):
    """``GatedRetention`` for one token per row."""

    def set_decay(self, config: Any) -> None:
        self.parts.append(config.num_heads)

    def take_decay(self, others: list[Tensor]) -> Tensor:
        return token_log_decay(others.pop()).exp()[:, :, None, None]


class GatedRetention(MultiScaleRetention):
    """``MultiScaleRetention`` with decays that the tokens decide on; its state is the same."""

    name = "gated_retention"
    options = GatedRetentionOptions
    joint = (*MultiScaleRetention.joint, "d_proj")
    exact = ("d_proj",)
    step = GatedRetentionStep

    def __init__(self, config: Any, layer_idx: int = 0) -> None:
        super().__init__(config, layer_idx)
        self.d_proj = nn.Linear(config.hidden_size, config.num_heads, bias=False)

    @classmethod
    def matrix_parameters(cls, config: Any) -> int:
        return super().matrix_parameters(config) + config.hidden_size * config.num_heads

    @classmethod
    def windows(cls, config: Any) -> list[float]:
        return []

    @classmethod
    def describe(cls, config: Any) -> list[str]:
        return ["decays      each token's own, of each head"]

    def shared(self, tokens: TokenInfo, memory: State) -> tuple[RetentionShared, State]:
        turn = make_rotation(self.config, tokens)
        scale = self.config.head_dim**-0.5
        return RetentionShared(turn, turn.scaled(scale), None, tokens), {}

    def log_decay(self, hidden: Tensor, shared: RetentionShared) -> Tensor:
        return token_log_decay(self.d_proj(hidden)).transpose(1, 2)


def token_log_decay(x: Tensor) -> Tensor:
    """ln sigmoid(x)^(1/16), in at least float32."""
    return F.logsigmoid(x.to(wide_dtype(x.dtype))) / ROOT
