"""Linear attention, the mixer of the linear Transformer (arXiv 2006.16236).

    o_t = phi(q_t) S_t / (phi(q_t) z_t + eps),   [S, z]_t = [S, z]_{t-1} + phi(k_t)^T [v_t, 1]

with phi(x) = elu(x) + 1: softmax attention whose weights exp(q k) are replaced by phi(q) phi(k), so
that all keys and values fit into a sum of constant size. Nothing is ever forgotten.

Queries and keys are rotated by their positions before phi, which keeps all weights positive; the
authors learned an embedding for each position instead (``positions: learned``). Such a rotation is
not relative: shifting a text changes its outputs.
"""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..configuration import option
from ..documents import TokenInfo, describe_tokens
from ..ops.linear_attention import (
    elu_features,
    linear_attention_chunkwise,
    linear_attention_parallel,
    linear_attention_recurrent,
    linear_attention_state,
    normalised,
    with_ones,
)
from ..ops.precision import full_precision
from ..ops.rotary import Rotation
from .attention import RotationOptions
from .base import (
    ProjectedMixer,
    RotaryStep,
    State,
    make_rotation,
    one_token_each,
    read_state,
    split_heads,
)


class LinearOptions(RotationOptions):
    """Rotation as attention's, so that the two differ in the mixer alone."""

    chunk_size: int = option(128, "chunk of the chunkwise form, changes speed only")

    def problems(self) -> list[str]:
        return super().problems() + self.check_size("chunk_size", most=None)


class LinearShared(NamedTuple):
    """What all layers of a pass share."""

    turn: Rotation  # of queries and keys
    tokens: TokenInfo


class LinearStep(RotaryStep):
    """``LinearAttention`` for one token per row, its state updated in place."""

    def __call__(self, joined: Tensor, shared: Rotation, state: State) -> Tensor:
        rows, heads = joined.shape[0], self.num_heads
        with full_precision(joined.device):
            qkv = joined.view(rows, 3 * heads, 1, -1)
            q, k = shared(qkv[:, : 2 * heads]).split(heads, dim=1)  # [B, H, 1, D]
            out = self.attend(q, k, with_ones(qkv[:, 2 * heads :].to(q.dtype)), state)
        return out.view(rows, -1).to(joined.dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, state: State) -> Tensor:
        """The outputs [B, H, 1, M]; v [B, H, 1, M + 1] has its column of ones."""
        q, k, memory = elu_features(q), elu_features(k), state["state"]
        memory.addcmul_(k.mT, v)
        return normalised(read_state(q, memory))


class LinearAttention(ProjectedMixer):
    """Linear attention with its projections and rotations.

    Its state: ``state`` [B, H, D, M + 1], sums and normalisers side by side, in float32 (float64 in
    a model of that).
    """

    name = "linear"
    options = LinearOptions
    modes = ("parallel", "chunkwise", "recurrent")
    positions = "rotary"
    rotates = True
    relative = False
    step: ClassVar[Any] = LinearStep

    def init_state(
        self, rows: int, device: torch.device, dtype: torch.dtype, capacity: int | None = None
    ) -> State:
        heads, width = self.config.num_heads, self.config.head_dim
        state = linear_attention_state(rows, heads, width, width, device=device, dtype=dtype)
        return {"state": state}

    def shared(self, tokens: TokenInfo, memory: State) -> tuple[LinearShared, State]:
        return LinearShared(make_rotation(self.config, tokens), tokens), {}

    def forward(
        self,
        hidden: Tensor,
        shared: LinearShared | None = None,
        state: State | None = None,
        mode: str | None = None,
    ) -> tuple[Tensor, State]:
        """Mix the tokens of each row; plain rows that begin at position 0 when nothing is shared.

        Arguments and results as in ``Part.forward``.
        """
        if shared is None:
            shared, _ = self.shared(describe_tokens(hidden), {})
        q, k, v = self.project(hidden)
        with full_precision(hidden.device):
            out, last = self.attend(
                shared.turn(q),
                shared.turn(k),
                v,
                state,
                mode or self.choose_mode(hidden.shape[1]),
                valid=shared.tokens.valid,
                resets=shared.tokens.resets,
            )
        return self.o_proj(out.transpose(1, 2).flatten(2).to(hidden.dtype)), last

    def token_weights(self, hidden: Tensor, shared: LinearShared) -> Tensor:
        q, k = (split_heads(f(hidden), self.config.num_heads) for f in (self.q_proj, self.k_proj))
        with full_precision(hidden.device):
            q, k, tokens = shared.turn(q), shared.turn(k), shared.tokens
            flags = {"valid": tokens.valid, "resets": tokens.resets}
            return self.attend(q, k, one_token_each(q), None, "parallel", **flags)[0]

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, state: State | None, mode: str, **flags: Any
    ) -> tuple[Tensor, State]:
        """[B, H, T, D] -> [B, H, T, M] and the state after the last token.

        ``flags`` are ``valid`` and ``resets``, as in ``TokenInfo``.
        """
        q, k = elu_features(q), elu_features(k)
        flags["initial_state"] = None if state is None else state["state"]
        if mode == "recurrent":
            out, last = linear_attention_recurrent(q, k, v, **flags)
        elif mode == "parallel":
            out, last = linear_attention_parallel(q, k, v, **flags)
        else:
            size = self.config.chunk_size
            out, last = linear_attention_chunkwise(q, k, v, chunk_size=size, **flags)
        return out, {"state": last}

    def choose_mode(self, length: int) -> str:
        """The fastest form for T tokens: recurrent for one, parallel for few, else chunkwise.

        As in ``MultiScaleRetention.choose_mode``: states between chunks pay from T = 2 D on.
        """
        if length == 1:
            return "recurrent"
        few = max(self.config.chunk_size, 2 * self.config.head_dim)
        return "parallel" if length <= few else "chunkwise"
