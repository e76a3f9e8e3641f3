"""Train, run and understand Retentive Networks (RetNet, arXiv 2307.08621)."""

from transformers import AutoConfig, AutoModelForCausalLM

from .model import (
    MultiScaleRetention,
    RetNetConfig,
    RetNetForCausalLM,
    TransformerConfig,
    TransformerForCausalLM,
)
from .model.models import PUBLIC

__version__ = "0.1.0"

__all__ = [
    "MultiScaleRetention",
    "RetNetConfig",
    "RetNetForCausalLM",
    "TransformerConfig",
    "TransformerForCausalLM",
]

for _model in PUBLIC:
    AutoConfig.register(_model.config_class.model_type, _model.config_class, exist_ok=True)
    AutoModelForCausalLM.register(_model.config_class, _model, exist_ok=True)
