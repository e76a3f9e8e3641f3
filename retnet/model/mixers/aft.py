"""The attention-free transformer (arXiv 2105.14103), without heads: each channel by itself.

    y_t = sigmoid(q_t) * sum_{s <= t} e^(k_s + w_ts) v_s / sum_{s <= t} e^(k_s + w_ts)

with w = u v^T, of absolute positions: everywhere (full), where t - s is less than a window, and 0
elsewhere (local), or 0 (simple). Beyond the last position of u and v nothing is defined.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ..configuration import DecoderConfig, option
from ..documents import TokenInfo
from ..ops.aft import aft_parallel, aft_recurrent
from ..ops.aft_state import aft_state
from ..ops.precision import for_products
from .base import ProjectedMixer, State, Step

VARIANTS = ("local", "simple", "full")
USUAL_WINDOW = 32  # the best of the paper's on enwik8 (Table 5)
BIAS_STD = 0.1


class AFTOptions(DecoderConfig):
    """The variant, and the form of w."""

    aft_variant: str = option("local", "where w is: local, simple (nowhere) or full", meaning=True)
    aft_window: int = option(
        None, "how far the local variant's w reaches; null: 32, or seq_len if less", meaning=True
    )
    aft_rank: int = option(64, "rank of w")

    def resolve(self) -> None:
        super().resolve()
        longest = self.max_position_embeddings
        if self.aft_window is None and self.aft_variant == "local" and isinstance(longest, int):
            self.aft_window = min(USUAL_WINDOW, longest)

    def problems(self) -> list[str]:
        problems = super().problems()
        problems += self.check_choice("aft_variant", VARIANTS)
        problems += self.check_size("aft_rank")
        if self.aft_window is None:
            return problems
        problems += self.check_size("aft_window")
        if self.aft_variant in ("simple", "full"):
            problems.append(
                f"aft_window ({self.aft_window!r}) has no meaning with aft_variant "
                f"({self.aft_variant!r}): leave it out, or take local"
            )
        elif not problems and self.aft_window > self.max_position_embeddings:
            problems.append(
                f"aft_window ({self.aft_window}) must be at most max_position_embeddings "
                f"({self.max_position_embeddings}), which training sets to data.seq_len"
            )
        return problems

    @property
    def reach(self) -> int | None:
        """How far w reaches: 0 nowhere, None everywhere."""
        return {"simple": 0, "full": None}.get(self.aft_variant, self.aft_window)


class StepShared(NamedTuple):
    """What all layers share at one token."""

    positions: Tensor  # int64 [B, 1]
    past: int


class AFTStep(Step):
    """``AttentionFree`` for one token per row, its state updated in place."""

    def __init__(self, mixer: "AttentionFree") -> None:
        self.reach = mixer.config.reach
        self.w = [None if w is None else w.detach() for w in mixer.w]

    def shared(self, positions: Tensor, length: int) -> StepShared:
        return StepShared(positions[:, None], length)

    def __call__(self, joined: Tensor, shared: StepShared, state: State) -> Tensor:
        out, new = aft_recurrent(
            *joined[:, None].chunk(3, dim=2),
            shared.positions,
            *self.w,
            window=self.reach,
            initial_state=state,
            past=shared.past,
        )
        if self.reach is None:  # written where there was room
            state |= new
        else:
            for name, x in new.items():
                state[name].copy_(x)
        return out[:, 0].to(joined.dtype)


class AttentionFree(ProjectedMixer):
    """AFT with its projections; its state is described in ``ops.aft``.

    Attributes:
        w_u, w_v: [T_max, rank], of a query's and of a key's position; None for simple.
    """

    name = "aft"
    options = AFTOptions
    modes = ("parallel", "recurrent")
    positions = "learned"
    unused = ("num_heads", "rotary_layout", "rotary_frequencies")
    step = AFTStep
    no_matrices = ("w_u", "w_v")

    def __init__(self, config: Any, layer_idx: int = 0) -> None:
        super().__init__(config, layer_idx)
        self.w_u: nn.Parameter | None = None
        self.w_v: nn.Parameter | None = None
        if config.reach != 0:
            shape = config.max_position_embeddings, config.aft_rank
            self.w_u, self.w_v = (nn.Parameter(torch.empty(shape)) for _ in range(2))

    @property
    def w(self) -> tuple[Tensor | None, Tensor | None]:
        return self.w_u, self.w_v

    @classmethod
    def growing(cls, config: Any) -> tuple[str, ...]:
        return ("keys", "values", "positions") if config.aft_variant == "full" else ()

    @classmethod
    def bounded(cls, config: Any) -> bool:
        return bool(config.aft_variant != "simple")

    @classmethod
    def matrix_parameters(cls, config: Any) -> int:
        w = 0 if config.reach == 0 else 2 * config.max_position_embeddings * config.aft_rank
        return super().matrix_parameters(config) + w

    @classmethod
    def describe(cls, config: Any) -> list[str]:
        if config.reach == 0:
            return ["biases      none, no position has a weight of its own"]
        reach = "everywhere" if config.reach is None else f"the last {config.reach:,} tokens"
        return [f"biases      of pairs of positions, {reach}, rank {config.aft_rank}"]

    @classmethod
    def initialize(cls, module: nn.Module, role: str, config: Any) -> None:
        if isinstance(module, AttentionFree):
            for w in module.w:
                if w is not None:
                    init.normal_(w, std=BIAS_STD)
        super().initialize(module, role, config)

    def init_state(
        self, rows: int, device: torch.device, dtype: torch.dtype, capacity: int | None = None
    ) -> State:
        return aft_state(
            rows,
            self.config.hidden_size,
            window=self.config.reach,
            capacity=capacity or 0,
            dtype=dtype,
            device=device,
        )

    def forward(
        self,
        hidden: Tensor,
        shared: TokenInfo,
        state: State | None = None,
        mode: str | None = None,
    ) -> tuple[Tensor, State]:
        mode = mode or ("recurrent" if hidden.shape[1] == 1 else "parallel")
        mix = aft_recurrent if mode == "recurrent" else aft_parallel
        x = for_products(hidden)
        out, state = mix(
            self.q_proj(x),
            self.k_proj(x),
            self.v_proj(x),
            shared.positions,
            *self.w,
            window=self.config.reach,
            initial_state=state,
            past=shared.past,
            valid=shared.valid,
            resets=shared.resets,
        )
        return self.o_proj(out.to(hidden.dtype)), state
