"""One reader per file suffix: a path in, documents out.

A .txt or .md file is one document; a row of .jsonl, .csv and .parquet is one. Conversations are
rows of .jsonl and .parquet.
"""

import codecs
import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

from retnet.data.messages import EXAMPLE, FIELD, Conversation
from retnet.errors import UserError, memory_errors, os_errors
from retnet.files import LFS_POINTER, check_no_pointer, sha256

PARQUET_ROWS = 1024
MAX_LINE = 1 << 30  # bytes of a .jsonl line: a small packed file may hold more than any memory
MAX_CSV_FIELD = 2**31 - 1  # what a C long holds on every system
MOST_NAMES, LONGEST_NAME = 20, 40  # of fields in a message
BOM = codecs.BOM_UTF8.decode()


def read_documents(path: Path, text_field: str, messages: bool = False) -> Iterator[str]:
    """Yield the documents of one file in order; with ``messages`` they are conversations.

    A ``UserError`` where it is unreadable, damaged, a Git LFS pointer, not UTF-8 (with the offset
    of the first bad byte), or a row lacks ``text_field`` (with the fields there are).
    """
    with _reading(path), memory_errors(path):
        with path.open("rb") as file:
            check_no_pointer(path, file.read(len(LFS_POINTER)), path.stat().st_size)
        if suffix_of(path) not in readers(messages):
            raise UserError(
                f"{path} has no conversations, which data.format=messages asks for: use "
                f"{suffixes(messages)}, or leave the file out"
            )
        try:
            yield from readers(messages)[suffix_of(path)](path, text_field)
        except UnicodeDecodeError as error:
            unpacked = " of the unpacked text" if suffix_of(path).endswith(".gz") else ""
            raise UserError(
                f"{path} is not UTF-8 text: the first bad byte is at offset "
                f"{_first_bad_byte(path)}{unpacked}; convert the file to UTF-8 or leave it out"
            ) from error
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{path} is damaged ({error}): compress it again with gzip") from error


def hash_files(files: Iterable[Path], folder: Path | None = None, about: str = "") -> str:
    """The sha256 of names (relative to ``folder``) and contents, and of what else decides."""
    total = hashlib.sha256(about.encode())
    for path in files:
        name = path.relative_to(folder).as_posix() if folder else str(path)
        with _reading(path):
            total.update(name.encode("utf-8", "surrogateescape") + b"\0" + sha256(path))
    return total.hexdigest()


def _reading(path: Path) -> AbstractContextManager[None]:
    return os_errors(f"{path} cannot be read", "check the file and its permissions")


def suffix_of(path: Path) -> str:
    """The suffix that decides the reader, in lower case: ".txt", ".jsonl.gz"."""
    name = path.name.lower()
    return ".jsonl.gz" if name.endswith(".jsonl.gz") else Path(name).suffix


def readers(messages: bool) -> dict[str, Callable[[Path, str], Iterator[str]]]:
    """Those of texts, or of conversations."""
    return CONVERSATION_READERS if messages else READERS


def suffixes(messages: bool) -> str:
    """Those of the files that are read, for a message."""
    return ", ".join(readers(messages))


def document_of(messages: bool) -> Callable[[Any, str, str], str]:
    """What makes a document of a row's field."""
    return _conversation_of if messages else text_of


def _conversation_of(value: Any, field: str, where: str) -> str:
    return Conversation.of(value, where)


def text_of(value: Any, text_field: str, where: str) -> str:
    """The text of a row's field, "" for a null; a ``UserError`` where it is no string."""
    if not isinstance(value, str | None):
        raise UserError(
            f"data.text_field ({text_field}) of {where} holds {type(value).__name__}, not text: "
            "name a field of strings"
        )
    return value or ""


def missing_field(
    text_field: str, fields: list[str], where: str, messages: bool = False
) -> UserError:
    """The error for a field that is not there; it lists the fields there are, or the first."""
    names = [f"{x[:LONGEST_NAME]}{'...' * (len(x) > LONGEST_NAME)}" for x in fields[:MOST_NAMES]]
    if (more := len(fields) - MOST_NAMES) > 0:
        names.append(f"and {more:,} more")
    if messages:
        return UserError(
            f"data.format (messages): {where} has no field {FIELD} (there are "
            f"{', '.join(names) or 'none'}): name the conversation so, and {EXAMPLE} there"
        )
    return UserError(
        f"data.text_field ({text_field}) is not a field of {where}: "
        f"set it to one of the fields there are ({', '.join(names) or 'none'})"
    )


