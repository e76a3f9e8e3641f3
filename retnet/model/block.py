"""A block of the decoder, mixer and feed-forward network; and what the blocks of a pass share."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .cache import State
from .configuration import DecoderConfig
from .documents import TokenInfo
from .layers import FeedForward, make_norm
from .mixers.base import Mixer, Part


class DecoderLayer(GradientCheckpointingLayer):
    """A pre-norm block: x + mixer(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, config: DecoderConfig, mixer: Mixer) -> None:
        super().__init__()
        self.mixer_norm = make_norm(config)
        self.mixer = mixer
        self.ffn_norm = make_norm(config)
        self.ffn = type(mixer).feed_forwards.get(config.ffn, FeedForward)(config, mixer.layer_idx)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden: Tensor,
        shared: "Shared",
        mixer_state: State | None = None,
        ffn_state: State | None = None,
        mode: str | None = None,
    ) -> tuple[Tensor, State, State]:
        """[B, T, d] -> [B, T, d] and the new states of the two parts."""
        mode = mode if mode in self.mixer.modes else None
        x = self.mixer_norm(hidden)
        x, mixer_state = self.mixer(x, shared.of(self.mixer), mixer_state, mode)
        hidden = hidden + self.dropout(x)
        x = self.ffn_norm(hidden)
        x, ffn_state = self.ffn(x, shared.of(self.ffn), ffn_state, None)
        return hidden + self.dropout(x), mixer_state, ffn_state


class Shared:
    """What the parts of a pass share, by class, and what is kept by row (see ``DecoderCache``)."""

    def __init__(self, layers: Iterable[Any], tokens: TokenInfo, rows: State) -> None:
        self.rows: State = {"record": tokens.record}
        self.by_class: dict[type[Part], Any] = {}
        for layer in layers:
            for part in (layer.mixer, layer.ffn):
                if type(part) not in self.by_class:
                    self.by_class[type(part)], kept = part.shared(tokens, rows)
                    self.rows |= kept

    def of(self, part: Part) -> Any:
        return self.by_class[type(part)]
