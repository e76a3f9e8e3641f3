"""Reading back what was written as JSON: each entry is there and of its type, or is named."""

import reprlib
from typing import Any

NULL = type(None)


def entry(record: Any, name: str, *kinds: type, missing: Any = ...) -> Any:
    """An entry of an object; its type must be one of ``kinds`` exactly: true is no number here.

    An entry that is not there is ``missing``, where that is given. A ``ValueError`` otherwise.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{reprlib.repr(record)} is no object")
    if name not in record:
        if missing is ...:
            raise ValueError(f"{name!r} is missing")
        return missing
    if type(record[name]) not in kinds:
        raise unusable(record, name)
    return record[name]


def unusable(record: dict[str, Any], name: str) -> ValueError:
    """The error for an entry whose value can't be."""
    return ValueError(f"{name!r} ({reprlib.repr(record[name])}) is unusable")
