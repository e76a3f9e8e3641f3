"""What transformers must know of our models: that they are causal language models, and for its
``generate`` their memory, positions and documents.

Most of these hooks are private to transformers; a test fails when one of them is renamed.
"""

import copy
import functools
import logging
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .cache import DecoderCache
from .causal_lm import DecoderForCausalLM
from .documents import NEXT_POSITION, describe_tokens
from .keywords import one_memory
from .outputs import MEMORY, NAMES

logger = logging.getLogger(__name__)

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
    _told: frozenset[str] = frozenset()  # how single tokens were made, and why so: logged once each

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Have the class in the table by which libraries tell what a causal language model is.

        The Trainer's label smoothing asks for the class's name and shifts no labels of others,
        pipelines ask for it too, evaluation tools for the model type.
        """
        super().__init_subclass__(**kwargs)
        names: dict[str, str] = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        kind = cls.config_class.model_type  # type: ignore[union-attr]
        key = kind if names.get(kind, cls.__name__) == cls.__name__ else f"{kind}/{cls.__name__}"
        names[key] = cls.__name__

    @functools.wraps(GenerationMixin.generate)
    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        memory = one_memory(*(kwargs.pop(name, None) for name in NAMES))
        if memory is not None:
            _check_is_prefix(memory, inputs, **kwargs)
            kwargs[MEMORY] = memory
        return super().generate(inputs, *args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """transformers' entrance to ``generate_batch``, which pages keys and values.

        Raises:
            NotImplementedError: Always: these states have no pages.
        """
        raise NotImplementedError(
            f"{type(self).__name__} can't batch continuously (generate_batch): pad the prompts on "
            "the left and call generate"
        )

    def _prepare_generation_config(
        self, generation_config: Any, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """generate's hook: whether a length was asked for by hand, in the call itself."""
        parent: Any = super()
        made, others = parent._prepare_generation_config(generation_config, **kwargs)
        lengths = kwargs.get("max_new_tokens"), kwargs.get("max_length")
        made.length_by_hand = lengths != (None, None)
        return made, others

    def _prepare_generated_length(  # type: ignore[override]
        self, generation_config: Any, **kwargs: Any
    ) -> Any:
        """generate's hook: how many columns it is given."""
        generation_config.prompt_columns = kwargs["inputs_tensor"].shape[1]
        parent: Any = super()
        return parent._prepare_generated_length(generation_config=generation_config, **kwargs)

    def _prepare_cache_for_generation(  # type: ignore[override]
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """generate's hook: our own memory instead of a DynamicCache, and the step for one token."""
        if self.config.longest is not None:
            new = max_cache_length + 1 - generation_config.prompt_columns
            room = self._room(self.config.longest, generation_config.prompt_columns, **model_kwargs)
            if new > room and generation_config.length_by_hand:
                raise ValueError(
                    f"{new} new tokens lead beyond max_position_embeddings ({self.config.longest}),"
                    f" where this model is not defined: ask for at most {room}"
                )
            if new > room:
                logger.warning(
                    f"the text ends at max_position_embeddings ({self.config.longest}), beyond "
                    f"which this model is not defined: at most {room} new tokens"
                )
                generation_config.max_length -= new - room
        if generation_config.is_assistant:
            raise ValueError(f"{type(self).__name__} can't assist: its state can't go back")
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation ({generation_config.cache_implementation!r}) must be left "
                f"out: {type(self).__name__} has its own cache"
            )
        cache = model_kwargs.get(MEMORY)
        if isinstance(cache, DecoderCache):
            times = max(generation_config.num_beams, generation_config.num_return_sequences)
            if cache.batch_size not in (-1, batch_size, batch_size * times):
                raise ValueError(
                    f"past_key_values is of {cache.batch_size} rows, and {batch_size} are wanted: "
                    "take a memory of these rows (batch_repeat_interleave repeats each of its own)"
                )
            if cache.batch_size == batch_size and times > 1:
                cache = copy.deepcopy(cache)  # the caller's keeps its rows
                cache.batch_repeat_interleave(times)
            cache._is_user_defined = True
            model_kwargs[MEMORY] = cache
        elif cache is None and generation_config.use_cache is not False:
            model_kwargs[MEMORY] = self.new_cache()
        model_kwargs["decode_step"], reason = _decode_step(self)
        if model_kwargs.get(MEMORY) is None:
            self._tell("plain step: use_cache is False")
        elif reason:
            self._tell(f"plain step: {reason}", logging.WARNING)

    def _tell(self, path: str, level: int = logging.INFO) -> None:
        """Log once by which step single tokens are made; a warning where a call can't change it."""
        if path not in self._told:
            self._told |= {path}
            logger.log(level, f"{type(self).__name__}.generate: {path}")

    def _room(
        self,
        longest: int,
        columns: int,
        attention_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        **others: Any,
    ) -> int:
        """New tokens for which there are positions after a prompt of so many columns.

        A ``ValueError`` where there is none.
        """
        memory, record, past = others.get(MEMORY), None, 0
        ids = (attention_mask, segment_ids, position_ids)
        rows = max((x.shape[0] for x in ids if x is not None), default=1)
        if memory is not None and memory.record is not None:
            past = memory.length
            record = memory.record.amax(0, keepdim=True).expand(rows, -1)
            only_new = attention_mask is not None and attention_mask.shape[1] > columns
            columns -= 0 if only_new else past
        told = [None if x is None else x[:, -columns:] for x in (segment_ids, position_ids)]
        tokens = describe_tokens(
            torch.empty(rows, columns, 0, device=self.device),
            attention_mask=None if attention_mask is None else attention_mask[:, -columns:],
            segment_ids=told[0],
            position_ids=told[1],
            record=record,
            past=past,
        )
        room = longest - int(tokens.record[:, NEXT_POSITION].amax())
        if room < 1:
            raise ValueError(
                f"the prompt ends at position {longest - room}, and this model is not defined "
                f"beyond {longest} tokens (max_position_embeddings): give it a shorter one"
            )
        return room

    def prepare_inputs_for_generation(
        self,
        input_ids: Any,
        inputs_embeds: Tensor | None = None,
        decode_step: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """generate's hook: of a whole prompt's segment ids those of the tokens of this call; and
        the lean step, where nothing but the next token is asked for."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        segment_ids, cache = inputs.get("segment_ids"), inputs.get(MEMORY)
        tokens = inputs["input_ids"]
        if segment_ids is not None and cache is not None:
            tokens = inputs["inputs_embeds"] if tokens is None else tokens
            columns = slice(cache.length, cache.length + tokens.shape[1])
            if segment_ids.shape[1] > tokens.shape[1]:
                inputs["segment_ids"] = segment_ids[:, columns]
        given = {name: value for name, value in inputs.items() if value is not None}
        others = set(given) - {"input_ids", MEMORY, "logits_to_keep"}
        asked = sorted(name for name in others if given[name] is not _NO_MATTER.get(name))
        one = tokens is not None and tokens.shape[1] == 1 and cache is not None
        if decode_step is not None and one and cache.record is not None:
            reason = f"the call gives {', '.join(asked)}" if asked else decode_step.obstacle(cache)
            inputs["decode_step"] = None if reason else decode_step
            self._tell(f"plain step: {reason}" if reason else "fast step")
        if cache is not None:  # peft looks for it by this name, and else puts its prompt anew
            inputs["past_key_values"] = inputs.pop(MEMORY)
        return inputs

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """generate's hook: new tokens belong to the document that the prompt ends with."""
        updated = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, *args, **kwargs
        )
        segment_ids = updated.pop("segment_ids", None)
        if segment_ids is not None and updated.get(MEMORY) is None:
            updated["segment_ids"] = torch.cat((segment_ids, segment_ids[:, -1:]), dim=1)
        return updated

    def _prepare_position_ids_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """generate's hook: the cache and the mask know the positions; a user's own ids pass."""
        return None


def _check_is_prefix(
    memory: Any,
    inputs: Tensor | None,
    input_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **others: Any,
) -> None:
    """Raise where a memory holds as many tokens as a prompt that should begin with them.

    With a mask that is longer than what is given, those are only the tokens after the memory's.
    """
    given = next((x for x in (inputs, inputs_embeds, input_ids) if x is not None), None)
    length = 1 if given is None else given.shape[1]
    only_new = attention_mask is not None and attention_mask.shape[1] > length
    if not only_new and memory.get_seq_length() >= length:
        raise ValueError(
            f"past_key_values holds {memory.get_seq_length()} tokens, and the prompt that should "
            f"begin with them has {length}: generate writes into it, so give it a copy.deepcopy of "
            "a memory that is used more than once"
        )


def _decode_step(model: DecoderForCausalLM) -> tuple[Any, str]:
    """The lean step of one token, or None and why there is none; its folder may lack."""
    try:
        from .fast_decode.step import make_decode_step
    except ModuleNotFoundError:
        return None, "fast_decode is not here"
    return make_decode_step(model)
