"""From a configuration to a model."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from retnet.data import load_tokenizer
from retnet.errors import UserError
from retnet.generation import find_checkpoint
from retnet.generation.checkpoint import TOKENIZER, check_weights_unchanged
from retnet.generation.weights import read_json
from retnet.model.configuration import DecoderConfig
from retnet.model.decoder import DecoderForCausalLM
from retnet.model.models import model_class

Model = DecoderForCausalLM


def build_model(config: DecoderConfig) -> Model:
    """A fresh model, in float32."""
    return model_class(config.mixer_class.name)(config)


def load_initial_weights(model: Model, init_from: str, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Take the weights of ``model.init_from``; returns the checkpoint's folder.

    Raises:
        UserError: No such checkpoint, or one of another shape or with another tokenizer.
    """
    folder = find_checkpoint(init_from)
    file = folder / "model.safetensors"
    if not file.is_file():
        raise UserError(
            f"model.init_from ({init_from}) has no {file.name}: take another checkpoint"
        )
    check_weights_unchanged(folder)
    try:
        weights = load_file(file)
    except SafetensorError as error:
        raise UserError(f"model.init_from ({file}) can't be read: {error}") from error
    if "lm_head.weight" not in weights and model.config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
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


def check_same_model(
    own: Mapping[str, Tensor], stored: Mapping[str, Tensor], what: str, fix: str
) -> None:
    """Raise a ``UserError`` when the names or shapes of two models' weights differ."""
    for name in sorted(own.keys() | stored.keys()):
        here = tuple(own[name].shape) if name in own else "absent"
        there = tuple(stored[name].shape) if name in stored else "absent"
        if here != there:
            raise UserError(
                f"{what} is another model: {name} is {there} there and {here} here; {fix}"
            )


def check_same_meaning(model: Model, folder: Path, what: str, fix: str) -> None:
    """Raise a ``UserError`` when a checkpoint's weights, of the same shapes, are for another model.

    Args:
        model: That is to take them.
        folder: The checkpoint.
        what: How the error speaks of the checkpoint.
        fix: What to do.
    """
    stored = read_json(folder / "config.json")
    own = model.config.to_dict()
    fields = dataclasses.fields(model.config)
    for key in (field.name for field in fields if field.metadata.get("meaning")):
        if key in own and key in stored and own[key] != stored[key]:
            raise UserError(
                f"{what} is another model: model.{key} is {stored[key]} there and {own[key]} here; "
                f"{fix}"
            )
