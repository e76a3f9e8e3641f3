"""Values of a configuration: YAML in and out, and whether one is of the type of its key.

``${...}`` is text like any other, and the environment is never asked.
"""

import datetime
import math
import re
import types
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from retnet.data.aliases import MOST_NODES, too_large
from retnet.errors import UserError

DIGITS = "[0-9]+(_[0-9]+)*"
MOST_BITS = 1000  # of a whole number; Python takes long over the digits of larger ones


class _Loader(yaml.SafeLoader):
    """YAML in which no key stands twice and 1e-3 is a number."""

    def construct_document(self, node: yaml.Node) -> Any:
        if too_large(node):
            raise yaml.constructor.ConstructorError(
                None, None, f"more than {MOST_NODES:,} values", node.start_mark
            )
        return super().construct_document(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} is there twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
            raise yaml.constructor.ConstructorError(  # the library trusts a tag that is written out
                None, None, f"a value that is none of its tag {node.tag}", node.start_mark
            ) from error


class _Dumper(yaml.SafeDumper):
    """The same numbers as in ``_Loader``, so that text which looks like one is quoted."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(rf"[-+]?({DIGITS}\.?({DIGITS})?|\.{DIGITS})[eE][-+]?[0-9]+$"),
        list("-+0123456789."),
    )


def read_yaml(text: str) -> Any:
    """What a YAML text holds.

    Raises:
        yaml.YAMLError, ValueError, RecursionError: It is none.
    """
    return yaml.load(text, _Loader)  # a SafeLoader


def write_yaml(content: Any) -> str:
    """A YAML text from which ``read_yaml`` gets the same."""
    return yaml.dump(
        content, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False,
        width=math.inf,
    )  # fmt: skip


def is_text(kind: Any) -> bool:
    """Whether a key's type is str, or str | null."""
    return set(_options(kind)) <= {str, type(None)}


def read_argument(kind: Any, text: str) -> Any:
    """The value of a key on the command line.

    For text it is all that stands after ``=``, as it is; null only where the key may have it.

    Raises:
        yaml.YAMLError, ValueError, RecursionError: It can't be read.
    """
    if is_text(kind):
        return None if text == "null" and type(None) in _options(kind) else text
    return read_yaml(text)


def fit(kind: Any, value: Any, key: str) -> Any:
    """The value as one of the type ``kind``, exactly.

    Raises:
        UserError: It is of another; names the key, the value and what it must be.
    """
    for option in _options(kind):
        fits, found = _converted(option, value)
        if fits:
            return found
    if isinstance(value, datetime.date | bool | int | float) and is_text(kind):
        raise UserError(
            f"{key} ({shown(value)}) must be text, and YAML reads it as something else: put it in "
            "quotes as you mean it"
        )
    names = [_describe(option) for option in _options(kind)]
    raise UserError(f"{key} ({shown(value)}) must be {' or '.join(names)}")


def shown(value: Any) -> str:
    """A value as a message has it: as YAML writes it, and never long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict | list | set | tuple):
        return "a mapping" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        return "a number of hundreds of digits"
    return str(value)


def _options(kind: Any) -> tuple[Any, ...]:
    union = get_origin(kind) in (Union, types.UnionType)
    return get_args(kind) if union else (kind,)


def _describe(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) is list:
        return "a list of whole numbers, as [1, 3]" if kind == list[int] else "a list, as [a, b]"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names.get(kind, "null")


def _converted(kind: Any, value: Any) -> tuple[bool, Any]:
    """Whether a value is of a type that is no union, and what it is as such.

    Numbers may be in quotes, whole ones may stand for others, 0 and 1 for false and true. Python
    would read other scripts' digits too.
    """
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind), value
    if get_origin(kind) is list:
        if not isinstance(value, list):
            return False, None
        parts = [_converted(get_args(kind)[0], part) for part in value]
        return all(fits for fits, _ in parts), [part for _, part in parts]
    if kind is bool and type(value) is int and value in (0, 1):
        return True, bool(value)
    if kind in (int, float) and type(value) in (int, float, str):
        if isinstance(value, str) and not value.isascii():
            return False, None
        try:
            found = float(value) if kind is float else value if type(value) is int else None
            found = int(value) if isinstance(value, str) and kind is int else found
        except (ValueError, OverflowError):  # no number, or none that a float can be
            return False, None
        return found is not None and not _is_long(found), found
    return type(value) is kind, value


def _is_long(number: int | float) -> bool:
    return isinstance(number, int) and number.bit_length() > MOST_BITS
