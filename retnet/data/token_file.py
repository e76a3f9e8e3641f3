"""Tokens on disk: one memory-mapped array, the documents' starts and sizes, and a manifest.

Of conversations only the answers count as targets. Where they begin and end lies beside the tokens
as one rising row of indices: a token counts where an odd number of them does not exceed its own.

The manifest is written last and holds sizes and checksums, so a folder that lacks it or disagrees
with it is known to be damaged.
"""

import zlib
from array import array
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from retnet.files import read_json, sync, write_json

TOKENS, MANIFEST = "tokens.bin", "manifest.json"
STARTS, SIZES, BOUNDS = "document_starts.npy", "document_bytes.npy", "answer_bounds.npy"
ARRAYS = (TOKENS, STARTS, SIZES)
FORMAT = 1
DTYPES = ("uint16", "uint32")
BLOCK_BYTES = 1 << 22


class DamagedTokenFileError(ValueError):
    """A folder of tokens is incomplete or not what its manifest says."""


@dataclass(frozen=True, eq=False)
class TokenFile:
    """The documents of one side one after the other: ``<bos>`` text ``<eos>``, or conversations."""

    tokens: np.ndarray  # uint16 or uint32 [n], memory-mapped
    document_starts: np.ndarray  # int64 [D], the index of each document's first token
    document_bytes: np.ndarray  # int64 [D], UTF-8 bytes of each document's text, or its answers'
    manifest: dict[str, Any]  # counts, checksums and where the tokens come from
    answer_bounds: np.ndarray | None = None  # int64 [2 A], rising; None where all tokens count

    @property
    def num_tokens(self) -> int:
        """Tokens, special tokens included."""
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        """Documents."""
        return len(self.document_starts)

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all texts."""
        return int(self.document_bytes.sum())

    @property
    def num_targets(self) -> int:
        """Tokens that a loss is counted of."""
        return int(self.targets_before(np.array([self.num_tokens]))[0])

    def counts(self, positions: np.ndarray) -> np.ndarray | None:
        """Which of these tokens are targets, as far as that is not all but documents' first ones.

        None where it is all of those.
        """
        if self.answer_bounds is None:
            return None
        return np.searchsorted(self.answer_bounds, positions, side="right") % 2 == 1

    def targets_before(self, positions: np.ndarray) -> np.ndarray:
        """How many targets come before each of some positions in the file."""
        bounds = self.answer_bounds
        if bounds is None:  # a document's first token is none
            return positions - np.searchsorted(self.document_starts, positions, side="left")
        begun = np.searchsorted(bounds, positions, side="right")
        inside = np.where(begun % 2 == 1, positions - bounds[np.maximum(begun, 1) - 1], 0)
        return self._lengths_before[begun // 2] + inside

    @cached_property
    def _lengths_before(self) -> np.ndarray:
        """The tokens of all answers before each, [A + 1]."""
        assert self.answer_bounds is not None
        return np.append(0, np.cumsum(self.answer_bounds[1::2] - self.answer_bounds[::2]))

    @property
    def padding(self) -> int:
        """The id that fills the last window up; older manifests have none."""
        padding: int = self.manifest.get("pad_token_id", 0)
        return padding

    @classmethod
    def open(cls, folder: Path) -> "TokenFile":
        """Map the token file in ``folder``; a ``DamagedTokenFileError`` where it is not whole."""
        try:
            manifest = read_json(folder / MANIFEST, "prepare the text again")
            answers = BOUNDS in manifest["checksums"]
            for name in (*ARRAYS, *([BOUNDS] if answers else [])):
                if _checksum(folder / name) != manifest["checksums"][name]:
                    raise DamagedTokenFileError(f"{folder / name} is not what was written")
            if manifest["dtype"] not in DTYPES:
                raise DamagedTokenFileError(f"{folder / MANIFEST}: dtype is none of {DTYPES}")
            found = cls(
                tokens=np.memmap(folder / TOKENS, dtype=manifest["dtype"], mode="r"),
                document_starts=np.load(folder / STARTS),
                document_bytes=np.load(folder / SIZES),
                manifest=manifest,
                answer_bounds=np.load(folder / BOUNDS) if answers else None,
            )
            found._check_documents(folder)
            if type(found.padding) is not int or found.padding < 0:
                raise DamagedTokenFileError(f"{folder / MANIFEST}: pad_token_id is no id")
            return found
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise DamagedTokenFileError(f"{folder}: {error}") from error

    def _check_documents(self, folder: Path) -> None:
        """Raise a ``DamagedTokenFileError`` where the documents are not parts of the tokens."""
        starts, sizes = self.document_starts, self.document_bytes
        whole = all(part.dtype == np.int64 and part.ndim == 1 for part in (starts, sizes))
        ends = np.append(starts, len(self.tokens))
        if (not whole or len(starts) != len(sizes) or not len(starts) or starts[0] != 0
                or (np.diff(ends) < 1).any() or (sizes < 0).any()):  # fmt: skip
            raise DamagedTokenFileError(f"{folder / STARTS} does not fit {TOKENS} and {SIZES}")
        bounds = self.answer_bounds
        if bounds is not None and (
            bounds.dtype != np.int64 or bounds.ndim != 1 or not len(bounds) or len(bounds) % 2
            or bounds[0] < 0 or bounds[-1] > len(self.tokens) or (np.diff(bounds) < 0).any()
        ):  # fmt: skip
            raise DamagedTokenFileError(f"{folder / BOUNDS} does not fit {TOKENS}")

    def check_ids(self, largest: int) -> None:
        """Raise a ``DamagedTokenFileError`` where a token is beyond a vocabulary's largest id."""
        found = max(int(self.tokens.max()), self.padding)
        if found > largest:
            raise DamagedTokenFileError(
                f"{TOKENS} or {MANIFEST} has the id {found}, the vocabulary {largest}"
            )