def _check_field(text_field: str, fields: list[str], path: Path, messages: bool = False) -> None:
    """Raise a ``UserError`` where a table has no column of that name, or several."""
    if text_field not in fields:
        raise missing_field(text_field, fields, str(path), messages)
    if fields.count(text_field) > 1:
        raise UserError(
            f"data.text_field ({text_field}) of {path} is the name of {fields.count(text_field)} "
            "columns, and which is meant is not told: give each a name of its own"
        )


def _open_binary(path: Path) -> BinaryIO:
    packed = suffix_of(path).endswith(".gz")
    return cast(BinaryIO, gzip.open(path)) if packed else path.open("rb")  # the caller closes it


def _first_bad_byte(path: Path) -> int:
    offset = 0
    with _open_binary(path) as stream:
        for line in stream:  # no byte of a longer character is that of a line break
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return offset + error.start
            offset += len(line)
    raise AssertionError(f"{path} is UTF-8 after all: it changed while being read")


def _read_text(path: Path, text_field: str) -> Iterator[str]:
    yield path.read_bytes().decode("utf-8").removeprefix(BOM)


def _read_jsonl(path: Path, text_field: str, messages: bool = False) -> Iterator[str]:
    with _open_binary(path) as stream:
        lines = iter(lambda: stream.readline(MAX_LINE + 1), b"")
        for number, line in enumerate(lines, start=1):
            where = f"{path} line {number}"
            if len(line) > MAX_LINE:
                raise UserError(
                    f"{where} has more than {MAX_LINE:,} bytes: spread its text over several lines"
                )
            text = line.decode("utf-8").removeprefix(BOM)
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{where} is not JSON ({error}): write one JSON object per line"
                ) from error
            if not isinstance(row, dict):
                raise UserError(
                    f"{where} holds {type(row).__name__}, not an object with fields: "
                    f'write {{"{text_field}": ...}}'
                )
            if text_field not in row:
                raise missing_field(text_field, list(row), where, messages)
            yield document_of(messages)(row[text_field], text_field, where)


def _read_csv(path: Path, text_field: str) -> Iterator[str]:
    # The csv module refuses fields over 128 KiB by default; a document may be any length.
    line = 1
    limit = csv.field_size_limit(MAX_CSV_FIELD)
    try:
        with _open_binary(path) as stream:
            text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
            rows = csv.reader(text, strict=True)
            fields = next((row for row in rows if row), [])
            _check_field(text_field, fields, path)
            line = rows.line_num + 1  # where a row begins: quoted text may have line breaks
            for row in rows:
                if row and len(row) != len(fields):
                    raise UserError(
                        f"{path} line {line} has {len(row)} fields and the header {len(fields)}: "
                        'put quotes around text with commas in it, as in "hello, world"'
                    )
                if row:
                    yield dict(zip(fields, row, strict=True))[text_field]
                line = rows.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path} is not valid CSV ({error}): repair the row that begins at line {line}"
        ) from error
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: Path, text_field: str, messages: bool = False) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            names = table.schema_arrow.names
            _check_field(text_field, names, path, messages)
            if not messages:
                _check_text(
                    table.schema_arrow.field(names.index(text_field)).type, text_field, path
                )
            batches = table.iter_batches(batch_size=PARQUET_ROWS, columns=[text_field])
            values = (value for batch in batches for value in batch.column(0))
            for number, value in enumerate(values, start=1):
                where = f"{path} row {number}"
                try:
                    text = value.as_py()
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{where} is not UTF-8 text in data.text_field ({text_field}), from byte "
                        f"{error.start} of the row's text on: write it again as UTF-8"
                    ) from error
                yield document_of(messages)(text, text_field, where)
    except pa.ArrowException as error:
        raise UserError(
            f"{path} is not a readable parquet file ({str(error).splitlines()[0]}): write it again"
        ) from error
    except UnicodeDecodeError as error:  # not of a row
        raise UserError(
            f"{path} is not a readable parquet file, the name of a column is not UTF-8: write it "
            "again"
        ) from error


def _check_text(kind: Any, text_field: str, path: Path) -> None:
    """Raise a ``UserError`` where a column's type is none of text: others may not even be read."""
    import pyarrow.types as of

    if of.is_dictionary(kind):
        kind = kind.value_type
    if not (of.is_string(kind) or of.is_large_string(kind) or of.is_string_view(kind)
            or of.is_null(kind)):  # fmt: skip
        raise UserError(
            f"data.text_field ({text_field}) of {path} holds {str(kind)[:80]}, not text: name a "
            "field of strings"
        )


READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
CONVERSATION_READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".jsonl": partial(_read_jsonl, messages=True),
    ".jsonl.gz": partial(_read_jsonl, messages=True),
    ".parquet": partial(_read_parquet, messages=True),
}
PLAIN_TEXT = (".txt", ".md")
