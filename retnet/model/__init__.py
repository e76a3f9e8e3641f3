"""The network: configurations, retention, the two models and their memories."""

from .cache import KVCache, RetentionCache
from .configuration import RetNetConfig, TransformerConfig
from .layers import MultiScaleRetention
from .modeling import RetNetForCausalLM, TransformerForCausalLM
from .retention import retention_chunkwise, retention_parallel, retention_recurrent

__all__ = [
    "KVCache",
    "MultiScaleRetention",
    "RetNetConfig",
    "RetNetForCausalLM",
    "RetentionCache",
    "TransformerConfig",
    "TransformerForCausalLM",
    "retention_chunkwise",
    "retention_parallel",
    "retention_recurrent",
]
