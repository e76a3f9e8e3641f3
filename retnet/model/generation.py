"""What transformers' ``generate`` must know of our models: their memory, positions, documents.

Most of these hooks are private to transformers; a test fails when one of them is renamed.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin


class OwnCacheGenerationMixin(GenerationMixin):
    """``generate`` with the cache that the model makes itself."""

    def new_cache(self, max_length: int | None = None) -> Any:
        """An empty memory; the model's."""
        raise NotImplementedError

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """generate's hook: our own memory instead of a DynamicCache."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation ({generation_config.cache_implementation!r}) must be left "
                f"out: {type(self).__name__} has its own cache"
            )
        if model_kwargs.get("past_key_values") is not None:
            model_kwargs["past_key_values"]._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = self.new_cache()

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """generate's hook: of a whole prompt's segment ids, those of the tokens of this call."""
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        segment_ids, cache = inputs.get("segment_ids"), inputs.get("past_key_values")
        if segment_ids is not None and cache is not None:
            tokens = inputs["input_ids"]
            tokens = inputs["inputs_embeds"] if tokens is None else tokens
            columns = slice(cache.length, cache.length + tokens.shape[1])
            if segment_ids.shape[1] > tokens.shape[1]:
                inputs["segment_ids"] = segment_ids[:, columns]
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
