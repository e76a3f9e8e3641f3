"""Tokens on disk: one memory-mapped array, the documents' starts and sizes, and a manifest.

The manifest is written last and holds sizes and checksums, so a folder that lacks it or disagrees
with it is known to be damaged.
"""

import zlib
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retnet.files import read_json, sync, write_json

TOKENS, MANIFEST = "tokens.bin", "manifest.json"
STARTS, SIZES = "document_starts.npy", "document_bytes.npy"
ARRAYS = (TOKENS, STARTS, SIZES)
FORMAT = 1
DTYPES = ("uint16", "uint32")
BLOCK_BYTES = 1 << 22


class DamagedTokenFileError(ValueError):
    """A folder of tokens is incomplete or not what its manifest says."""


@dataclass(frozen=True, eq=False)
class TokenFile:
    """The documents of one side, as ``<bos>`` text ``<eos>`` one after the other."""

    tokens: np.ndarray  # uint16 or uint32 [n], memory-mapped
    document_starts: np.ndarray  # int64 [D], the index of each document's first token
    document_bytes: np.ndarray  # int64 [D], UTF-8 bytes of each document's text
    manifest: dict[str, Any]  # counts, checksums and where the tokens come from

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
    def padding(self) -> int:
        """The id that fills the last window up; older manifests have none."""
        padding: int = self.manifest.get("pad_token_id", 0)
        return padding

    @classmethod
    def open(cls, folder: Path) -> "TokenFile":
        """Map the token file in ``folder``; a ``DamagedTokenFileError`` where it is not whole."""
        try:
            manifest = read_json(folder / MANIFEST, "prepare the text again")
            for name in ARRAYS:
                if _checksum(folder / name) != manifest["checksums"][name]:
                    raise DamagedTokenFileError(f"{folder / name} is not what was written")
            if manifest["dtype"] not in DTYPES:
                raise DamagedTokenFileError(f"{folder / MANIFEST}: dtype is none of {DTYPES}")
            found = cls(
                tokens=np.memmap(folder / TOKENS, dtype=manifest["dtype"], mode="r"),
                document_starts=np.load(folder / STARTS),
                document_bytes=np.load(folder / SIZES),
                manifest=manifest,
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
    files = {name: folder / name for name in least}
    return min(committed.values()) >= 0 and all(
        file.is_file() and file.stat().st_size >= least[name] for name, file in files.items()
    )


def _dtype_for(max_token_id: int) -> np.dtype:
    return np.dtype(np.uint16 if max_token_id < 1 << 16 else np.uint32)


class TokenFileWriter:
    """Write a token file document by document; nothing but the starts and sizes stays in memory.

    After ``commit`` a writer that was killed can be followed by one that goes on from there.
    """

    def __init__(
        self, folder: Path, max_token_id: int, committed: dict[str, int] | None = None
    ) -> None:
        """Start a token file, or go on after a ``commit`` that returned ``committed``."""
        self._folder = folder
        self._dtype = _dtype_for(max_token_id)
        self._starts, self._sizes = array("q"), array("q")
        self.num_tokens = self._committed = 0
        if committed is None:
            folder.mkdir(parents=True)
        else:
            self.num_tokens, self._committed = committed["tokens"], committed["documents"]
            for path, values in self._parts():
                with path.open("r+b") as stream:
                    stream.truncate(self._committed * values.itemsize)
                    values.fromfile(stream, self._committed)
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

    def add(self, ids: np.ndarray, num_bytes: int) -> None:
        """Append a document or its beginning: all tokens [t] and the UTF-8 bytes of the text."""
        self._starts.append(self.num_tokens)
        self._sizes.append(0)
        self.extend(ids, num_bytes)

    def extend(self, ids: np.ndarray, num_bytes: int) -> None:
        """Append to the last document; arguments as those of ``add``."""
        self._sizes[-1] += num_bytes
        self._stream.write(ids.astype(self._dtype).tobytes())
        self.num_tokens += len(ids)

    def commit(self) -> dict[str, int]:
        """Have everything so far on disk; returns what a later writer needs to go on."""
        self._stream.flush()
        sync(self._folder / TOKENS)
        for path, values in self._parts():
            with path.open("ab") as stream:
                values[self._committed :].tofile(stream)
            sync(path)
        self._committed = self.num_documents
        return self.counts()

    def counts(self) -> dict[str, int]:
        """Documents, bytes of text and tokens so far."""
        sizes = self._sizes
        return {"documents": len(sizes), "bytes": sum(sizes), "tokens": self.num_tokens}

    def forget(self) -> None:
        """Remove what only a later writer would need."""
        for path, _ in self._parts():
            path.unlink(missing_ok=True)

    def _parts(self) -> list[tuple[Path, array]]:
        """What a later writer needs beside the tokens, and the files that it is committed to."""
        named = ((STARTS, self._starts), (SIZES, self._sizes))
        return [(self._folder / f"{name}.part", values) for name, values in named]

    def finish(self, **facts: Any) -> None:
        """Write what belongs beside the tokens, the manifest (with ``facts``) last."""
        self._stream.close()
        np.save(self._folder / STARTS, np.array(self._starts, dtype=np.int64))
        np.save(self._folder / SIZES, np.array(self._sizes, dtype=np.int64))
        manifest = {
            "format": FORMAT,
            "dtype": self._dtype.name,
            **self.counts(),
            "checksums": {name: _checksum(self._folder / name) for name in ARRAYS},
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
