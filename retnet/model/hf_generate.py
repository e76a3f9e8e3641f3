"""What transformers' ``generate`` must know of our models: their memory, positions, documents.

Most of these hooks are private to transformers; a test fails when one of them is renamed.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from .decoder import DecoderForCausalLM

# keywords of forward, and the values with which they change nothing for a token fed to a cache
_NO_MATTER = {
    "use_cache": True,
    "return_dict": True,
    "output_attentions": False,
    "output_hidden_states": False,
}


class GeneratingDecoder(DecoderForCausalLM, GenerationMixin):
    """A language model with transformers' ``generate``, its memory the model's own."""

    # a state can't go back: transformers then refuses assisted decoding
    _is_stateful = True

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """generate's hook: our own memory instead of a DynamicCache, and the step for one token."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation ({generation_config.cache_implementation!r}) must be left "
                f"out: {type(self).__name__} has its own cache"
            )
        if model_kwargs.get("past_key_values") is not None:
            model_kwargs["past_key_values"]._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = self.new_cache()
        model_kwargs["decode_step"] = _decode_step(self)

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Any,
        inputs_embeds: Tensor | None = None,
        decode_step: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """generate's hook: of a whole prompt's segment ids those of the tokens of this call; and
        the lean step, where nothing but the next token is asked for."""
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        segment_ids, cache = inputs.get("segment_ids"), inputs.get("past_key_values")
        tokens = inputs["input_ids"]
        if segment_ids is not None and cache is not None:
            tokens = inputs["inputs_embeds"] if tokens is None else tokens
            columns = slice(cache.length, cache.length + tokens.shape[1])
            if segment_ids.shape[1] > tokens.shape[1]:
                inputs["segment_ids"] = segment_ids[:, columns]
        given = {name: value for name, value in inputs.items() if value is not None}
        others = set(given) - {"input_ids", "past_key_values", "logits_to_keep"}
        plain = all(given[name] is _NO_MATTER.get(name) for name in others)
        one = tokens is not None and tokens.shape[1] == 1
        if decode_step is not None and plain and one and cache is not None:
            inputs["decode_step"] = decode_step if decode_step.fits(cache) else None
        return inputs

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """generate's hook: new tokens belong to the document that the prompt ends with."""
        updated = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, *args, **kwargs
        )
        segment_ids = updated.pop("segment_ids", None)
        if segment_ids is not None and updated.get("past_key_values") is None:
            updated["segment_ids"] = torch.cat((segment_ids, segment_ids[:, -1:]), dim=1)
        return updated

    def _prepare_position_ids_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """generate's hook: the cache and the mask know the positions; a user's own ids pass."""
        return None


def _decode_step(model: DecoderForCausalLM) -> Any:
    """The lean step of one token, where the model has one; speed only, and its folder may lack."""
    try:
        from .fast_decode.step import make_decode_step
    except ModuleNotFoundError:
        return None
    return make_decode_step(model)[0]
