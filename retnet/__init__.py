"""Train, run and understand Retentive Networks (RetNet, arXiv 2307.08621)."""

from transformers import AutoConfig, AutoModelForCausalLM

from .model import (
    MultiScaleRetention,
    RetNetConfig,
    RetNetForCausalLM,
    TransformerConfig,
    TransformerForCausalLM,
)
from .model.models import PUBLIC, configuration

__version__ = "0.1.0"

__all__ = [
    "MultiScaleRetention",
    "RetNetConfig",
    "RetNetForCausalLM",
    "TransformerConfig",
    "TransformerForCausalLM",
]

for _model in PUBLIC:
    AutoConfig.register(configuration(_model).model_type, configuration(_model), exist_ok=True)
    AutoModelForCausalLM.register(configuration(_model), _model, exist_ok=True)
