"""The ``model`` section of a configuration: the keys of all mixers that there are.

The section is made when it is asked for, of the configurations' own fields, so a mixer that is
registered later has its keys too.
"""

import dataclasses
import functools
import logging
from dataclasses import Field, field
from typing import Any, Literal

from retnet.model.mixers import MIXERS

logger = logging.getLogger(__name__)

NOT_OF_THE_MODEL = ("mixer", "init_from")


def mixer_keys(mixer: str) -> dict[str, Field]:
    """The keys that mean something to a mixer, with the defaults that it gives them."""
    fields = dataclasses.fields(MIXERS[mixer].options)
    return {option.name: option for option in fields if "help" in option.metadata}


def model_section() -> type[Any]:
    """The section as a dataclass; a key whose default is the mixer's own is null in it."""
    return _section_of(tuple(MIXERS.items()))


@functools.cache
def _section_of(mixers: tuple[tuple[str, Any], ...]) -> type[Any]:
    names = {"help": "what mixes the tokens of a row; each has its own keys below"}
    options: list[Any] = [
        ("mixer", Literal[tuple(MIXERS)], field(default=mixers[0][0], metadata=names))
    ]
    keys = {mixer: mixer_keys(mixer) for mixer in MIXERS}
    for key in dict.fromkeys(key for own in keys.values() for key in own):
        owners = {mixer: own[key] for mixer, own in keys.items() if key in own}
        options.append((key, *_merged(owners)))
    text = {"help": "checkpoint or run folder to take the weights from"}
    options.append(("init_from", str | None, field(default=None, metadata=text)))
    return dataclasses.make_dataclass("ModelSpec", options, frozen=True)


def _merged(owners: dict[str, Field]) -> tuple[Any, Any]:
    """Type and field of a key that these mixers have."""
    first, *others = owners.values()
    text = first.metadata["help"]
    if len(owners) < len(MIXERS):
        text = f"{', '.join(owners)}: {text}"
    elif all(other.default == first.default for other in others) and first.default is not None:
        return first.type, field(default=first.default, metadata={"help": text})
    else:
        defaults = {mixer: option.default for mixer, option in owners.items() if option.default}
        each = ", ".join(f"{default} for {mixer}" for mixer, default in defaults.items())
        text += f"; null: the mixer's own ({each})" if each else ""
    kind: Any = first.type
    return kind | None, field(default=None, metadata={"help": text})


def settled(section: Any) -> Any:
    """The section with the mixer's own defaults, and nothing for keys of other mixers.

    One that was set to something is named in a warning.
    """
    own, values = mixer_keys(section.mixer), dict(vars(section))
    for key, value in vars(section).items():
        if key in own:
            values[key] = own[key].default if value is None else value
        elif key not in NOT_OF_THE_MODEL and value is not None:
            owners = (mixer_keys(mixer) for mixer in MIXERS)
            if all(value != keys[key].default for keys in owners if key in keys):
                logger.warning("model.%s: no effect with model.mixer=%s", key, section.mixer)
            values[key] = None
    return type(section)(**values)
