"""What a run takes over from the checkpoint of ``model.init_from``: its model and its tokenizer.

Weights mean something in the model that they are of, and with the tokenizer they were trained with.
So a recipe's sizes and its tokenizer give way to the checkpoint's; what is asked for on the command
line stays, and is refused later where it makes another model of the weights.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from retnet.checkpoints import find_checkpoint
from retnet.checkpoints.configuration import read_config
from retnet.checkpoints.format import TOKENIZER
from retnet.checkpoints.quantised import refuse_quantised
from retnet.errors import UserError
from retnet.training.spec import mixer_keys

# Keys of a mixer that are no part of what weights mean.
OF_TRAINING = ("dropout", "chunk_size", "feature_redraw_interval")


def taken_over(init_from: str) -> Iterator[tuple[str, Any]]:
    """``section.key`` and value of all that a checkpoint decides.

    A ``UserError`` where there is none, or it is of no model of this package.
    """
    folder = find_checkpoint(init_from)
    try:
        config = read_config(folder, trust_remote_code=False)
    except UserError as error:  # nor is it run with an option, as generate.py has one
        reason = str(error).partition(": read that code")[0]
        raise UserError(f"model.init_from ({init_from}) is no model of ours: {reason}") from error
    refuse_quantised(folder, f"model.init_from ({init_from})", "which can't be trained")
    yield "model.mixer", config.mixer_class.name
    for key in mixer_keys(config.mixer_class.name):
        if key not in OF_TRAINING:
            yield f"model.{key}", getattr(config, key)
    if (folder / TOKENIZER).is_file():
        yield "data.tokenizer", str(folder)


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """The values of a recipe that gave way, for a line; empty where none did."""
    return ", ".join(
        f"{key} ({before[key]} -> {value})"
        for key, value in after.items()
        if key in before and before[key] != value
    )
