"""RWKV-4 (arXiv 2305.13048): attention-free, a decay and a bonus for each channel.

Both halves of its block read each token mixed with the one before, x_t and x_{t-1} being what the
block's norm gives, and mu a learned share of each channel:

    time mixing      r, k, v = W (mu * x_t + (1 - mu) * x_{t-1}), each with its own W and mu
                     W_O (sigmoid(r) * wkv(k, v))              (equations 11 to 13, 16, 17)
    channel mixing   W_down (relu(k)^2) * sigmoid(r)           (equations 14, 15, 18)

The second is the feed-forward network ``ffn: rwkv``; with ``gelu`` it is "time mix only", as the
RetNet paper compares it. Defaults and initialisation are those of its authors (RWKV-LM, RWKV-v4),
but for the output layer's, which all mixers share.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ..configuration import DecoderConfig, option
from ..documents import TokenInfo
from ..ops.precision import full_precision, wide_dtype
from ..ops.rwkv_init import channel_mix, time_decay, time_first, time_mix
from ..ops.wkv import (
    CHUNK_SIZE,
    WKVState,
    token_shift,
    wkv_chunkwise,
    wkv_init_state,
    wkv_recurrent,
    wkv_token,
)
from .base import Mixer, Part, State, Step, output_std


class RWKVOptions(DecoderConfig):
    """As its authors have them; the rest are the mixer's own values below."""

    norm_eps: float = option(1e-5, "added to what these norms divide by", meaning=True)
    chunk_size: int = option(
        CHUNK_SIZE, "chunk of the chunkwise form, changes speed only; null: by head width"
    )

    def resolve(self) -> None:
        super().resolve()
        if self.chunk_size is None:
            self.chunk_size = CHUNK_SIZE

    def problems(self) -> list[str]:
        problems = self.check_size("chunk_size", most=None)
        if self.chunk_size == 1:
            problems.append("chunk_size (1) must be at least 2")
        return super().problems() + problems


class Shifting(Part):
    """A part whose linear layers each read their own mixture of a token and the one before.

    ``mixes``: the names of the shares mu [d], in the order of ``joint``, the layers that read them.
    Its state has ``shift`` [B, d], the last token, of the activations' dtype.
    """

    mixes: ClassVar[tuple[str, ...]]

    def make_mixes(self, width: int) -> None:
        for name in self.mixes:
            setattr(self, name, nn.Parameter(torch.ones(width)))

    def init_state(
        self, rows: int, device: torch.device, dtype: torch.dtype, capacity: int | None = None
    ) -> State:
        return {"shift": torch.zeros(rows, self.config.hidden_size, device=device, dtype=dtype)}

    def project(self, hidden: Tensor, tokens: TokenInfo, state: State | None) -> Any:
        """The products of the ``joint`` layers [B, T, out], and the new shift."""
        previous = None if state is None else state["shift"]
        before, last = token_shift(hidden, previous, tokens.valid, tokens.resets)
        change = hidden - before
        names = zip(self.joint, self.mixes, strict=True)
        return [getattr(self, f)(before + getattr(self, mu) * change) for f, mu in names], last


class ShiftingStep(Step):
    """What the layers of a ``Shifting`` part read of one token per row."""

    def __init__(self, part: Shifting) -> None:
        self.mixes = [getattr(part, name).detach() for name in part.mixes]

    def inputs(self, x: Tensor, state: State) -> Sequence[Tensor]:
        before = state["shift"]
        change = x - before
        mixed = [torch.addcmul(before, mu, change) for mu in self.mixes]
        before.copy_(x)
        return mixed


class TimeMixingStep(ShiftingStep):
    """``TimeMixing`` for one token per row, its state updated in place."""

    def __init__(self, mixer: "TimeMixing") -> None:
        super().__init__(mixer)
        dtype = wide_dtype(mixer.time_decay.dtype)
        self.decay = mixer.time_decay.detach().to(dtype).exp()
        self.bonus = mixer.time_first.detach().to(dtype)

    def __call__(self, joined: Tensor, shared: Any, state: State) -> Tensor:
        r, k, v = joined.chunk(3, dim=1)
        sums = state["num"], state["den"], state["max"]
        with full_precision(joined.device):
            k, v = k.to(sums[0].dtype), v.to(sums[0].dtype)
            out, after = wkv_token(k, v, self.decay, self.bonus, *sums)
        for old, new in zip(sums, after, strict=True):
            old.copy_(new)
        return torch.sigmoid(r) * out.to(joined.dtype)


class ChannelMixingStep(ShiftingStep):
    """``ChannelMixing`` for one token per row."""

    def __init__(self, ffn: "ChannelMixing") -> None:
        super().__init__(ffn)
        self.width = ffn.config.hidden_size

    def gate(self, joined: Tensor) -> Tensor:
        return torch.sigmoid(joined[:, : self.width])

    def __call__(self, joined: Tensor, shared: Any, state: State) -> Tensor:
        return F.relu(joined[:, self.width :]).square()


