"""From a configuration to a model."""

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from retnet.checkpoints import check_weights_unchanged, find_checkpoint
from retnet.checkpoints.format import CONFIG, COPY_AGAIN, TOKENIZER, list_checkpoints
from retnet.checkpoints.match import check_finite, check_same_meaning, check_same_model
from retnet.checkpoints.weights import read_weights, stored_shapes
from retnet.data import load_tokenizer
from retnet.data.tokenizer import max_token_id
from retnet.errors import UserError
from retnet.files import read_json
from retnet.generation import check_state_fits
from retnet.machine import memory_of
from retnet.model.causal_lm import DecoderForCausalLM
from retnet.model.configuration import DecoderConfig
from retnet.model.models import configuration, model_class
from retnet.training.spec import NOT_OF_THE_MODEL, Config, is_bounded

logger = logging.getLogger(__name__)

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def model_config(config: Config, vocab_size: int, **special_ids: Any) -> DecoderConfig:
    """The model configuration of a run; ``special_ids`` are bos_token_id and the like.

    A ``UserError`` where the values make no model.
    """
    section = vars(config.model)
    keys: dict[str, Any] = {"max_position_embeddings": _positions(config), **special_ids}
    keys |= {k: v for k, v in section.items() if v is not None and k not in NOT_OF_THE_MODEL}
    try:
        return configuration(model_class(section["mixer"]))(vocab_size=vocab_size, **keys)
    except ValueError as error:
        parts = str(error).split("; ")
        named = [f"model.{part}" if part.split()[0] in section else part for part in parts]
        raise UserError("; ".join(named)) from error


def _positions(config: Config) -> int:
    """T_max: data.seq_len, or where positions are weights that of ``model.init_from``.

    Where that is gone, it is that of the run's own checkpoints. A ``UserError`` where that is less,
    or there are none.
    """
    wanted, source = config.data.seq_len, config.model.init_from
    if not source or not is_bounded(config.model):
        return wanted
    try:
        file = find_checkpoint(source) / CONFIG
    except UserError:
        own = [folder / CONFIG for folder in list_checkpoints(config.train.run_folder)]
        if not (own := [file for file in own if file.is_file()]):
            raise
        file = own[-1]
    stored = read_json(file, COPY_AGAIN).get("max_position_embeddings")
    if type(stored) is not int:
        return wanted
    if stored < 1:
        raise UserError(
            f"{file}: max_position_embeddings ({stored}) must be at least 1: {COPY_AGAIN}"
        )
    if wanted > stored:
        raise UserError(
            f"data.seq_len ({wanted}) is beyond the {stored} positions that model.init_from "
            f"({source}) is defined for: set data.seq_len={stored} or less"
        )
    return stored


def build_model(config: DecoderConfig) -> DecoderForCausalLM:
    """A fresh model, in float32."""
    return model_class(config.mixer_class.name)(config)


def check_fits(config: Config, folder: Path, what: str, fix: str) -> None:
    """Raise a ``UserError`` where a checkpoint is of another model than that of a run.

    Found without reading its weights, nor the run's text: the vocabulary, which is made of that,
    is taken to be the checkpoint's. What can't be told here is found when the weights are read. The
    message begins with ``what`` and ends with ``fix``.
    """
    try:
        shapes = stored_shapes(folder)
    except SafetensorError:
        return
    vocab_size, *_ = shapes.get("model.embed_tokens.weight", ()) or (config.data.vocab_size,)
    with torch.device("meta"):
        model = build_model(model_config(config, vocab_size))
        stored = {name: torch.empty(shape) for name, shape in shapes.items()}
    own = model.state_dict()
    for name in model.all_tied_weights_keys if model.config.tie_word_embeddings else ():
        stored.setdefault(name, own[name])
    check_same_model(own, stored, what, fix)
    check_same_meaning(model, folder, what, fix)