def can_go_on(folder: Path, max_token_id: int, committed: dict[str, int]) -> bool:
    """Whether all that a ``commit`` returned counts of is there for another writer."""
    documents, each = committed["documents"], np.dtype(np.int64).itemsize
    least = {
        TOKENS: committed["tokens"] * _dtype_for(max_token_id).itemsize,
        **{f"{name}.part": documents * each for name in (STARTS, SIZES)},
    }
    if "answers" in committed:
        least[f"{BOUNDS}.part"] = 2 * committed["answers"] * each
    files = {name: folder / name for name in least}
    return min(committed.values()) >= 0 and all(
        file.is_file() and file.stat().st_size >= least[name] for name, file in files.items()
    )


def _dtype_for(max_token_id: int) -> np.dtype:
    return np.dtype(np.uint16 if max_token_id < 1 << 16 else np.uint32)


class TokenFileWriter:
    """Write a token file document by document; nothing but the starts and sizes stays in memory.

    After ``commit`` a writer that was killed can be followed by one that goes on from there. With
    ``answers`` only those count, and their bounds are written too.
    """

    def __init__(
        self,
        folder: Path,
        max_token_id: int,
        committed: dict[str, int] | None = None,
        *,
        answers: bool = False,
    ) -> None:
        """Start a token file, or go on after a ``commit`` that returned ``committed``."""
        self._folder = folder
        self._dtype = _dtype_for(max_token_id)
        self._starts, self._sizes = array("q"), array("q")
        self._bounds = array("q") if answers else None
        self.num_tokens = 0
        self._committed: dict[str, int] = {}  # how many numbers of each file are on disk
        if committed is None:
            folder.mkdir(parents=True)
        else:
            self.num_tokens, documents = committed["tokens"], committed["documents"]
            for path, values in self._parts():
                number = 2 * committed["answers"] if values is self._bounds else documents
                with path.open("r+b") as stream:
                    stream.truncate(number * values.itemsize)
                    values.fromfile(stream, number)
                self._committed[path.name] = number
        self._stream = (folder / TOKENS).open("r+b" if committed else "wb")
        self._stream.seek(self.num_tokens * self._dtype.itemsize)
        self._stream.truncate()

    def close(self) -> None:
        """Close the file, finished or not."""
        self._stream.close()

    @property
    def num_documents(self) -> int:
        """Documents so far."""
        return len(self._starts)

    def add(self, ids: np.ndarray, num_bytes: int, bounds: np.ndarray | None = None) -> None:
        """Append a document or its beginning: all tokens [t] and the UTF-8 bytes of the text.

        ``bounds`` [2 a] are those of its answers, where only they count.
        """
        self._starts.append(self.num_tokens)
        self._sizes.append(0)
        self.extend(ids, num_bytes, bounds)

    def extend(self, ids: np.ndarray, num_bytes: int, bounds: np.ndarray | None = None) -> None:
        """Append to the last document; arguments as those of ``add``."""
        self._sizes[-1] += num_bytes
        if self._bounds is not None and bounds is not None:
            self._bounds.extend((self.num_tokens + bounds).tolist())
        self._stream.write(ids.astype(self._dtype).tobytes())
        self.num_tokens += len(ids)

    def commit(self) -> dict[str, int]:
        """Have everything so far on disk; returns what a later writer needs to go on."""
        self._stream.flush()
        sync(self._folder / TOKENS)
        for path, values in self._parts():
            with path.open("ab") as stream:
                values[self._committed.get(path.name, 0) :].tofile(stream)
            sync(path)
            self._committed[path.name] = len(values)
        return self.counts()

    def counts(self) -> dict[str, int]:
        """Documents, bytes of text and tokens so far; answers where only those count."""
        sizes = self._sizes
        counts = {"documents": len(sizes), "bytes": sum(sizes), "tokens": self.num_tokens}
        return counts if self._bounds is None else counts | {"answers": len(self._bounds) // 2}

    def forget(self) -> None:
        """Remove what only a later writer would need."""
        for path, _ in self._parts():
            path.unlink(missing_ok=True)

    def _parts(self) -> list[tuple[Path, array]]:
        """What a later writer needs beside the tokens, and the files that it is committed to."""
        return [(self._folder / f"{name}.part", values) for name, values in self._beside().items()]

    def _beside(self) -> dict[str, array]:
        """The files beside the tokens."""
        named = {STARTS: self._starts, SIZES: self._sizes}
        return named if self._bounds is None else named | {BOUNDS: self._bounds}

    def finish(self, **facts: Any) -> None:
        """Write what belongs beside the tokens, the manifest (with ``facts``) last."""
        self._stream.close()
        for name, values in self._beside().items():
            np.save(self._folder / name, np.array(values, dtype=np.int64))
        manifest = {
            "format": FORMAT,
            "dtype": self._dtype.name,
            **self.counts(),
            "checksums": {
                name: _checksum(self._folder / name) for name in (TOKENS, *self._beside())
            },
            **facts,
        }
        write_json(self._folder / MANIFEST, manifest)


def _checksum(path: Path) -> list[int]:
    """Size and CRC-32 of a file: enough against damage, and quicker than reading the corpus."""
    if not path.is_file():  # of a pipe the end would be waited for
        raise DamagedTokenFileError(f"{path} is no file")
    size, crc = 0, 0
    with path.open("rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            size += len(block)
            crc = zlib.crc32(block, crc)
    return [size, crc]
