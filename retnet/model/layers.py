"""The parts of a block: norms, retention as a mixer, the feed-forward network."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import RetentionLayer
from .configuration import DecoderConfig, RetNetConfig
from .decay import head_log_decay
from .gated import GatedPlan, gated_retention, takes_one_pass
from .linear import Linear
from .precision import full_precision
from .retention import retention_chunkwise, retention_parallel, retention_recurrent
from .rotary import Rotation, rotary_angles, rotation
from .sequence import TokenInfo, describe_tokens

MODES = ("parallel", "chunkwise", "recurrent")


@dataclass(frozen=True)
class MixerInputs:
    """What all mixers of one forward pass share, computed once.

    Attributes:
        tokens: Validity, documents and positions.
        turn_queries, turn_keys: Their rotations, in float32 or wider; retention's keys also get
            their scale from it.
        log_decay: [H], for retention.
        mask: bool [B or 1, 1, T, past + T], True where a query may look, for attention; None when
            plain causality says it all.
        plans: How retention in one pass goes, at most one; the first layer makes it.
    """

    tokens: TokenInfo
    turn_queries: Rotation
    turn_keys: Rotation
    log_decay: Tensor | None = None
    mask: Tensor | None = None
    plans: list[GatedPlan] = field(default_factory=list)


def make_rotation(config: DecoderConfig, positions: Tensor, like: Tensor) -> Rotation:
    """The rotation of these positions, in at least float32, on the device of ``like``."""
    angles = rotary_angles(
        positions,
        config.head_dim,
        frequencies=config.rotary_frequencies,
        base=config.rotary_base,
    )
    wide = torch.promote_types(like.dtype, torch.float32)
    return Rotation(*rotation(angles, wide, like.device), config.rotary_layout)


def make_norm(config: DecoderConfig) -> nn.Module:
    """A norm of the residual stream."""
    kind = nn.LayerNorm if config.norm == "layernorm" else nn.RMSNorm
    return kind(config.hidden_size, eps=config.norm_eps)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, T, H * D] -> [B, H, T, D]."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def head_norm(x: Tensor, kind: str, eps: float) -> Tensor:
    """Normalise the last dimension: each head of each token by itself, no learned parameters."""
    if kind == "groupnorm":
        return F.layer_norm(x, x.shape[-1:], eps=eps)
    if kind == "rmsnorm":
        return F.rms_norm(x, x.shape[-1:], eps=eps)
    return x


class MultiScaleRetention(nn.Module):
    """Gated multi-scale retention: MSR(X) = (swish(X W_G) * GroupNorm(heads)) W_O (equation 8)."""

    def __init__(self, config: RetNetConfig, layer_idx: int = 0) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        hidden, value = config.hidden_size, config.value_size
        self.q_proj = Linear(hidden, hidden, bias=False)
        self.k_proj = Linear(hidden, hidden, bias=False)
        self.v_proj = Linear(hidden, value, bias=False)
        self.g_proj = Linear(hidden, value, bias=False) if config.gate else None
        self.o_proj = Linear(value, hidden, bias=False)

    @staticmethod
    def shared_inputs(config: RetNetConfig, tokens: TokenInfo, hidden: Tensor) -> MixerInputs:
        """What is the same for all layers of a forward pass."""
        turn = make_rotation(config, tokens.positions, hidden)
        log_decay = head_log_decay(config.decay, config.num_heads, hidden.device)
        return MixerInputs(tokens, turn, turn.scaled(config.head_dim**-0.5), log_decay=log_decay)

    def forward(
        self,
        hidden: Tensor,
        inputs: MixerInputs | None = None,
        memory: RetentionLayer | None = None,
        mode: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mix the tokens of each row.

        Args:
            hidden: [B, T, d].
            inputs: From ``shared_inputs``; plain rows that begin at position 0 when None.
            memory: The state of the earlier calls; read, not written.
            mode: "parallel", "chunkwise", "recurrent", or None for the fastest right one.

        Returns:
            [B, T, d], and the state [B, H, K, V] after the last token.
        """
        config = self.config
        if inputs is None:
            tokens = describe_tokens(hidden.shape[0], hidden.shape[1], hidden.device)
            inputs = self.shared_inputs(config, tokens, hidden)
        heads = config.num_heads
        q = split_heads(self.q_proj(hidden), heads)
        k = split_heads(self.k_proj(hidden), heads)
        v = split_heads(self.v_proj(hidden), heads)
        gate = None if self.g_proj is None else self.g_proj(hidden)
        mode = mode or self.choose_mode(hidden.shape[1])
        state = None if memory is None else memory.state
        with full_precision(hidden.device):
            if mode == "chunkwise" and takes_one_pass(inputs.log_decay, q, v, gate, state):
                plan = self._plan(inputs, q)
                out, state = gated_retention(q, k, v, gate, plan, state)
            else:
                q, k = inputs.turn_queries(q), inputs.turn_keys(k)
                out, state = self._retain(q, k, v, inputs, state, mode)
                out = head_norm(out.transpose(1, 2), config.head_norm, config.head_norm_eps)
                out = out.flatten(2).to(hidden.dtype)  # [B, T, H * V]
                out = out if gate is None else F.silu(gate) * out
        return self.o_proj(out), state

    def _plan(self, inputs: MixerInputs, q: Tensor) -> GatedPlan:
        config = self.config
        if not inputs.plans:
            assert inputs.log_decay is not None
            plan = GatedPlan(
                inputs.log_decay.to(q.dtype),
                config.chunk_size,
                q.shape[0],
                q.shape[2],
                inputs.tokens.valid,
                inputs.tokens.resets,
                turns=(inputs.turn_queries, inputs.turn_keys),
                norm=config.head_norm,
                eps=config.head_norm_eps,
            )
            inputs.plans.append(plan)
        return inputs.plans[0]

    def _retain(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        inputs: MixerInputs,
        state: Tensor | None,
        mode: str,
    ) -> tuple[Tensor, Tensor]:
        assert inputs.log_decay is not None
        options: dict[str, Any] = {
            "initial_state": state,
            "valid": inputs.tokens.valid,
            "resets": inputs.tokens.resets,
        }
        if mode == "recurrent":
            return retention_recurrent(q, k, v, inputs.log_decay, **options)
        if mode == "parallel":
            return retention_parallel(q, k, v, inputs.log_decay, **options)
        chunk_size = self.config.chunk_size
        return retention_chunkwise(q, k, v, inputs.log_decay, chunk_size=chunk_size, **options)

    def choose_mode(self, length: int) -> str:
        """The fastest form for T tokens: recurrent for one, parallel for few, else chunkwise.

        Per token and head all pairs cost about 3 T V operations, chunks (3 C + 4 K) V, with states
        between them that have to be written and read: as measured, they pay from T = 2 K on
        (``python -m benchmarks.speed forms``). One chunk is the parallel form anyhow.
        """
        if length == 1:
            return "recurrent"
        few = max(self.config.chunk_size, 2 * self.config.head_dim)
        return "parallel" if length <= few else "chunkwise"


class FeedForward(nn.Module):
    """gelu: W_down gelu(W_up x); swiglu: W_down (swish(W_gate x) * W_up x)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        gated = config.ffn == "swiglu"
        self.gate_proj = Linear(hidden, inner, bias=False) if gated else None
        self.up_proj = Linear(hidden, inner, bias=False)
        self.down_proj = Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d] -> [B, T, d]."""
        if self.gate_proj is not None:
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(F.gelu(self.up_proj(x)))
