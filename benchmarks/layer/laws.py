"""What the costs of one layer grow with, as the surveys have it, without constants.

T length, d width of the only head, C chunk, m features, s window. Inputs and outputs, T d numbers,
belong to no law of space, and projections to none of time. Sizes are the repository's defaults.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from retnet.model.models import model_class

Count = Callable[[int, int], float]  # of T and d


def config_of(mixer: str, width: int, **values: Any) -> Any:
    """The mixer's defaults for one head of this width; a ``ValueError`` for an impossible one."""
    kind: Any = model_class(mixer)
    shared = {"hidden_size": width, "num_heads": 1, "num_hidden_layers": 1}
    return kind.config_class(**shared, intermediate_size=width, **values)  # no such network here


@dataclass(frozen=True)
class Law:
    """What a cost grows with: in words, and as a number."""

    text: str
    count: Count


def _chunk(mixer: str, width: int) -> int:
    size: int = config_of(mixer, width).chunk_size
    return size


def _features(width: int) -> int:
    size: int = config_of("performer", width).num_features
    return size


def _window(length: int, width: int) -> int:
    size: int = config_of("aft", width, max_position_embeddings=length).aft_window
    return size


def chunks(mixer: str) -> tuple[Law, Law]:
    def time(t: int, d: int) -> float:
        return t * (_chunk(mixer, d) + d) * d

    def space(t: int, d: int) -> float:
        return t * _chunk(mixer, d) + t / _chunk(mixer, d) * d * d

    return Law("T (C + d) d", time), Law("T C + (T/C) d^2", space)


def _performer(t: int, d: int) -> float:
    m, c = _features(d), _chunk("performer", d)
    return t * m * (d + c) + t * c * d


PAIRS = Law("T^2 d", lambda t, d: t * t * d)
SCORES = Law("T^2", lambda t, d: t * t)
FLASH = Law("T", lambda t, d: t)
CHANNELS = Law("T d", lambda t, d: t * d)
STATE = Law("d^2", lambda t, d: d * d)
STEPS = Law("T d^2", lambda t, d: t * d * d)
FEATURES = Law("T d + d^2", lambda t, d: t * d + d * d)
PERFORMER = Law("T m (d + C) + T C d", _performer)
PERFORMER_SPACE = Law(
    "T m + (T/C) m d", lambda t, d: t * _features(d) * (1 + d / _chunk("performer", d))
)
WINDOW = Law("T s d", lambda t, d: t * _window(t, d) * d)
CHANNELS_AND_W = Law("T d + T^2", lambda t, d: t * d + t * t)
