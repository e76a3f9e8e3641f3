"""The configuration in a checkpoint: read as data, of which nothing but a model's own keys counts.

transformers does more with a config.json than describe a model: it builds tables of any length,
takes kernels and quantised layers from elsewhere, and sets whatever attribute a key names. None of
that happens here.
"""

import difflib
import logging
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from retnet.checkpoints.convert.recognise import recognise
from retnet.checkpoints.format import CONFIG, COPY_AGAIN, WEIGHTS
from retnet.checkpoints.quantised import stored_format
from retnet.checkpoints.weights import NUMBERS
from retnet.cli import MOST, SHOWN, shortened
from retnet.errors import UserError
from retnet.files import read_json
from retnet.model.configuration import QUANTISED, DecoderConfig
from retnet.model.mixers import MIXERS
from retnet.model.models import configuration, model_class

logger = logging.getLogger(__name__)

CORRECT = "correct it, or copy the checkpoint again"
# What says where a file comes from, and nothing about the model.
NOTES = {"_name_or_path", "architectures", "auto_map", "dtype", "model_type", "torch_dtype",
         "transformers_version", QUANTISED}  # fmt: skip
DTYPES = tuple(str(dtype).removeprefix("torch.") for dtype in NUMBERS)
MOST_WARNINGS = 8  # of keys without effect, a line each
OWN_KERNELS = (None, "eager", "sdpa")  # what transformers has in itself


def read_config(folder: Path, *, trust_remote_code: bool) -> Any:
    """The configuration of a checkpoint; made by its own code only with ``trust_remote_code``.

    A ``UserError`` where it can't be read, is not of a model that is known, or makes no model.
    """
    file = folder / CONFIG
    stored = read_json(file, COPY_AGAIN)
    check_values(file, stored)
    kinds = {kind.model_type: kind for kind in map(configuration, map(model_class, MIXERS))}
    model_type = stored.get("model_type")
    own = kinds.get(model_type) if isinstance(model_type, str) else None
    if own is None:
        _check_own_code(file, stored, list(kinds), trust_remote_code)
    try:
        if own is not None:
            return own(**_keys_of(own, file, stored), dtype=_dtype_name(stored))
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=True)
    except Exception as error:  # each wrong value fails in a way of its own
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise UserError(f"{file}: {kind}{error}: {CORRECT}") from error


def _dtype_name(stored: dict[str, Any]) -> Any:
    return stored.get("dtype", stored.get("torch_dtype"))


def check_values(file: Path, stored: dict[str, Any]) -> None:
    """Raise a ``UserError`` for what no model's configuration may say, ours or another's."""
    dtype = _dtype_name(stored)
    if dtype is not None and dtype not in DTYPES:
        raise UserError(
            f"{file}: dtype ({shortened(dtype)}) is none of {', '.join(DTYPES)}: {CORRECT}"
        )
    weights = stored.get("transformers_weights")
    if weights is not None:
        raise UserError(
            f"{file}: transformers_weights ({weights}) names a file of weights: remove it, they "
            f"are in {WEIGHTS}"
        )
    for key, value in _entries(stored):
        kernel = "implementation" in key or ("kernel" in key and not _is_size(value))
        if kernel and not (value is None or value in OWN_KERNELS):
            raise UserError(
                f"{file}: {key} ({shortened(value)}) names code from elsewhere: remove it"
            )
        if any(abs(number) > MOST for number in _whole_numbers(value)):
            raise UserError(f"{file}: {key} ({shortened(value)}) is beyond 64 bits: {CORRECT}")
    stored_format(file, stored)


def _entries(stored: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The keys and values, also those of configurations inside of it."""
    for key, value in stored.items():
        yield key, value
        if isinstance(value, dict):
            yield from _entries(value)


def _is_size(value: Any) -> bool:
    """Whether a kernel is meant that is so many tokens wide (Mamba's conv_kernel)."""
    values = value if isinstance(value, list) else [value]
    return all(type(number) is int for number in values)


def _whole_numbers(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _whole_numbers(part)


def _check_own_code(
    file: Path, stored: dict[str, Any], known: list[str], trust_remote_code: bool
) -> None:
    """Raise a ``UserError`` where a model that is not known brings no code, or none to be run."""
    model_type = stored.get("model_type")
    own_code = trust_remote_code and "auto_map" in stored
    if not own_code and (found := recognise(file.parent, stored)) is not None:
        raise UserError(
            f"{file}: model_type ({model_type}) is {found.name}: {found.advice(file.parent)}"
        )
    if "auto_map" not in stored:
        raise UserError(
            f"{file}: model_type ({model_type}) is none of {', '.join(known)}: name a checkpoint "
            "made by train.py"
        )
    if not trust_remote_code:
        raise UserError(
            f"{file}: model_type ({model_type}) needs code from the checkpoint's own folder: read "
            "that code, then add --trust-remote-code"
        )


def _keys_of(own: type[DecoderConfig], file: Path, stored: dict[str, Any]) -> dict[str, Any]:
    """The keys that describe the model; warnings name the others, which have no effect."""
    known = {field.name for field in fields(own)} - {
        field.name for field in fields(PretrainedConfig)
    }
    known |= own.attribute_map.keys()
    others = sorted(stored.keys() - known - NOTES)
    for key in others[:MOST_WARNINGS]:
        name = key if key.isidentifier() and len(key) <= SHOWN else shortened(key)
        near = difflib.get_close_matches(key[:SHOWN], known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        logger.warning(
            "%s: %s is no field of %s and has no effect%s", file, name, own.__name__, hint
        )
    if (more := len(others) - MOST_WARNINGS) > 0:
        logger.warning(
            "%s: so have %s more keys, which are no fields of %s", file, f"{more:,}", own.__name__
        )
    keys: dict[str, Any] = {}
    for key in sorted(stored.keys() & known, key=lambda key: key in own.attribute_map):
        name = own.attribute_map.get(key, key)
        if name in keys and keys[name] != stored[key]:
            both = f"{name} ({shortened(keys[name])}) and {key} ({shortened(stored[key])})"
            raise UserError(f"{file}: {both} are one key: leave one of them out")
        keys[name] = stored[key]
    return keys