def vocabulary(config: Config, tokenizer: PreTrainedTokenizerFast, resumed: Path | None) -> int:
    """Rows of the embedding: the tokenizer's entries, or as many as initial weights have.

    Published models have some that no token uses.
    """
    own = max_token_id(tokenizer) + 1
    if not config.model.init_from:
        return own
    folder = resumed or find_checkpoint(config.model.init_from)
    stored = read_json(folder / CONFIG, COPY_AGAIN).get("vocab_size")
    return max(own, stored) if isinstance(stored, int) else own


def initial_weights(init_from: str) -> tuple[Path, str, str]:
    """The folder of ``model.init_from``; how messages name it, and what mends one of another model.

    A ``UserError`` where there is none.
    """
    folder = find_checkpoint(init_from)
    fix = f"its tokenizer is data.tokenizer={folder}, and keys of its model are left out"
    return folder, f"model.init_from ({init_from})", fix


def check_model_fits(config: DecoderConfig, rows: int = 0) -> None:
    """Raise a ``UserError`` when this machine can't hold a model, or the states of so many rows.

    The model is built without memory: some sizes are known to its mixer alone.
    """
    cpu = torch.device("cpu")  # where every model is built
    with torch.device("meta"):
        model = build_model(config)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    memory, need = memory_of(cpu), sum(tensor.nbytes for tensor in tensors.values())
    if memory is not None and need > memory:
        name, largest = max(tensors.items(), key=lambda item: item[1].nbytes)
        raise UserError(
            f"with {config.keys_of_size(max(largest.shape))} the model needs {need:,} bytes, most "
            f"of them for {name}, and this machine has {memory:,}: make it smaller"
        )
    if rows:
        check_state_fits(model, rows, cpu)


def _grow_vocabulary(
    model: DecoderForCausalLM,
    weights: dict[str, Tensor],
    known: dict[str, int],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Rows for entries that a tokenizer has after all ``known`` ones: what marks messages.

    They begin as new rows do, around the mean of the others.
    """
    own, added = model.state_dict(), tokenizer.get_vocab().items() - known.items()
    stored = len(weights.get(EMBEDDING, ()))
    if not added or sorted(i for _, i in added) != [*range(stored, len(own[EMBEDDING]))]:
        return  # as many and others, or with holes: it is another tokenizer
    for name in (EMBEDDING, OUTPUT):
        if name in weights and len(weights[name]) == stored:
            mean = weights[name].float().mean(dim=0)
            new = (mean + own[name][stored:]).to(weights[name].dtype)
            weights[name] = torch.cat((weights[name], new))
    names = " and ".join(sorted(entry for entry, _ in added))
    logger.info(f"{names}: new entries of the vocabulary, around the mean of the others")


def load_initial_weights(
    model: DecoderForCausalLM, init_from: str, tokenizer: PreTrainedTokenizerFast
) -> Path:
    """Take the weights of ``model.init_from``; returns the checkpoint's folder.

    A ``UserError`` where there is none, or one of another shape or with another tokenizer. One that
    lacks only the last entries, those of a chat template, is another's beginning.
    """
    folder, what, fix = initial_weights(init_from)
    check_weights_unchanged(folder)
    try:
        weights = read_weights(folder, tied=model.config.tie_word_embeddings)
    except SafetensorError as error:
        raise UserError(
            f"{what} has weights that can't be read ({error}): copy it again"
        ) from error
    known: dict[str, int] | None = None  # weights from elsewhere may come without a tokenizer
    if (folder / TOKENIZER).is_file():
        known = load_tokenizer(folder, "tokenizer of model.init_from").get_vocab()
        _grow_vocabulary(model, weights, known, tokenizer)
    check_same_model(model.state_dict(), weights, what, fix)
    check_same_meaning(model, folder, what, fix)
    if known is not None and not known.items() <= tokenizer.get_vocab().items():
        raise UserError(
            f"{what} was trained with another tokenizer of the same size, its embedding would "
            f"mean nothing here: set data.tokenizer={folder}"
        )
    check_finite(weights, what)
    model.load_state_dict(weights)
    return folder
