"""Train, run and understand Retentive Networks (RetNet, arXiv 2307.08621)."""

import gc

_collecting = gc.isenabled()
gc.disable()  # most that an import makes stays: looking at it again and again takes a fifth of it
try:
    from .model import (
        AFTConfig,
        AFTForCausalLM,
        GatedRetNetConfig,
        GatedRetNetForCausalLM,
        LinearTransformerConfig,
        LinearTransformerForCausalLM,
        MultiScaleRetention,
        PerformerConfig,
        PerformerForCausalLM,
        RetNetConfig,
        RetNetForCausalLM,
        RWKVConfig,
        RWKVForCausalLM,
        TransformerConfig,
        TransformerForCausalLM,
    )
    from .model.models import PUBLIC, register
    from .versions import warn_of_untried
finally:
    if _collecting:
        gc.enable()

__version__ = "0.1.0"

__all__ = [
    "AFTConfig",
    "AFTForCausalLM",
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
]

for _model in PUBLIC:
    register(_model)
warn_of_untried()
