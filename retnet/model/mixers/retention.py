"""Gated multi-scale retention, the mixer of the RetNet (arXiv 2307.08621, section 2.2).

    MSR(X) = (swish(X W_G) * GroupNorm(heads)) W_O                                    (equation 8)

Each head rotates its queries and keys by their position and retains with a decay of its own.
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ..configuration import DecoderConfig, nearest_multiple, option
from ..documents import TokenInfo, describe_tokens
from ..ops.decay import DECAY_SCHEDULES, head_log_decay, head_windows
from ..ops.gated_norm import HEAD_NORMS, gated_norm, head_norm, no_change
from ..ops.precision import for_products, full_precision, products_dtype, wide_dtype
from ..ops.retention import retention_chunkwise, retention_parallel, retention_recurrent
from ..ops.rotary import Rotation
from .attention import HybridOptions
from .base import (
    Mixer,
    RotaryStep,
    State,
    make_rotation,
    one_token_each,
    read_state,
    split_heads,
)


class HeadOptions(HybridOptions):
    """Keys of all retention.

    The head norm's eps is small, because retention outputs are small at a text's first tokens. The
    default chunk is what was measured to be fastest (benchmarks/RESULTS.md): 64, for heads of width
    128 and more 128.
    """

    value_share: ClassVar[int] = 2  # value_size / d where that is null

    value_size: int = option(None, "width of all values together; null: retention 2 d, gated d")
    head_norm: str = option("groupnorm", "groupnorm, rmsnorm or none", meaning=True)
    head_norm_eps: float = option(1e-6, "added to what the head norm divides by", meaning=True)
    head_norm_affine: bool = option(
        False, "learned weights after the head norm, one a channel, the same for all heads"
    )
    num_kv_heads: int = option(
        None, "heads of keys and values, each for several of queries; null: num_heads"
    )
    gate: bool = option(True, "the swish gate")
    chunk_size: int = option(
        None, "chunk of the chunkwise form, changes speed only; null: by head width"
    )

    def resolve(self) -> None:
        super().resolve()
        if self.value_size is None and isinstance(self.hidden_size, int):
            self.value_size = self.value_share * self.hidden_size

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.chunk_size is None:
            self.chunk_size = 64 if self.head_dim < 128 else 128
        if self.attention_layers is not None:
            self.attention_layers = sorted(self.attention_layers)

    @property
    def key_value_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.chunk_size is not None:
            problems += self.check_size("chunk_size", most=None)
        problems += self.check_choice("head_norm", HEAD_NORMS)
        problems += self.check_number("head_norm_eps", 0, 1)
        if isinstance(self.hidden_size, int):
            problems += self.check_size("value_size")
        for key in ("gate", "head_norm_affine"):
            if not isinstance(getattr(self, key), bool):
                problems.append(f"{key} ({getattr(self, key)!r}) must be true or false")
        if self.head_norm_affine is True and self.head_norm == "none":
            problems.append("head_norm_affine (True) needs a head_norm: take groupnorm or rmsnorm")
        if self.num_kv_heads is not None:
            problems += self.check_size("num_kv_heads")
        if not problems and self.num_heads % self.key_value_heads:
            problems.append(
                f"num_heads ({self.num_heads}) must be divisible by num_kv_heads "
                f"({self.num_kv_heads}): take {nearest_multiple(self.num_heads, self.num_kv_heads)}"
            )
        if not problems and self.value_size % self.num_heads:
            problems.append(
                f"value_size ({self.value_size}) must be divisible by num_heads "
                f"({self.num_heads}): take {nearest_multiple(self.value_size, self.num_heads)}"
            )
        return problems


class RetentionOptions(HeadOptions):
    """And retention's own: a decay of 1 is none, one number for all heads is single-scale."""

    decay: str | int | float = option(
        "paper", "paper, log_linear, or one number in (0, 1] for all heads", meaning=True
    )

    def problems(self) -> list[str]:
        problems = super().problems()
        if isinstance(self.decay, str):
            problems += [
                problem.replace("must be", "must be a number in (0, 1] or", 1)
                for problem in self.check_choice("decay", DECAY_SCHEDULES)
            ]
        elif isinstance(self.decay, bool) or not isinstance(self.decay, int | float):
            problems.append(f"decay ({self.decay!r}) must be a name or a number in (0, 1]")
        elif not 0 < self.decay <= 1:
            problems.append(f"decay ({self.decay!r}) must be above 0 and at most 1")
        return problems


class RetentionShared(NamedTuple):
    """What all layers of a pass share."""

    turn_queries: Rotation
    turn_keys: Rotation  # also scales them
    log_decay: Tensor | None  # ln g [H]; None where each token has its own
    tokens: TokenInfo


