"""The weights of a checkpoint folder: which files they are, and whether they may be loaded."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from retnet.errors import UserError
from retnet.generation.integrity import MANIFEST, find_damage
from retnet.paths import kind_of

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint.

    Raises:
        UserError: It cannot be read or is no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not readable JSON ({error}): copy the checkpoint again"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold an object: copy the checkpoint again")
    return content


def weight_files(folder: Path) -> list[str]:
    """The names of the safetensors files with the weights: one, or the shards of the index.

    transformers unpickles whatever an index names without the suffix, so such a name is refused.

    Raises:
        UserError: There are none, or not all, or others.
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
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(
            f"{index}: weight_map must name a file for each weight: copy the checkpoint again"
        )
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or _is_path(shard):
            raise UserError(
                f"{index}: weight_map puts {name} into {shard!r}, which is no .safetensors file of "
                "the folder, and others can run code: save the weights again"
            )
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if kind_of(folder / shard, str(index)) != "file"]
    if missing:
        raise UserError(
            f"checkpoint ({folder}) is incomplete, {missing[0]} is missing: copy it again"
        )
    return shards


def _is_path(name: str) -> bool:
    """Whether a name leads out of its folder, on this system or another; or is none at all."""
    return any(sign in name for sign in ("/", "\\", ":", "\0"))


def check_size(folder: Path, config: Any) -> None:
    """Find out before a model is built whether its weights are far too few.

    Args:
        folder: The checkpoint.
        config: Its configuration as transformers reads it.

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


def check_weights_unchanged(folder: Path) -> None:
    """Compare the weights with the manifest of their folder.

    The other files are text that one may want to edit; a folder without a manifest is accepted.

    Raises:
        UserError: They are not what the manifest describes, or ``weight_files`` refuses them.
    """
    files = weight_files(folder)
    if not (folder / MANIFEST).is_file():
        return
    damage = find_damage(folder, only=(WEIGHTS, *files))
    if damage is not None:
        raise UserError(
            f"checkpoint ({folder}) is damaged, {damage}: copy it again, or remove {MANIFEST} if "
            "you changed the weights yourself"
        )
