"""The mixers, by the name that ``model.mixer`` takes; one file each, ``base`` is their contract.

Everything that lists mixers reads this table when it is asked.
"""

from .aft import AttentionFree
from .attention import CausalAttention
from .base import Mixer
from .gated_retention import GatedRetention
from .linear import LinearAttention
from .performer import PerformerAttention
from .retention import MultiScaleRetention
from .rwkv import TimeMixing

MIXERS: dict[str, type[Mixer]] = {
    "retention": MultiScaleRetention,
    "attention": CausalAttention,
    "linear": LinearAttention,
    "performer": PerformerAttention,
    "aft": AttentionFree,
    "rwkv": TimeMixing,
    "gated_retention": GatedRetention,
}
