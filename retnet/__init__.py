"""Train, run and understand Retentive Networks (RetNet, arXiv 2307.08621)."""

from transformers import AutoConfig, AutoModelForCausalLM

from .model import (
    MultiScaleRetention,
    RetNetConfig,
    RetNetForCausalLM,
    TransformerConfig,
    TransformerForCausalLM,
)

__version__ = "0.1.0"

__all__ = [
    "MultiScaleRetention",
    "RetNetConfig",
    "RetNetForCausalLM",
    "TransformerConfig",
    "TransformerForCausalLM",
]

AutoConfig.register(RetNetConfig.model_type, RetNetConfig, exist_ok=True)
AutoModelForCausalLM.register(RetNetConfig, RetNetForCausalLM, exist_ok=True)
AutoConfig.register(TransformerConfig.model_type, TransformerConfig, exist_ok=True)
AutoModelForCausalLM.register(TransformerConfig, TransformerForCausalLM, exist_ok=True)
