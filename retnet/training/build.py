"""From a configuration to a model."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedTokenizerFast

from retnet.checkpoints import check_weights_unchanged, find_checkpoint
from retnet.checkpoints.format import TOKENIZER, WEIGHTS
from retnet.checkpoints.match import check_same_meaning, check_same_model
from retnet.checkpoints.weights import read_weights
from retnet.data import load_tokenizer
from retnet.errors import UserError
from retnet.model.configuration import DecoderConfig
from retnet.model.decoder import DecoderForCausalLM
from retnet.model.models import configuration, model_class
from retnet.training.config import Config
from retnet.training.model_spec import NOT_OF_THE_MODEL

Model = DecoderForCausalLM


def model_config(
    config: Config, vocab_size: int, special_ids: dict[str, Any] | None = None
) -> DecoderConfig:
    """The model configuration of a run.

    Args:
        config: The run.
        vocab_size: Entries of its tokenizer.
        special_ids: bos_token_id, eos_token_id and pad_token_id.

    Raises:
        UserError: Values that make no model.
    """
    section = vars(config.model)
    keys = {key: value for key, value in section.items() if value is not None}
    keys |= {"vocab_size": vocab_size, "max_position_embeddings": config.data.seq_len}
    keys = {key: value for key, value in keys.items() if key not in NOT_OF_THE_MODEL}
    try:
        return configuration(model_class(config.model.mixer))(**keys, **(special_ids or {}))
    except ValueError as error:
        parts = str(error).split("; ")
        named = [f"model.{part}" if part.split()[0] in section else part for part in parts]
        raise UserError("; ".join(named)) from error


def build_model(config: DecoderConfig) -> Model:
    """A fresh model, in float32."""
    return model_class(config.mixer_class.name)(config)


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
