"""The weights of a checkpoint folder: which files they are, and whether they may be loaded."""

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from retnet.checkpoints.format import ADAPTER, COPY_AGAIN, WEIGHTS, WEIGHTS_INDEX, only_an_adapter
from retnet.errors import UserError
from retnet.files import LFS_POINTER, check_no_pointer, read_json, unreadable
from retnet.paths import kind_of

NUMBERS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # that weights may be


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
    if (folder / ADAPTER).is_file():
        raise UserError(only_an_adapter(folder))
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
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or is_path(shard):
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


def is_path(name: str) -> bool:
    """Whether a name leads out of its folder, on this system or another; or is none at all."""
    return any(sign in name for sign in ("/", "\\", ":", "\0"))


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a folder's weights, read from the heads of their files.

    A ``SafetensorError`` where a file is cut off or none of the format, a ``UserError`` where two
    files have a weight of the same name.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name in weight_files(folder):
        heads = file_heads(folder / name)
        _check_new(folder / name, heads, shapes)
        shapes |= {key: shape for key, (shape, _) in heads.items()}
    return shapes


def file_heads(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """The names of a file's tensors, with shape and type (as safetensors names it: BF16).

    Errors as of ``stored_shapes``.
    """
    with _opened(path) as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        return {key: (tuple(x.get_shape()), x.get_dtype()) for key, x in slices.items()}


def stored_tensors(folder: Path, quantised: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """A folder's weights one after the other, floating-point numbers; like ``stored_shapes``.

    Those that are named by ``quantised`` may be of any type.
    """
    for name in weight_files(folder):
        with _opened(folder / name) as file:
            names = file.keys()
            for key in names:
                tensor = file.get_tensor(key)
                if tensor.dtype not in NUMBERS and key not in quantised:
                    raise UserError(
                        f"{folder / name}: {key} is of type {tensor.dtype}, in which nothing is "
                        "computed here: save the weights as floating-point numbers"
                    )
                yield key, tensor


def _check_new(file: Path, names: Iterable[str], known: Mapping[str, Any]) -> None:
    """Raise a ``UserError`` where a file has a weight that another file has too."""
    twice = sorted(name for name in names if name in known)
    if twice:
        raise UserError(
            f"{file}: {twice[0]} is in another file of weights too ({len(twice)} such), and which "
            "is meant is not told: remove one of them, or copy the checkpoint again"
        )


def _opened(path: Path) -> Any:
    try:
        with path.open("rb") as file:  # safetensors says of one it may not read that there is none
            beginning = file.read(len(LFS_POINTER))
    except PermissionError as error:
        raise UserError(unreadable(path)) from error
    check_no_pointer(path, beginning, path.stat().st_size)
    if any("\udc80" <= letter <= "\udcff" for letter in str(path)):
        raise UserError(
            f"{path} has a name that is no {sys.getfilesystemencoding()} text, and the library "
            "that reads weights knows no others: rename the folder, or go into it (cd) and name "
            "it by ."
        )
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise SafetensorError(f"{path.name}: {error}") from error
    except (MemoryError, OSError, RuntimeError) as error:  # it is larger than what can be mapped
        raise UserError(
            f"{path} has {path.stat().st_size:,} bytes, which memory does not take ({error}): use "
            "a machine with more, or copy the checkpoint again"
        ) from error


def check_size(folder: Path, config: Any, least_bits: int = 8) -> None:
    """Find out before a model is built from ``config`` whether its weights are far too few.

    ``least_bits``: what a parameter takes at least.

    Raises:
        UserError: The files have fewer bytes than the model's parameters take, or fewer tensors
            than it has layers.
        SafetensorError: A file is cut off or none of the format.
    """
    number = len(stored_shapes(folder))
    stored = sum((folder / name).stat().st_size for name in weight_files(folder))
    width, layers = config.hidden_size, config.num_hidden_layers
    layer_of = getattr(config, "config_of", lambda layer_idx: config)
    own = [layer_of(i) for i in range(min(layers, number))]
    blocks = [getattr(x, "mixer_parameters", 0) + 2 * width * x.intermediate_size for x in own]
    least = config.vocab_size * width + sum(blocks)
    few = least * least_bits > stored * 8
    described = f"{least:,} parameters" if few else f"{layers:,} layers"
    if few or layers > number:
        raise UserError(
            f"checkpoint ({folder}) is incomplete, its weights have {stored:,} bytes in {number:,} "
            f"tensors and config.json describes a model of {described} at least: copy it again"
        )


def read_file(path: Path) -> dict[str, Tensor]:
    """All tensors of one file.

    A ``SafetensorError`` where it is damaged, a ``UserError`` that names it where it may not be
    read or memory does not take it.
    """
    with _opened(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def read_weights(folder: Path, *, tied: bool) -> dict[str, Tensor]:
    """A checkpoint's weights by name, from all its files.

    ``tied``: the output layer may be the embedding. A ``SafetensorError`` where a file is damaged,
    a ``UserError`` as ``weight_files`` has it.
    """
    weights: dict[str, Tensor] = {}
    for name in weight_files(folder):
        with _opened(folder / name) as file:
            names = file.keys()
            _check_new(folder / name, names, weights)
            weights |= {key: file.get_tensor(key) for key in names}
    if tied and "model.embed_tokens.weight" in weights:
        weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    return weights