class RetentionStep(RotaryStep):
    """``MultiScaleRetention`` for one token per row, its state updated in place."""

    def __init__(self, mixer: "MultiScaleRetention") -> None:
        super().__init__(mixer)
        config = mixer.config
        self.key_heads, self.key_scale = config.key_value_heads, config.head_dim**-0.5
        self.norm = step_head_norm(mixer, self.dtype, self.theta.device)
        self.parts = [config.hidden_size + mixer.k_proj.out_features, mixer.v_proj.out_features]
        self.parts += [config.value_size] if config.gate else []
        self.set_decay(config)
        self.odd = sum(self.parts) % 2 == 1

    def set_decay(self, config: Any) -> None:
        """What decays need; where they are computed, they are the last of ``parts``."""
        log_decay = head_log_decay(config.decay, config.num_heads, self.theta.device)
        self.decay = log_decay.to(self.dtype).exp()[:, None, None]

    def take_decay(self, others: list[Tensor]) -> Tensor:
        """g [B or 1, H, 1, 1], taken out of the parts after the values."""
        return self.decay

    def __call__(self, joined: Tensor, shared: Rotation, state: State) -> Tensor:
        rows, heads, memory = joined.shape[0], self.num_heads, state["state"]
        qk, v, *others = joined.split_with_sizes(self.parts, dim=1)
        if self.odd:  # pairs must begin at even places
            qk = qk.contiguous()
        with full_precision(joined.device):
            qk = shared(qk.view(rows, heads + self.key_heads, 1, -1))
            q, k = qk.split_with_sizes([heads, self.key_heads], dim=1)
            k = for_each_query(k, heads).mT  # [B, H, K, 1]
            v = for_each_query(v.view(rows, self.key_heads, 1, -1), heads).to(memory.dtype)
            decay = self.take_decay(others)
            if torch.compiler.is_compiling():  # so the new state is written once, and not read
                own = (q * k.mT).sum(-1, keepdim=True) * self.key_scale
                out = read_state(q, memory) * decay + own * v
                memory.mul_(decay).addcmul_(k, v, value=self.key_scale)
            else:
                memory.mul_(decay).addcmul_(k, v, value=self.key_scale)
                out = read_state(q, memory)
            out = self.norm(out.view(rows, heads, -1))
        out = out.view(rows, -1).to(joined.dtype)
        return F.silu(others[0]).mul_(out) if others else out


