"""From a configuration to a model."""

import logging
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from transformers import PreTrainedTokenizerFast

from retnet.checkpoints import check_weights_unchanged, find_checkpoint
from retnet.checkpoints.format import TOKENIZER, WEIGHTS
from retnet.checkpoints.match import check_same_meaning, check_same_model
from retnet.checkpoints.weights import read_weights
from retnet.data import load_tokenizer
from retnet.errors import UserError
from retnet.model import (
    RetNetConfig,
    RetNetForCausalLM,
    TransformerConfig,
    TransformerForCausalLM,
)
from retnet.model.configuration import DecoderConfig
from retnet.training.config import RETENTION_KEYS, Config, ModelSpec

logger = logging.getLogger(__name__)

Model = RetNetForCausalLM | TransformerForCausalLM


def model_config(
    config: Config, vocab_size: int, special_ids: dict[str, Any] | None = None
) -> RetNetConfig | TransformerConfig:
    """The model configuration of a run.

    Args:
        config: The run.
        vocab_size: Entries of its tokenizer.
        special_ids: bos_token_id, eos_token_id and pad_token_id.

    Raises:
        UserError: Values that make no model.
    """
    spec = config.model
    retention = spec.mixer == "retention"
    left_out = {"mixer", "init_from", *(() if retention else RETENTION_KEYS)}
    keys: dict[str, Any] = {
        key: value for key, value in vars(spec).items() if key not in left_out and value is not None
    }
    keys |= {"vocab_size": vocab_size, "max_position_embeddings": config.data.seq_len}
    try:
        return (RetNetConfig if retention else TransformerConfig)(**keys, **(special_ids or {}))
    except ValueError as error:
        parts = str(error).split("; ")
        named = [f"model.{part}" if part.split()[0] in vars(spec) else part for part in parts]
        raise UserError("; ".join(named)) from error


def warn_without_effect(spec: ModelSpec) -> None:
    """Log which keys of the section mean nothing to its mixer."""
    if spec.mixer == "attention":
        useless = [k for k in RETENTION_KEYS if getattr(spec, k) != getattr(ModelSpec, k)]
        if useless:
            names = ", ".join(f"model.{key}" for key in useless)
            logger.warning("%s: no effect with model.mixer=attention", names)


def build_model(config: DecoderConfig) -> Model:
    """A fresh model, in float32."""
    if isinstance(config, RetNetConfig):
        return RetNetForCausalLM(config)
    return TransformerForCausalLM(cast(TransformerConfig, config))


def load_initial_weights(model: Model, init_from: str, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Take the weights of ``model.init_from``; returns the checkpoint's folder.

    Raises:
        UserError: No such checkpoint, or one of another shape or with another tokenizer.
    """
    folder = find_checkpoint(init_from)
    file = folder / WEIGHTS
    if not file.is_file():
        raise UserError(
            f"model.init_from ({init_from}) has no {file.name}: take another checkpoint"
        )
    check_weights_unchanged(folder)
    try:
        weights = read_weights(folder, tied=model.config.tie_word_embeddings)
    except SafetensorError as error:
        raise UserError(f"model.init_from ({file}) can't be read: {error}") from error
    what = f"model.init_from ({init_from})"
    fix = (
        "take over the model section of its config.yaml, and its tokenizer "
        f"(data.tokenizer={folder})"
    )
    check_same_model(model.state_dict(), weights, what, fix)
    check_same_meaning(model, folder, what, fix)
    has_tokenizer = (folder / TOKENIZER).is_file()  # weights from elsewhere may come without
    if has_tokenizer and load_tokenizer(str(folder)).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"model.init_from ({init_from}) was trained with another tokenizer of the same size, "
            f"its embedding would mean nothing here: set data.tokenizer={folder}"
        )
    model.load_state_dict(weights)
    return folder
