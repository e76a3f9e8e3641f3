"""The list of keys that ``train.py --help`` prints."""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, cast, get_args, get_origin

from retnet.training.config import config_schema


def describe_keys() -> Iterator[str]:
    """One line for each key: name, type, default, meaning."""
    for section in dataclasses.fields(config_schema()):
        for option in dataclasses.fields(cast(Any, section.type)):
            default = option.default
            if default is dataclasses.MISSING:
                default = cast(Any, option.default_factory)()
            name = f"{section.name}.{option.name}"
            shown = (
                "null"
                if default is None
                else str(default).lower()
                if isinstance(default, bool)
                else default
                if default != ""
                else '""'
            )
            yield f"  {name}: {_type_name(option.type)} = {shown}\n      {option.metadata['help']}"


def _type_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " | ".join(get_args(kind))
    if isinstance(kind, type) and not get_args(kind):
        return kind.__name__
    return str(kind).replace("None", "null")