def step_head_norm(
    mixer: "MultiScaleRetention", dtype: torch.dtype, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """The norm of a token's heads [B, H, V]; what it needs is made once."""
    kind, eps = mixer.config.head_norm, mixer.config.head_norm_eps
    if mixer.head_norm_weight is not None:
        weight = mixer.head_norm_weight.detach()
        return lambda x: head_norm(x, kind, eps) * weight
    if kind != "groupnorm":
        return lambda x: head_norm(x, kind, eps)
    shape = (mixer.config.value_size // mixer.config.num_heads,)
    one, zero = no_change(torch.empty(shape, dtype=dtype, device=device))
    return lambda x: torch.layer_norm(x, shape, one, zero, eps)


class MultiScaleRetention(Mixer):
    """Retention with its projections, rotations, head norm and gate.

    Its state: ``state`` [B, H, K, V], in float32 (float64 in a model of that).
    """

    name = "retention"
    options: ClassVar[type[DecoderConfig]] = RetentionOptions
    modes = ("parallel", "chunkwise", "recurrent")
    positions = "rotary"
    rotates = True
    joint: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "g_proj")
    step = RetentionStep

    def __init__(self, config: Any, layer_idx: int = 0) -> None:
        super().__init__(config, layer_idx)
        hidden, value = config.hidden_size, config.value_size
        width, kv_heads = value // config.num_heads, config.key_value_heads
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * width, bias=False)
        self.g_proj = nn.Linear(hidden, value, bias=False) if config.gate else None
        self.o_proj = nn.Linear(value, hidden, bias=False)
        self.head_norm_weight = nn.Parameter(torch.ones(width)) if config.head_norm_affine else None

    @classmethod
    def matrix_parameters(cls, config: Any) -> int:
        # W_Q is d x d, W_O and the gate's W_G are d x value_size, W_K and W_V the two by kv heads
        own, heads = config.key_value_heads, config.num_heads
        shared = own * (config.hidden_size // heads + config.value_size // heads)
        width = config.hidden_size + (1 + config.gate) * config.value_size + shared
        return int(config.hidden_size * width)

    @classmethod
    def grows(cls, config: Any) -> bool:
        return bool(config.attention_layers) and config.attention_window is None

    @classmethod
    def windows(cls, config: Any) -> list[float]:
        return head_windows(config.decay, config.num_heads)

    @classmethod
    def describe(cls, config: Any) -> list[str]:
        shown = ", ".join(f"{window:,.0f}" for window in cls.windows(config))
        return [f"windows     1/(1-decay) of the heads: {shown} tokens"]

    @classmethod
    def embedding_std(cls, config: Any) -> float:
        return config.hidden_size**-0.5

    @classmethod
    @torch.no_grad()
    def initialize(cls, module: nn.Module, role: str, config: Any) -> None:
        if not isinstance(module, MultiScaleRetention):
            super().initialize(module, role, config)
        elif module.head_norm_weight is not None:
            init.ones_(module.head_norm_weight)

    @classmethod
    def initialize_linear(cls, linear: nn.Linear, role: str, config: Any) -> None:
        """The official gains: Xavier uniform with 2^-2.5 for Q, K, V and G and 2^-1 for O; in the
        feed-forward network PyTorch's default."""
        if role in ("up_proj", "gate_proj", "down_proj"):
            init.kaiming_uniform_(linear.weight, a=5**0.5)
        else:
            init.xavier_uniform_(linear.weight, gain=2**-1 if role == "o_proj" else 2**-2.5)

    def init_state(
        self, rows: int, device: torch.device, dtype: torch.dtype, capacity: int | None = None
    ) -> State:
        config = self.config
        heads, values = config.num_heads, config.value_size // config.num_heads
        shape = (rows, heads, config.head_dim, values)
        return {"state": torch.zeros(shape, dtype=wide_dtype(dtype), device=device)}

    def shared(self, tokens: TokenInfo, memory: State) -> tuple[RetentionShared, State]:
        config = self.config
        turn = make_rotation(config, tokens)
        log_decay = head_log_decay(config.decay, config.num_heads, tokens.device)
        return RetentionShared(turn, turn.scaled(config.head_dim**-0.5), log_decay, tokens), {}

    def forward(
        self,
        hidden: Tensor,
        shared: RetentionShared | None = None,
        state: State | None = None,
        mode: str | None = None,
    ) -> tuple[Tensor, State]:
        """Mix the tokens of each row; plain rows that begin at position 0 when nothing is shared.

        Arguments and results as in ``Part.forward``.
        """
        config, heads = self.config, self.config.num_heads
        if shared is None:
            shared, _ = self.shared(describe_tokens(hidden), {})
        x, products = for_products(hidden), products_dtype(hidden.device)
        q = split_heads(self.q_proj(x), heads)
        k, v = (split_heads(f(x), config.key_value_heads) for f in (self.k_proj, self.v_proj))
        with full_precision(hidden.device):
            out, last = self._retain(
                shared.turn_queries(q),
                for_each_query(shared.turn_keys(k), heads),
                for_each_query(v, heads),
                self.log_decay(hidden, shared),
                mode or self.choose_mode(hidden.shape[1]),
                products,
                initial_state=None if state is None else state["state"],
                valid=shared.tokens.valid,
                resets=shared.tokens.resets,
            )
        gate = None
        if self.g_proj is not None:
            gate = self.g_proj(x).unflatten(2, (heads, -1))  # [B, T, H, V]
        with full_precision(hidden.device):
            out = gated_norm(out.transpose(1, 2), gate, config.head_norm, config.head_norm_eps)
            if self.head_norm_weight is not None:
                out = out * self.head_norm_weight
        return self.o_proj(out.flatten(2).to(x.dtype)), {"state": last}

    def token_weights(self, hidden: Tensor, shared: RetentionShared) -> Tensor:
        """Q K^T * D."""
        config, heads = self.config, self.config.num_heads
        q = split_heads(self.q_proj(hidden), heads)
        k = split_heads(self.k_proj(hidden), config.key_value_heads)
        with full_precision(hidden.device):
            q, k = shared.turn_queries(q), for_each_query(shared.turn_keys(k), heads)
            decay, tokens = self.log_decay(hidden, shared), shared.tokens
            weights, _ = retention_parallel(
                q, k, one_token_each(q), decay, valid=tokens.valid, resets=tokens.resets
            )
        return weights

    def log_decay(self, hidden: Tensor, shared: RetentionShared) -> Tensor:
        """ln g [H], or [B, H, T]."""
        assert shared.log_decay is not None
        return shared.log_decay

    def _retain(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        mode: str,
        products: torch.dtype | None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        if mode == "recurrent":
            return retention_recurrent(q, k, v, log_decay, **options)
        if mode == "parallel":
            return retention_parallel(q, k, v, log_decay, **options)
        size = self.config.chunk_size
        return retention_chunkwise(
            q, k, v, log_decay, chunk_size=size, products=products, **options
        )

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


def for_each_query(x: Tensor, heads: int) -> Tensor:
    """[B, H / n, T, D] of keys or values -> [B, H, T, D]: each for the n heads of queries of it."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)
