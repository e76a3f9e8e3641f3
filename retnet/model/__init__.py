"""The network: everything that travels with a checkpoint. It imports nothing else of the package.

``ops`` are pure functions, ``mixers`` what mixes a row's tokens, ``decoder`` the skeleton around
them, ``models`` the public classes; ``fast_decode`` is speed for one token and may be left out.
"""

from .cache import DecoderCache
from .mixers import MIXERS
from .mixers.retention import MultiScaleRetention
from .models import (
    AFTConfig,
    AFTForCausalLM,
    GatedRetNetConfig,
    GatedRetNetForCausalLM,
    LinearTransformerConfig,
    LinearTransformerForCausalLM,
    PerformerConfig,
    PerformerForCausalLM,
    RetNetConfig,
    RetNetForCausalLM,
    RWKVConfig,
    RWKVForCausalLM,
    TransformerConfig,
    TransformerForCausalLM,
)
from .ops.retention import retention_chunkwise, retention_parallel, retention_recurrent

__all__ = [
    "MIXERS",
    "AFTConfig",
    "AFTForCausalLM",
    "DecoderCache",
    "GatedRetNetConfig",
    "GatedRetNetForCausalLM",
    "LinearTransformerConfig",
    "LinearTransformerForCausalLM",
    "MultiScaleRetention",
    "PerformerConfig",
    "PerformerForCausalLM",
    "RWKVConfig",
    "RWKVForCausalLM",
    "RetNetConfig",
    "RetNetForCausalLM",
    "TransformerConfig",
    "TransformerForCausalLM",
    "retention_chunkwise",
    "retention_parallel",
    "retention_recurrent",
]
