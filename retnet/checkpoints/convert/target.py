"""Checkpoint folders, made of renamed weights; no more than one file's are held at a time."""

import logging
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast

from retnet.checkpoints.format import TOKENIZER, WEIGHTS, WEIGHTS_INDEX
from retnet.checkpoints.verify import write_manifest
from retnet.data.tokenizer import load_tokenizer, max_token_id
from retnet.errors import UserError, os_errors
from retnet.files import replacing, write_json
from retnet.model.models import model_class
from retnet.paths import kind_of

logger = logging.getLogger("retnet.checkpoints.convert")

MOST_BYTES = 2**30  # of a file of weights, and of what is held of them


class Converted(NamedTuple):
    """A checkpoint of another project in our terms."""

    config: Any
    weights: Iterable[tuple[str, Tensor]]  # by our names, read as they are asked for
    bytes: int  # of all weights, as far as that is known
    notes: Mapping[str, Any] = {}  # JSON files to write beside, by name


def check_target(target: Path) -> None:
    """Raise a ``UserError`` where something is in the way."""
    if kind_of(target, "target") is not None or target.is_symlink():
        raise UserError(f"target ({target}) exists: name a folder that does not, or remove it")


def check_weights(
    source: Path,
    config: Any,
    shapes: Mapping[str, tuple[int, ...]],
    theirs: Mapping[str, str],
    only: str,
) -> Any:
    """Raise a ``UserError`` where weights are not exactly those of the configuration's model.

    Args:
        shapes: Of the weights, by our names.
        theirs: Their names in the source, by ours.
        only: What can be converted, which a weight of another shape is not.

    Returns:
        The model, without memory.
    """
    if config.num_hidden_layers > len(shapes):
        raise UserError(f"source ({source}) lacks whole blocks: copy it again")
    with torch.device("meta"):
        model: Any = model_class(config.mixer_class.name)(config)
    wanted = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    missing = wanted.keys() - shapes.keys() - tied
    if missing:
        raise UserError(
            f"source ({source}) is incomplete, what is {min(missing)} here is missing "
            f"({len(missing)} such): copy it again"
        )
    if unknown := shapes.keys() - wanted.keys():
        name = theirs[min(unknown)]
        raise UserError(
            f"source ({source}) has {name}, which a model of its configuration does not have: "
            f"only {only} can be converted"
        )
    for name, shape in shapes.items():
        if shape != wanted[name]:
            raise UserError(
                f"source ({source}): {theirs[name]} is {list(shape)} and must be "
                f"{list(wanted[name])}: only {only} can be converted"
            )
    return model


def find_tokenizer(
    source: Path, name: str | None, vocab_size: int
) -> PreTrainedTokenizerFast | None:
    """The tokenizer of that name, else the source folder's own; None where it has none.

    Special tokens that it lacks are added as far as the model has room for them.
    """
    if name is None and not (source / TOKENIZER).is_file():
        return None
    if name is None:
        tokenizer = load_tokenizer(source, "tokenizer", vocab_size)
    else:
        tokenizer = load_tokenizer(name, "--tokenizer", vocab_size)
    if (largest := max_token_id(tokenizer)) >= vocab_size:
        raise UserError(
            f"--tokenizer ({name or source}) has ids up to {largest}, beyond the model's "
            f"vocab_size ({vocab_size}): name the one that the model was trained with"
        )
    return tokenizer


def write_checkpoint(
    target: Path, converted: Converted, tokenizer: PreTrainedTokenizerFast | None
) -> None:
    """Write a new folder of ours, as a whole; weights keep the types that they come in."""
    config = converted.config
    if tokenizer is not None:
        for kind in ("bos", "eos", "pad"):
            if (token := getattr(tokenizer, f"{kind}_token_id")) is not None:
                setattr(config, f"{kind}_token_id", token)
    with new_folder(target) as new:
        once = {"lm_head.weight"} if config.tie_word_embeddings else set()
        stored = ((name, x) for name, x in converted.weights if name not in once)
        dtypes = write_weights(new, stored, converted.bytes)
        config.architectures = [model_class(config.mixer_class.name).__name__]
        config.dtype = dtypes["model.embed_tokens.weight"]
        config.save_pretrained(new)
        GenerationConfig.from_model_config(config).save_pretrained(new)
        for name, content in converted.notes.items():
            write_json(new / name, content)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        write_manifest(new)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which then stands at the target; a ``UserError`` where that fails."""
    with (
        os_errors(f"target ({target}) cannot be written", "name another one, or free space there"),
        _with_parents(target),
        replacing(target) as new,
    ):
        yield new
        ordinary = stat.S_IMODE(new.stat().st_mode) & 0o666
        for file in new.iterdir():
            file.chmod(ordinary)  # safetensors writes files that only their owner can read


@contextmanager
def _with_parents(target: Path) -> Iterator[None]:
    """The folders above, which are made; and removed where nothing came into them."""
    made = [folder for folder in target.absolute().parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for folder in made:  # from the innermost one on
            with suppress(OSError):  # something is in it
                folder.rmdir()


def write_weights(
    folder: Path, weights: Iterable[tuple[str, Tensor]], expected: int
) -> dict[str, torch.dtype]:
    """``model.safetensors``, or several files and their index where one would be large.

    Args:
        expected: Bytes of all, for the line that is logged between files.

    Returns:
        The type of each weight.
    """
    dtypes: dict[str, torch.dtype] = {}
    files: list[list[str]] = []
    total = 0
    started = time.monotonic()
    for shard in _shards(weights):
        if total:
            left = (time.monotonic() - started) * (expected / total - 1)
            logger.info("%.1f of %.1f GB, %.0f s left", total / 1e9, expected / 1e9, max(0, left))
        files.append(list(shard))
        size = sum(x.nbytes for x in shard.values())
        dtypes |= {name: x.dtype for name, x in shard.items()}
        save_file(shard, folder / _name(len(files), 0), metadata={"format": "pt"})
        total += size
        shard.clear()
    names = [_name(i, len(files)) if len(files) > 1 else WEIGHTS for i in range(1, len(files) + 1)]
    for i, name in enumerate(names, start=1):
        (folder / _name(i, 0)).rename(folder / name)
    if len(files) > 1:
        weight_map = {key: name for name, keys in zip(names, files, strict=True) for key in keys}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / WEIGHTS_INDEX, index)
    return dtypes


def _shards(weights: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """The weights in order, together up to ``MOST_BYTES`` at a time."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, x in weights:
        if shard and size + x.nbytes > MOST_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = x.contiguous()
        size += x.nbytes
    if shard:
        yield shard


def _name(number: int, of: int) -> str:
    """As transformers names them; of 0 while their number is not known."""
    return f"model-{number:05d}-of-{of:05d}.safetensors"
