"""FAVOR+ attention, the mixer of the Performer (arXiv 2009.14794).

Linear attention whose features are random and positive, phi(x) = exp(W x' - |x'|^2 / 2) with
x' = x D^(-1/4): the average of phi(q) phi(k) over W is m exp(q k / sqrt(D)), softmax attention's
weight. W has blocks of orthogonal rows; each layer has one for all its heads, which is not trained.

Queries and keys are rotated before phi, as ``linear.py`` says; the authors learned an embedding for
each position (``positions: learned``).
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import initialization as init

from ..configuration import option
from ..ops.favor import (
    FavorState,
    favor_chunkwise,
    favor_parallel,
    favor_recurrent,
    favor_state,
    quotient,
)
from ..ops.precision import wide_dtype
from ..ops.random_features import favor_projection, key_features, query_features
from .base import State, read_state
from .linear import LinearAttention, LinearOptions, LinearStep


class PerformerOptions(LinearOptions):
    """The features of the Performer."""

    num_features: int = option(None, "random features of a head; null: floor(D ln D), D its width")
    feature_redraw_interval: int = option(
        None, "train.py draws the features anew every so many steps; null: never"
    )

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.num_features is None:
            self.num_features = max(1, math.floor(self.head_dim * math.log(self.head_dim)))

    def problems(self) -> list[str]:
        given = ("num_features", "feature_redraw_interval")
        keys = (key for key in given if getattr(self, key) is not None)
        return super().problems() + [text for key in keys for text in self.check_size(key)]


class PerformerStep(LinearStep):
    """``PerformerAttention`` for one token per row, its state updated in place."""

    def __init__(self, mixer: "PerformerAttention") -> None:
        super().__init__(mixer)
        scale = mixer.config.head_dim**-0.25
        self.projection = mixer.projection.detach().to(self.dtype) * scale

    def attend(self, q: Tensor, k: Tensor, v: Tensor, state: State) -> Tensor:
        q = query_features(q, self.projection)  # [B, H, 1, m]
        k, peak = key_features(k, self.projection, None)
        sums, maximum = state["sums"], state["maximum"][..., None]
        higher = torch.maximum(maximum, peak)  # [B, H, 1]
        kept, own = ((x - higher).exp()[..., None] for x in (maximum, peak))
        sums.mul_(kept).addcmul_((own * k).mT, v)
        maximum.copy_(higher)
        return quotient(read_state(q, sums))


class PerformerAttention(LinearAttention):
    """FAVOR+ attention with its projections, rotations and random features.

    Its state, in float32 (float64 in a model of that): ``sums`` [B, H, m, M + 1] in units of
    exp(``maximum``), ``maximum`` [B, H] the largest exponent of the keys so far.

    Attributes:
        projection: W [m, D], a buffer of float32 that is stored with the weights. A fresh model's
            is a function of torch's seed and the layer.
    """

    name = "performer"
    options = PerformerOptions
    step: ClassVar[Any] = PerformerStep
    wide = ("projection",)
    projection: Tensor

    def __init__(self, config: Any, layer_idx: int = 0) -> None:
        super().__init__(config, layer_idx)
        self.register_buffer("projection", self.draw().to(self.o_proj.weight.device))

    def draw(self, redraws: int = 0, seed: int | None = None) -> Tensor:
        """W after so many others, float32 [m, D] on the CPU; torch's own seed where none is given.

        It is the same in every process, and takes nothing from torch's random numbers. Without
        values on the meta device, like the rest of a model there.
        """
        config = self.config
        if self.o_proj.weight.is_meta:  # as a model is that is only looked at
            return torch.empty(config.num_features, config.head_dim, device="meta")
        return favor_projection(
            config.num_features,
            config.head_dim,
            seed=torch.initial_seed() if seed is None else seed,
            layer=self.layer_idx,
            redraws=redraws,
        )

    @classmethod
    @torch.no_grad()
    def initialize(cls, module: Any, role: str, config: Any) -> None:
        if isinstance(module, cls):
            init.copy_(module.projection, module.draw())
        super().initialize(module, role, config)

    @torch.no_grad()
    def after_step(self, step: int, seed: int) -> None:
        interval = self.config.feature_redraw_interval
        if interval is not None and self.training and step % interval == 0:
            self.projection.copy_(self.draw(step // interval, seed))

    @classmethod
    def carry_problems(cls, config: Any) -> list[str]:
        if config.feature_redraw_interval is None:
            return []
        return [
            f"can't be had with model.feature_redraw_interval ({config.feature_redraw_interval}), "
            "after which a state means nothing: set it to null"
        ]

    @classmethod
    def describe(cls, config: Any) -> list[str]:
        interval = config.feature_redraw_interval
        drawn = "drawn once" if interval is None else f"drawn anew every {interval} steps"
        return [f"features    {config.num_features} of each head, {drawn}"]

    def init_state(
        self, rows: int, device: torch.device, dtype: torch.dtype, capacity: int | None = None
    ) -> State:
        config = self.config
        sizes = rows, config.num_heads, config.num_features, config.head_dim
        return favor_state(*sizes, device=device, dtype=wide_dtype(dtype))._asdict()

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, state: State | None, mode: str, **flags: Any
    ) -> tuple[Tensor, State]:
        flags["initial_state"] = None if state is None else FavorState(**state)
        if mode == "recurrent":
            out, last = favor_recurrent(q, k, v, self.projection, **flags)
        elif mode == "parallel":
            out, last = favor_parallel(q, k, v, self.projection, **flags)
        else:
            flags["chunk_size"] = self.config.chunk_size
            out, last = favor_chunkwise(q, k, v, self.projection, **flags)
        return out, last._asdict()

    def choose_mode(self, length: int) -> str:
        """Recurrent for one token, else chunkwise, of which the parallel form is one chunk."""
        return "recurrent" if length == 1 else "chunkwise"
