"""Checkpoints whose weights are stored in fewer bits (``model.quantised``): what config.json says.

    "quantization_config": {"quant_method": "retnet", "weights": "int8"}

is under the key that transformers knows, which then says that it does not know the method.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retnet.checkpoints.format import CONFIG, COPY_AGAIN
from retnet.cli import shortened
from retnet.errors import UserError
from retnet.files import read_json
from retnet.model.configuration import QUANT_METHOD, QUANTISED
from retnet.model.quantised import FORMATS, QuantisedLinear, replace_linears

AS_SAVED, PLAIN = "auto", "fp32"
CHOICES = (AS_SAVED, PLAIN, *FORMATS)  # of --weights


def stored_format(file: Path, stored: dict[str, Any]) -> str | None:
    """The format of the weights beside a config.json; None for plain ones.

    A ``UserError`` where it is none that is read here.
    """
    entry = stored.get(QUANTISED)
    if entry is None:
        return None
    if isinstance(entry, dict) and entry.get("quant_method") == QUANT_METHOD:
        if entry.get("weights") in FORMATS:
            return str(entry["weights"])
        raise UserError(
            f"{file}: {QUANTISED}.weights ({shortened(entry.get('weights'))}) is none of "
            f"{', '.join(FORMATS)}: {COPY_AGAIN}"
        )
    raise UserError(
        f"{file}: {QUANTISED} is of weights in a format that is not read here: save them as "
        "floating-point numbers"
    )


def format_of(folder: Path) -> str | None:
    """``stored_format`` of a checkpoint's folder."""
    return stored_format(folder / CONFIG, read_json(folder / CONFIG, COPY_AGAIN))


def bits_of(weights: str | None) -> int:
    """What a number takes at least in a format."""
    return 4 if weights == "int4" else 8


def stored_names(model: Any) -> set[str]:
    """Names of the tensors that stand for quantised weights."""
    layers = [(n, x) for n, x in model.named_modules() if isinstance(x, QuantisedLinear)]
    return {f"{name}.{own}" for name, layer in layers for own in layer.stored}


def refuse_quantised(folder: Path, what: str, why: str) -> None:
    """Raise a ``UserError`` where a checkpoint's weights are quantised; ``why`` that is wrong."""
    if found := format_of(folder):
        raise UserError(
            f"{what} has quantised weights ({found}), {why}: name the checkpoint that they were "
            "made of"
        )


def target_format(
    folder: Path, stored: str | None, weights: str, dtype: torch.dtype | None
) -> str | None:
    """The format that a model is to have whose weights are ``stored`` in one; None for plain ones.

    A ``UserError`` where ``weights`` is no choice, can't be made of what is stored, or does not go
    with ``dtype``.
    """
    if weights not in CHOICES:
        raise UserError(f"--weights ({weights}) must be one of {', '.join(CHOICES)}")
    if stored and weights not in (AS_SAVED, PLAIN, stored):
        raise UserError(
            f"--weights ({weights}): checkpoint ({folder}) has quantised weights already "
            f"({stored}): leave it out, or name the checkpoint that they were made of"
        )
    if dtype in (None, torch.float32):
        return stored if weights == AS_SAVED else None if weights == PLAIN else weights
    kind = str(dtype).removeprefix("torch.")
    if weights != AS_SAVED:
        raise UserError(
            f"--dtype ({kind}) does not go with --weights ({weights}), whose model computes in "
            "float32: leave one of them out"
        )
    if stored:
        raise UserError(
            f"--dtype ({kind}): checkpoint ({folder}) has quantised weights ({stored}), whose "
            "model computes in float32: leave it out"
        )
    return None


def change_format(folder: Path, model: Any, weights: str | None) -> None:
    """Store a model's weights in a format, or plainly; a ``UserError`` where they can't be."""
    try:
        replace_linears(model, weights)
    except ValueError as error:
        raise UserError(
            f"--weights ({weights}): checkpoint ({folder}): {error}: leave it out"
        ) from error


def check_stored(folder: Path, model: Any, weights: dict[str, Tensor]) -> None:
    """Raise a ``UserError`` where what stands for a quantised weight can't be that."""
    for place, layer in model.named_modules():
        if not isinstance(layer, QuantisedLinear):
            continue
        for own, expected in layer.stored.items():
            tensor = weights[f"{place}.{own}"]
            if tensor.dtype != expected.dtype:
                raise UserError(
                    f"checkpoint ({folder}) is damaged, {place}.{own} is of type {tensor.dtype} "
                    f"and {layer.weights} has {expected.dtype}: {COPY_AGAIN}"
                )
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise UserError(
                    f"checkpoint ({folder}) is damaged, {place}.{own} has numbers that are not "
                    f"finite: {COPY_AGAIN}"
                )
