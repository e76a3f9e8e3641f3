"""Our checkpoint folder, made of renamed weights."""

import stat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from retnet.checkpoints.format import MANIFEST, TOKENIZER
from retnet.checkpoints.verify import write_manifest
from retnet.data.tokenizer import load_tokenizer, max_token_id
from retnet.errors import UserError, os_errors
from retnet.files import replacing
from retnet.model.models import model_class
from retnet.model.ops.precision import wide_dtype
from retnet.paths import kind_of


def check_target(target: Path) -> None:
    """Raise a ``UserError`` where something is in the way."""
    if kind_of(target, "target") is not None or target.is_symlink():
        raise UserError(f"target ({target}) exists: name a folder that does not, or remove it")


def find_tokenizer(
    source: Path, name: str | None, vocab_size: int
) -> PreTrainedTokenizerFast | None:
    """The tokenizer of that name, else the source folder's own; None where it has none."""
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
    target: Path,
    config: Any,
    weights: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerFast | None,
) -> None:
    """Write a new folder, as a whole; weights are those of the configuration's model, by name.

    Numbers have the type of the embedding, those that are never narrow at least float32.
    """
    if tokenizer is not None:
        for kind in ("bos", "eos", "pad"):
            setattr(config, f"{kind}_token_id", getattr(tokenizer, f"{kind}_token_id"))
    with torch.device("meta"):
        model: Any = model_class(config.mixer_class.name)(config)
    dtype, wide = weights["model.embed_tokens.weight"].dtype, model.wide_names()
    model.load_state_dict(
        {
            name: x.to(wide_dtype(dtype) if name in wide else dtype).contiguous()
            for name, x in weights.items()
        },
        strict=False,
        assign=True,
    )
    model.tie_weights()
    with (
        os_errors(f"target ({target}) cannot be written", "name another one, or free space there"),
        replacing(target) as new,
    ):
        model.save_pretrained(new)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        write_manifest(new)
        ordinary = stat.S_IMODE((new / MANIFEST).stat().st_mode)
        for file in new.iterdir():
            file.chmod(ordinary)  # safetensors writes files that only their owner can read
