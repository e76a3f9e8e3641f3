"""What is found out before a text is begun: that the model can make one and the machine hold it."""

import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from retnet.checkpoints import Checkpoint
from retnet.errors import UserError
from retnet.generation.decode import prefill
from retnet.generation.sampling import NUMBERS_BYTES
from retnet.machine import memory_of
from retnet.model.causal_lm import DecoderForCausalLM
from retnet.model.configuration import DecoderConfig

logger = logging.getLogger(__name__)

# Bytes for each entry of the vocabulary while a token is drawn: logits and probabilities in
# float32, running sums in float64.
DRAWING_BYTES = 16


def check_finite(checkpoint: Checkpoint) -> None:
    """Raise a ``UserError`` when the logits after ``<bos>`` are not finite."""
    model = checkpoint.model
    begin = torch.tensor([[checkpoint.tokenizer.bos_token_id]], device=model.device)
    if not prefill(model, begin, model.new_cache()).isfinite().all():
        raise UserError(
            f"checkpoint ({checkpoint.path}) gives logits that are not finite: its weights are "
            "damaged or of a run that diverged, so take another one"
        )


def fit_length(
    model: DecoderForCausalLM,
    prompt_tokens: int,
    max_new_tokens: int,
    option: str | None = None,
    *,
    prompt: str = "the prompt",
    fix: str = "give it a shorter one",
    quiet: bool = False,
) -> int:
    """The new tokens for which a model has room, with a line where they are fewer than wanted.

    A ``UserError`` where there is no room, or less than was asked for by hand with an option.
    ``prompt`` is what messages call it, ``fix`` what to do where it is too long.
    """
    longest = model.config.longest
    if longest is None:
        return max_new_tokens
    what, room = f"this {model.config.mixer_class.name} model is defined", longest - prompt_tokens
    if room < 1:
        raise UserError(
            f"{prompt} has {prompt_tokens:,} tokens (with <bos>) and leaves no room, as {what} for "
            f"texts of {longest:,}: {fix}"
        )
    if max_new_tokens > room and option is not None:
        raise UserError(
            f"{option} ({max_new_tokens:,}) after a prompt of {prompt_tokens:,} tokens leads "
            f"beyond the {longest:,} for which {what}: take at most {room:,}"
        )
    if max_new_tokens > room and not quiet:
        logger.info(f"the text ends at {longest:,} tokens, for which {what}: {room:,} new ones")
    return min(max_new_tokens, room)


def check_length(
    model: DecoderForCausalLM, prompt_tokens: int, max_new_tokens: int, num_samples: int
) -> None:
    """Warn of a prompt that is longer than a model with a growing state can make sense of.

    A state of constant size reads any length in the same memory. A ``UserError`` where the
    tokens, and what the model keeps of each, exceed the machine's memory.
    """
    window, mixer = model.config.max_position_embeddings, model.config.mixer_class.name
    if model.grows and prompt_tokens > window:
        logger.warning(
            f"the prompt has {prompt_tokens:,} tokens, and this {mixer} model was trained on texts "
            f"of {window:,}: expect poor text, and time that grows with the square of the length"
        )
    what = f"a prompt of {prompt_tokens:,} tokens and --max-new-tokens ({max_new_tokens:,}) need"
    check_text_fits(model, prompt_tokens + max_new_tokens, 1, what)
    if num_samples > 1:
        _check_samples_fit(model, prompt_tokens + max_new_tokens, num_samples)


def _check_samples_fit(model: DecoderForCausalLM, tokens: int, num_samples: int) -> None:
    """Raise a ``UserError`` when so many rows of so many tokens each cannot fit."""
    on_device = bytes_of_row(model) + tokens * (8 + model.bytes_per_token)
    needs = {model.device: on_device}
    host = torch.device("cpu")
    needs[host] = needs.get(host, 0) + NUMBERS_BYTES
    for device, each in needs.items():
        memory = memory_of(device)
        if memory is not None and num_samples * each > memory:
            raise UserError(
                f"--num-samples ({num_samples:,}) of {tokens:,} tokens need {num_samples * each:,} "
                f"bytes, {each:,} a sample, and {device} has {memory:,}: at most "
                f"{memory // each:,} can fit"
            )


def bytes_of_row(model: DecoderForCausalLM) -> int:
    """What a row takes however long its text is: its state, and the drawing of a token."""
    state = sum(tensor.nbytes for _, tensor in _state_of_row(model))
    return DRAWING_BYTES * model.config.vocab_size + state


def _state_of_row(model: DecoderForCausalLM) -> Iterator[tuple[DecoderConfig, Tensor]]:
    """What is kept of a row in constant size, without values, and the configuration it is by."""
    for layer in model.model.layers:
        growing = layer.mixer.growing(layer.mixer.config)
        for part in (layer.mixer, layer.ffn):
            state = part.init_state(1, torch.device("meta"), model.dtype, 1)
            yield from ((layer.mixer.config, state[key]) for key in state if key not in growing)


def check_state_fits(model: DecoderForCausalLM, rows: int, device: torch.device) -> None:
    """Raise a ``UserError`` when the state of so many rows cannot fit, however short they are."""
    memory, each = memory_of(device), bytes_of_row(model)
    if memory is not None and rows * each > memory:
        config, largest = max(_state_of_row(model), key=lambda found: found[1].nbytes)
        of = f"of {rows:,} rows" if rows > 1 else "of a text"
        raise UserError(
            f"with {config.keys_of_size(max(largest.shape))} the state {of} needs "
            f"{rows * each:,} bytes, and {device} has {memory:,}: make it smaller"
        )


def check_text_fits(model: DecoderForCausalLM, tokens: int, rows: int, what: str) -> None:
    """Raise a ``UserError`` when tokens of so many rows, and what is kept of each, cannot fit.

    The message begins with ``what``: whose tokens these are, and a verb.
    """
    check_state_fits(model, rows, model.device)
    per_token = rows * (8 + model.bytes_per_token)  # 8 of an int64 id
    memory = memory_of(model.device)
    if memory is not None and tokens * per_token > memory:
        raise UserError(
            f"{what} {tokens * per_token:,} bytes, {per_token:,} a token, and {model.device} has "
            f"{memory:,}: at most {memory // per_token:,} tokens can fit"
        )
