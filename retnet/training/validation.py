"""What a run measures of itself between steps: validation loss and a sample."""

from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerFast

from retnet.data import CarriedValidationBatches, TokenFile, ValidationBatches
from retnet.data.chat import ChatFormat
from retnet.errors import UserError
from retnet.evaluation import evaluate_batches, metrics
from retnet.generation import (
    Sampling,
    check_text_fits,
    encode_prompt,
    fit_length,
    sample_answer,
    sample_text,
)
from retnet.model.causal_lm import DecoderForCausalLM as Model
from retnet.training.spec import Config


def validate(
    model: Model, tokens: TokenFile, config: Config, accelerator: Accelerator
) -> tuple[dict[str, float], int]:
    """The values for the metrics and the number of targets, the same in every process.

    With ``train.carry_state`` each window begins with the state of the one before.
    """
    spec = config.train
    kind: Any = CarriedValidationBatches
    if not spec.carry_state:
        reset = config.data.reset_state_at_documents
        kind = partial(ValidationBatches, reset_at_documents=reset)
    batches: ValidationBatches = kind(
        tokens,
        seq_len=config.data.seq_len,
        batch_size=spec.batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        max_tokens=spec.eval_max_tokens,
    )
    with accelerator.autocast():
        nll, targets = sum_losses(model, batches)
    both = torch.tensor([nll, targets], dtype=torch.float64, device=accelerator.device)
    nll, targets = accelerator.reduce(both, reduction="sum").tolist()
    values = {
        "val/loss": metrics.nats_per_token(nll, targets),
        "val/perplexity": metrics.perplexity(nll, targets),
        "val/bits_per_byte": metrics.bits_per_byte(nll, batches.num_bytes),
    }
    return values, int(targets)


def sum_losses(model: Model, batches: ValidationBatches) -> tuple[float, int]:
    """The nats of all of a process's targets and their number; carried where batches are."""
    if not isinstance(batches, CarriedValidationBatches):
        return evaluate_batches(model, batches)
    parts = [evaluate_batches(model, part, model.new_cache()) for part in batches.courses()]
    return sum(nll for nll, _ in parts), sum(targets for _, targets in parts)


def check_targets(tokens: TokenFile, config: Config) -> None:
    """Raise a ``UserError`` where ``train.eval_max_tokens`` leaves nothing to evaluate on."""
    most = config.train.eval_max_tokens
    if most is not None and not tokens.targets_before(np.array([most]))[0]:
        raise UserError(
            f"train.eval_max_tokens ({most}) ends before the first answer of the validation "
            "conversations: use more, or null for all"
        )


def _prompt_length(config: Config, tokenizer: PreTrainedTokenizerFast) -> int:
    """The tokens of ``train.sample_prompt``, which of conversations is what the user says."""
    prompt = config.train.sample_prompt
    if not config.data.is_messages:
        return encode_prompt(tokenizer, prompt).shape[1]
    form = ChatFormat(tokenizer)
    return len(form.encode_prompt(*form.parts([{"role": "user", "content": prompt}], prompt=True)))


def check_sample(model: Model, tokenizer: PreTrainedTokenizerFast, config: Config) -> None:
    """Say where a sample ends before ``train.sample_tokens``, as the model has no more positions.

    A ``UserError`` where its prompt leaves no room, or no memory holds it.
    """
    spec = config.train
    if not spec.sample_tokens:
        return
    prompt, new = _prompt_length(config, tokenizer), spec.sample_tokens
    new = fit_length(model, prompt, new, prompt="train.sample_prompt")
    what = f"a prompt of {prompt:,} tokens and train.sample_tokens ({new:,}) need"
    check_text_fits(model, prompt + new, 1, what)


def draw_sample(
    model: Model, tokenizer: PreTrainedTokenizerFast, config: Config, accelerator: Accelerator
) -> str:
    """A sample text, its prompt included, or a message and its answer; empty if none is wanted."""
    spec = config.train
    if not spec.sample_tokens:
        return ""
    prompt, sampling = spec.sample_prompt, Sampling(seed=spec.seed)
    new = fit_length(model, _prompt_length(config, tokenizer), spec.sample_tokens, quiet=True)
    # its lengths vary: compiling it would cost more than it gives
    with accelerator.autocast(), torch.compiler.set_stance("force_eager"):
        if not config.data.is_messages:
            more = sample_text(model, tokenizer, prompt, max_new_tokens=new, sampling=sampling)
            return prompt + more
        answer = sample_answer(model, tokenizer, prompt, max_new_tokens=new, sampling=sampling)
        return f"{prompt}\n{answer}" if prompt else answer
