"""The files below a folder or of a glob, which agree: one walk serves both.

Links are followed, and each folder and file counts once, by its real path: a circle ends, and of
several names the one that is no link is taken. What cannot be read is named. What the project
itself writes (run folders, checkpoints, the cache) is never among the files; a file that is named
by itself is the caller's affair.
"""

import fnmatch
import glob
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from retnet.errors import UserError
from retnet.paths import expand, kind_of

logger = logging.getLogger(__name__)

# Of a run folder, which may lie in a folder of text or be one: what training writes there.
RUN_NAMES = ("config.yaml", "metrics.jsonl", "diverged.json", "checkpoints", "best", "final",
             "set-aside-*", "wandb", "retnet")  # fmt: skip
ANYTHING = ("*",)


def _is_run(names: set[str]) -> bool:
    return "config.yaml" in names and not names.isdisjoint(
        (".lock", "metrics.jsonl", "checkpoints")
    )


def _is_checkpoint(names: set[str]) -> bool:
    return names >= {"config.json", "manifest.json", "tokenizer.json"}


def _is_cache_entry(names: set[str]) -> bool:
    return names >= {"record.json", "train", "validation"}


def written_here(folder: Path, names: Iterable[str]) -> tuple[str, ...]:
    """Patterns for what the project has written into a folder, going by the names in it."""
    found = set(names)
    if _is_checkpoint(found):
        return ANYTHING
    if _is_cache_entry(found) and (folder / "train" / "tokens.bin").exists():
        return ANYTHING
    return RUN_NAMES if _is_run(found) else ()


class Listing:
    """The walk for one source; ``key`` is named in messages."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._names: dict[Path, list[str]] = {}  # of folders that were read
        self._reals: dict[Path, Path] = {}  # and their real paths
        self._lost: list[Path] = []  # links to nothing

    def names(self, folder: Path) -> list[str]:
        """What is in a folder and was not written there by the project, sorted.

        A ``UserError`` where the folder can't be read.
        """
        if folder not in self._names:
            try:
                found = sorted(path.name for path in folder.iterdir())
            except FileNotFoundError:  # it has gone since it was seen
                found = []
            except OSError as error:
                raise UserError(
                    f"{self._key}: {folder} cannot be read ({error.strerror}): make it readable, "
                    "or name a source without it"
                ) from error
            ours = written_here(folder, found)
            self._names[folder] = [
                name for name in found if not any(fnmatch.fnmatchcase(name, own) for own in ours)
            ]
        return self._names[folder]

    def folders(self, root: Path) -> Iterator[Path]:
        """``root`` and the folders below it, each once; hidden ones are left out.

        Those that links lead to come last, so that a folder has its own name where it has one.
        """
        seen, waiting = set(), [root]
        while waiting:
            linked: list[Path] = []
            while waiting:
                folder = waiting.pop()
                if self._real(folder) in seen:
                    continue
                seen.add(self._real(folder))
                yield folder
                below = [folder / name for name in self.names(folder) if not name.startswith(".")]
                found = [path for path in below if self._is_folder(path)]
                linked += [path for path in found if path.is_symlink()]
                waiting += [path for path in reversed(found) if not path.is_symlink()]
            waiting = sorted(linked, reverse=True)

    def _is_folder(self, path: Path) -> bool:
        kind = kind_of(path, self._key)
        if kind is None and path.is_symlink():
            self._lost.append(path)
        return kind == "folder"

    def files(self, paths: Iterable[Path]) -> list[Path]:
        """Those of some paths that lead to files, each file once, sorted.

        A ``UserError`` for a link to nothing, or where it cannot be told. One warning for such
        links that were seen on the way and may have been folders.
        """
        found: dict[Path, tuple[bool, str, Path]] = {}
        for path in paths:
            linked = path.is_symlink()
            kind = kind_of(path, self._key)
            if kind is None and linked:
                raise UserError(
                    f"{self._key}: {path} is a link to nothing: restore what it leads to, or "
                    "remove it"
                )
            if kind == "file":
                real = path.resolve() if linked else self._real(path.parent) / path.name
                named = (real != path, path.as_posix(), path)
                found[real] = min(found.get(real, named), named)
        if self._lost:
            more = f" ({len(self._lost)} such)" if len(self._lost) > 1 else ""
            logger.warning("%s: %s is a link to nothing%s", self._key, self._lost[0], more)
        return [path for _, _, path in sorted(found.values(), key=lambda entry: entry[1])]

    def _real(self, folder: Path) -> Path:
        if folder not in self._reals:
            self._reals[folder] = folder.resolve()
        return self._reals[folder]


def files_below(folder: Path, key: str, wanted: Callable[[Path], bool]) -> list[Path]:
    """The files below a folder that are wanted and not hidden, sorted by their relative paths."""
    listing = Listing(key)
    paths = (
        inner / name
        for inner in listing.folders(folder)
        for name in listing.names(inner)
        if not name.startswith(".") and wanted(inner / name)
    )
    return listing.files(paths)


def split_glob(pattern: str, key: str) -> tuple[Path, list[str]]:
    """The folder that a glob starts from, and its parts below that.

    Signs in the names of the current and the home folder stand for themselves.
    """
    parts = expand(pattern, key).parts
    base = Path.cwd()
    if pattern.startswith("~"):
        base = expand(Path(pattern).parts[0], key)
        parts = parts[len(base.parts) :]
    elif Path(pattern).is_absolute():
        base, parts = Path(parts[0]), parts[1:]
    rest = list(parts)
    while len(rest) > 1 and (name := _literal(rest[0])):
        base /= name
        rest.pop(0)
    return base, rest


def glob_location(base: Path, parts: list[str]) -> Path:
    """The absolute glob of ``split_glob``'s answer, which splits into the same again."""
    return Path(glob.escape(str(base)), *parts)


def _literal(part: str) -> str | None:
    """The name that a part of a glob stands for, escaped or not; None where it has signs."""
    name = re.sub(r"\[([*?[])\]", r"\1", part)
    return name if glob.escape(name) == part else None


def files_of_glob(base: Path, parts: list[str], key: str) -> list[Path]:
    """The files that the parts of a glob match below a folder, sorted."""
    listing = Listing(key)
    paths = [base]
    for part in [*parts, "*"] if parts[-1] == "**" else parts:
        folders = [path for path in paths if kind_of(path, key) == "folder"]
        if part == "**":
            paths = [inner for folder in folders for inner in listing.folders(folder)]
        else:
            paths = [
                folder / name for folder in folders for name in _matches(listing, folder, part)
            ]
        paths = list(dict.fromkeys(paths))
    return listing.files(paths)


def _matches(listing: Listing, folder: Path, part: str) -> list[str]:
    """The names in a folder that a part of a glob matches; hidden ones only where it says so."""
    if part == "..":
        return [part]
    names = listing.names(folder)
    if not part.startswith("."):
        names = [name for name in names if not name.startswith(".")]
    return fnmatch.filter(names, part)
