"""What is found out before a text is begun: that the model can make one and the machine hold it."""

import logging

import torch

from retnet.checkpoints import Checkpoint
from retnet.errors import UserError
from retnet.generation.decode import prefill
from retnet.machine import memory_of
from retnet.model.decoder import DecoderForCausalLM

logger = logging.getLogger(__name__)


def check_finite(checkpoint: Checkpoint) -> None:
    """Raise a ``UserError`` when the logits after ``<bos>`` are not finite."""
    model = checkpoint.model
    begin = torch.tensor([[checkpoint.tokenizer.bos_token_id]], device=model.device)
    if not prefill(model, begin, model.new_cache()).isfinite().all():
        raise UserError(
            f"checkpoint ({checkpoint.path}) gives logits that are not finite: its weights are "
            "damaged or of a run that diverged, so take another one"
        )


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
    check_text_fits(model, prompt_tokens + max_new_tokens, num_samples, what)


def check_text_fits(model: DecoderForCausalLM, tokens: int, rows: int, what: str) -> None:
    """Raise a ``UserError`` when tokens of so many rows, and what is kept of each, cannot fit.

    The message begins with ``what``: whose tokens these are, and a verb.
    """
    per_token = rows * (8 + model.bytes_per_token)  # 8 of an int64 id
    memory = memory_of(model.device)
    if memory is not None and tokens * per_token > memory:
        raise UserError(
            f"{what} {tokens * per_token:,} bytes, {per_token:,} a token, and {model.device} has "
            f"{memory:,}: at most {memory // per_token:,} tokens can fit"
        )
