"""The weights of a checkpoint folder: which files they are, and whether they may be loaded."""

from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from retnet.checkpoints.format import COPY_AGAIN, WEIGHTS, WEIGHTS_INDEX
from retnet.errors import UserError
from retnet.files import read_json
from retnet.paths import kind_of


def weight_files(folder: Path) -> list[str]:
    """The names of the safetensors files with the weights: one, or the shards of the index.

    transformers unpickles whatever an index names without the suffix, so such a name is refused.
    A ``UserError`` where there are none, or not all, or others.
    """
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if (folder / WEIGHTS_INDEX).is_file():
        return _shards(folder)
    pickled = next((file.name for file in folder.glob("*.bin")), None)
    if pickled:
        raise UserError(
            f"checkpoint ({folder}) has pickled weights ({pickled}), which can run code: save them "
            f"as {WEIGHTS}"
        )
    raise UserError(f"checkpoint ({folder}) is incomplete, {WEIGHTS} is missing: copy it again")


def _shards(folder: Path) -> list[str]:
    index = folder / WEIGHTS_INDEX
    weight_map = read_json(index, COPY_AGAIN).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: weight_map must name a file for each weight: {COPY_AGAIN}")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or _is_path(shard):
            raise UserError(
                f"{index}: weight_map puts {name} into {shard!r}, which is no .safetensors file of "
                "the folder, and others can run code: save the weights again"
            )
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if kind_of(folder / shard, str(index)) != "file":
            raise UserError(
                f"checkpoint ({folder}) is incomplete, {shard} is missing: copy it again"
            )
    return shards


def _is_path(name: str) -> bool:
    """Whether a name leads out of its folder, on this system or another; or is none at all."""
    return any(sign in name for sign in ("/", "\\", ":", "\0"))


def check_size(folder: Path, config: Any) -> None:
    """Find out before a model is built from ``config`` whether its weights are far too few.

    Raises:
        UserError: The files have fewer bytes than the model has parameters.
        SafetensorError: A file is cut off or none of the format.
    """
    stored = 0
    for name in weight_files(folder):
        with safe_open(folder / name, framework="pt"):
            stored += (folder / name).stat().st_size
    width, layers = config.hidden_size, config.num_hidden_layers
    block = getattr(config, "mixer_parameters", 0) + 2 * width * config.intermediate_size
    least = config.vocab_size * width + layers * block
    if least > stored:
        raise UserError(
            f"checkpoint ({folder}) is incomplete, its weights have {stored:,} bytes and "
            f"config.json describes a model of {least:,} parameters at least: copy it again"
        )


def read_weights(folder: Path, *, tied: bool) -> dict[str, Tensor]:
    """A checkpoint's weights by name, from all its files.

    ``tied``: the output layer may be the embedding. A ``SafetensorError`` where a file is damaged,
    a ``UserError`` as ``weight_files`` has it.
    """
    weights: dict[str, Tensor] = {}
    for name in weight_files(folder):
        weights |= load_file(folder / name)
    if tied and "model.embed_tokens.weight" in weights:
        weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    return weights
