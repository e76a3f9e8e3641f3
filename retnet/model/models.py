"""The public classes by name, which pickling, transformers' Auto classes and exports need.

Three for each mixer: configuration, model, causal language model.
"""

import functools
from typing import Any, cast

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .causal_lm import DecoderForCausalLM
from .configuration import DecoderConfig
from .decoder import DecoderModel
from .hf_generate import GeneratingDecoder
from .mixers import MIXERS
from .mixers.aft import AFTOptions, AttentionFree
from .mixers.attention import AttentionOptions, CausalAttention
from .mixers.gated_retention import GatedRetention, GatedRetentionOptions
from .mixers.linear import LinearAttention, LinearOptions
from .mixers.performer import PerformerAttention, PerformerOptions
from .mixers.retention import MultiScaleRetention, RetentionOptions
from .mixers.rwkv import RWKVOptions, TimeMixing


class RetNetConfig(RetentionOptions):
    """A RetNet (arXiv 2307.08621)."""

    mixer_class, model_type = MultiScaleRetention, "retnet_lm"


class RetNetModel(DecoderModel):
    config_class = RetNetConfig


class RetNetForCausalLM(GeneratingDecoder):
    config_class, model_class = RetNetConfig, RetNetModel


class TransformerConfig(AttentionOptions):
    """The Transformer of the same size."""

    mixer_class, model_type = CausalAttention, "transformer_lm"


class TransformerModel(DecoderModel):
    config_class = TransformerConfig


class TransformerForCausalLM(GeneratingDecoder):
    config_class, model_class = TransformerConfig, TransformerModel


class AFTConfig(AFTOptions):
    """An attention-free transformer (arXiv 2105.14103)."""

    mixer_class, model_type = AttentionFree, "aft_lm"


class AFTModel(DecoderModel):
    config_class = AFTConfig


class AFTForCausalLM(GeneratingDecoder):
    config_class, model_class = AFTConfig, AFTModel


class LinearTransformerConfig(LinearOptions):
    """A linear Transformer (arXiv 2006.16236)."""

    mixer_class, model_type = LinearAttention, "linear_transformer_lm"


class LinearTransformerModel(DecoderModel):
    config_class = LinearTransformerConfig


class LinearTransformerForCausalLM(GeneratingDecoder):
    config_class, model_class = LinearTransformerConfig, LinearTransformerModel


class PerformerConfig(PerformerOptions):
    """A Performer (arXiv 2009.14794)."""

    mixer_class, model_type = PerformerAttention, "performer_lm"


class PerformerModel(DecoderModel):
    config_class = PerformerConfig


class PerformerForCausalLM(GeneratingDecoder):
    config_class, model_class = PerformerConfig, PerformerModel


class GatedRetNetConfig(GatedRetentionOptions):
    """A RetNet with gated retention (arXiv 2405.05254)."""

    mixer_class, model_type = GatedRetention, "gated_retnet_lm"


class GatedRetNetModel(DecoderModel):
    config_class = GatedRetNetConfig


class GatedRetNetForCausalLM(GeneratingDecoder):
    config_class, model_class = GatedRetNetConfig, GatedRetNetModel


class RWKVConfig(RWKVOptions):
    """RWKV-4 (arXiv 2305.13048)."""

    mixer_class, model_type = TimeMixing, "rwkv_lm"


class RWKVModel(DecoderModel):
    config_class = RWKVConfig


class RWKVForCausalLM(GeneratingDecoder):
    config_class, model_class = RWKVConfig, RWKVModel


PUBLIC: tuple[type[DecoderForCausalLM], ...] = (
    RetNetForCausalLM,
    TransformerForCausalLM,
    AFTForCausalLM,
    LinearTransformerForCausalLM,
    PerformerForCausalLM,
    GatedRetNetForCausalLM,
    RWKVForCausalLM,
)


def model_class(mixer: str) -> type[DecoderForCausalLM]:
    """The causal language model of a mixer, by its name in ``MIXERS``."""
    kind = MIXERS[mixer]
    public = (model for model in PUBLIC if configuration(model).mixer_class is kind)
    return next(public, None) or _unnamed(cast(Any, kind))


def configuration(model: type[DecoderForCausalLM]) -> type[DecoderConfig]:
    """The class of a model's configuration."""
    return cast(type[DecoderConfig], model.config_class)


@functools.cache
def _unnamed(kind: Any) -> type[DecoderForCausalLM]:
    """The classes of a mixer that has none here; transformers gets to know them."""
    keys = {"mixer_class": kind, "model_type": f"{kind.name}_lm"}
    config: Any = type(f"{kind.__name__}Config", (kind.options,), keys)
    model = type(f"{kind.__name__}Model", (DecoderModel,), {"config_class": config})
    both = {"config_class": config, "model_class": model}
    causal = type(f"{kind.__name__}ForCausalLM", (GeneratingDecoder,), both)
    register(causal)
    return causal


def register(causal: type[DecoderForCausalLM]) -> None:
    """Have transformers' Auto classes know a causal language model and its parts."""
    config = configuration(causal)
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, causal.model_class, exist_ok=True)
    AutoModelForCausalLM.register(config, causal, exist_ok=True)