class ChannelMixing(Shifting):
    """RWKV's feed-forward network, ``ffn: rwkv``; its state is the shift."""

    squares = 1  # W_r
    matrices = 2
    joint = ("r_proj", "up_proj")
    mixes = ("mix_r", "mix_k")
    output = "down_proj"
    step = ChannelMixingStep

    def __init__(self, config: Any, layer_idx: int = 0) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        hidden, inner = config.hidden_size, config.intermediate_size
        self.make_mixes(hidden)
        self.r_proj = nn.Linear(hidden, hidden, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def vectors(self) -> dict[str, Tensor]:
        """What the vectors start from."""
        config = self.config
        mixes = channel_mix(self.layer_idx, config.num_hidden_layers, config.hidden_size)
        return {f"mix_{name}": mu for name, mu in mixes.items()}

    def forward(
        self, hidden: Tensor, shared: Any, state: State | None = None, mode: str | None = None
    ) -> tuple[Tensor, State]:
        (r, k), last = self.project(hidden, shared, state)
        return torch.sigmoid(r) * self.down_proj(F.relu(k).square()), {"shift": last}


class TimeMixing(Shifting, Mixer):
    """RWKV's mixer.

    Its state: ``shift`` [B, d], and the sums ``num``, ``den``, ``max`` [B, d] of ``ops.wkv`` in
    float32 (float64 in a model of that). Decay and bonus are never below float32.
    """

    name = "rwkv"
    options: ClassVar[type[DecoderConfig]] = RWKVOptions
    modes = ("chunkwise", "recurrent")
    ffn = "rwkv"
    embedding_norm = True
    feed_forwards: ClassVar[dict[str, Any]] = {"rwkv": ChannelMixing}
    unused = ("num_heads", "rotary_layout", "rotary_frequencies")
    joint = ("r_proj", "k_proj", "v_proj")
    mixes = ("mix_r", "mix_k", "mix_v")
    wide = ("time_decay", "time_first")
    step = TimeMixingStep

    def __init__(self, config: Any, layer_idx: int = 0) -> None:
        super().__init__(config, layer_idx)
        hidden, dtype = config.hidden_size, wide_dtype(torch.get_default_dtype())
        self.time_decay = nn.Parameter(torch.zeros(hidden, dtype=dtype))
        self.time_first = nn.Parameter(torch.zeros(hidden, dtype=dtype))
        self.make_mixes(hidden)
        self.r_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, hidden, bias=False)
        self.v_proj = nn.Linear(hidden, hidden, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    @classmethod
    def matrix_parameters(cls, config: Any) -> int:
        return 4 * config.hidden_size**2

    @classmethod
    def describe(cls, config: Any) -> list[str]:
        return ["decays      learned for each channel, at first over 1 to 148 tokens"]

    @classmethod
    @torch.no_grad()
    def initialize(cls, module: nn.Module, role: str, config: Any) -> None:
        if isinstance(module, TimeMixing | ChannelMixing):
            for name, value in module.vectors().items():
                init.copy_(getattr(module, name), value)
        elif role == "embed_tokens":
            weight = cast(nn.Embedding, module).weight
            if config.tie_word_embeddings:  # normed it makes the token itself likely: by std * d
                init.normal_(weight, std=min(output_std(config), 4 / config.hidden_size))
            else:
                init.orthogonal_(weight, gain=1e-4 * max(weight.shape) ** 0.5)
        else:
            super().initialize(module, role, config)

    @classmethod
    def initialize_linear(cls, linear: nn.Linear, role: str, config: Any) -> None:
        """Zero, but for what gives values their width; other feed-forward networks as GPT-2's."""
        if role in ("k_proj", "r_proj", "o_proj") or (role, config.ffn) == ("down_proj", "rwkv"):
            init.zeros_(linear.weight)
        elif role == "v_proj" or (role, config.ffn) == ("up_proj", "rwkv"):
            outputs, inputs = linear.weight.shape
            init.orthogonal_(linear.weight, gain=max(1.0, outputs / inputs) ** 0.5)
        else:
            super().initialize_linear(linear, role, config)

    def vectors(self) -> dict[str, Tensor]:
        """What the vectors start from."""
        place = self.layer_idx, self.config.num_hidden_layers, self.config.hidden_size
        mixes = {f"mix_{name}": mu for name, mu in time_mix(*place).items()}
        first = time_first(self.config.hidden_size)
        return mixes | {"time_decay": time_decay(*place), "time_first": first}

    def init_state(
        self, rows: int, device: torch.device, dtype: torch.dtype, capacity: int | None = None
    ) -> State:
        sums = wkv_init_state(rows, self.config.hidden_size, device, dtype)._asdict()
        return super().init_state(rows, device, dtype) | sums

    def forward(
        self, hidden: Tensor, shared: TokenInfo, state: State | None = None, mode: str | None = None
    ) -> tuple[Tensor, State]:
        (r, k, v), last = self.project(hidden, shared, state)
        options: dict[str, Any] = {"valid": shared.valid, "resets": shared.resets}
        if state is not None:
            options["initial_state"] = WKVState(state["num"], state["den"], state["max"])
        vectors = self.time_decay, self.time_first
        if (mode or self.choose_mode(hidden.shape[1])) == "recurrent":
            out, sums = wkv_recurrent(k, v, *vectors, **options)
        else:
            size = self.config.chunk_size
            out, sums = wkv_chunkwise(k, v, *vectors, chunk_size=size, **options)
        out = torch.sigmoid(r) * out.to(hidden.dtype)
        return self.o_proj(out), {"shift": last, **sums._asdict()}

    def choose_mode(self, length: int) -> str:
        """The faster form for T tokens: for one there is nothing to do side by side."""
        return "recurrent" if length == 1 else "chunkwise"
