"""What a pass returns: transformers' outputs, in which the memory answers to both of its names.

transformers 5.24 renamed ``past_key_values`` to ``cache``, in outputs and in what ``generate``
hands to a model.
"""

import dataclasses
from typing import Any

from transformers import PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

NAMES = ("cache", "past_key_values")
_FIELDS = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
MEMORY = next(name for name in NAMES if name in _FIELDS)  # what this transformers calls it


class _BothNames:
    """Beside the field the other name, without a word about its age."""


def _memory(output: Any) -> Any:  # compilers know functions, and no attrgetter
    return getattr(output, MEMORY)


for _name in NAMES:
    if _name != MEMORY:
        setattr(_BothNames, _name, property(_memory))


class DecoderOutput(_BothNames, BaseModelOutputWithPast):
    """last_hidden_state [B, T, d], past_key_values (or cache), hidden_states."""


class CausalLMOutput(_BothNames, CausalLMOutputWithPast):
    """loss (a scalar), logits [B, T, vocab_size], past_key_values (or cache), hidden_states."""


def named(cache: Any) -> dict[str, Any]:
    """The memory as this transformers' keyword."""
    return {MEMORY: cache}


def as_wanted(result: Any, return_dict: bool | None, config: PretrainedConfig) -> Any:
    """The output, or the tuple of its values where that is asked for."""
    wanted = config.return_dict if return_dict is None else return_dict
    return result if wanted else result.to_tuple()
