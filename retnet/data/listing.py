"""The files below a folder or of a glob, which agree: one walk serves both.

Links are followed, and each folder and file counts once, by its real path: a circle ends, and of
several names the one that is no link is taken. What cannot be read is named. What the project
itself writes (run folders, checkpoints, the cache) is never among the files; a file that is named
by itself is the caller's affair.
"""

import fnmatch
import glob
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from retnet.errors import UserError
from retnet.paths import Kind, expand, kind_of

logger = logging.getLogger(__name__)

# Of a run folder, which may lie in a folder of text or be one: what training writes there.
RUN_NAMES = ("config.yaml", "metrics.jsonl", "diverged.json", "checkpoints", "best", "final",
             "set-aside-*", "wandb", "retnet", "trackio", "mlflow", ".aim")  # fmt: skip
# The files of a report on a comparison, which may lie in a folder with others.
REPORT_NAMES = ("report.json", "report.md", "report.html")
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
    report = REPORT_NAMES if found.issuperset(REPORT_NAMES) else ()
    return (*RUN_NAMES, *report) if _is_run(found) else report


class Listing:
    """The walk for one source; ``key`` is named in messages."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._kinds: dict[Path, dict[str, Kind | None]] = {}  # of the names in folders
        self._reals: dict[Path, Path] = {}  # the folders' real paths
        self._lost: list[Path] = []  # links to nothing

    def names(self, folder: Path) -> dict[str, Kind | None]:
        """What is in a folder and was not written there by the project, sorted: names and kinds.

        A link has none, since it takes a look to tell. A ``UserError`` where the folder can't be
        read.
        """
        if folder not in self._kinds:
            try:
                with os.scandir(folder) as found:
                    kinds = {entry.name: _plain_kind(entry) for entry in found}
            except FileNotFoundError:  # it has gone since it was seen
                kinds = {}
            except OSError as error:
                raise UserError(
                    f"{self._key}: {folder} cannot be read ({error.strerror}): make it readable, "
                    "or name a source without it"
                ) from error
            ours = written_here(folder, kinds)
            self._kinds[folder] = {
                name: kinds[name]
                for name in sorted(kinds)
                if not any(fnmatch.fnmatchcase(name, own) for own in ours)
            }
        return self._kinds[folder]

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
                shown = [item for item in self.names(folder).items() if item[0][0] != "."]
                links = [folder / name for name, kind in shown if kind is None]
                linked += [path for path in links if self._leads_to_folder(path)]
                waiting += [folder / name for name, kind in reversed(shown) if kind == "folder"]
            waiting = sorted(linked, reverse=True)

    def _leads_to_folder(self, link: Path) -> bool:
        kind = kind_of(link, self._key)
        if kind is None:
            self._lost.append(link)
        return kind == "folder"

    def files(self, paths: Iterable[Path]) -> list[Path]:
        """Those of some paths that lead to files, each file once, sorted.

        A ``UserError`` for a link to nothing, or where it cannot be told. One warning for such
        links that were seen on the way and may have been folders.
        """
        found: dict[Path, tuple[bool, str, Path]] = {}
        for path in paths:
            kind, linked = self._kinds.get(path.parent, {}).get(path.name), False
            if kind is None:
                kind, linked = kind_of(path, self._key), path.is_symlink()
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


def _plain_kind(entry: os.DirEntry[str]) -> Kind | None:
    """What an entry is without following it; None for a link."""
    if entry.is_symlink():
        return None
    if entry.is_dir(follow_symlinks=False):
        return "folder"
    return "file" if entry.is_file(follow_symlinks=False) else "other"


def _matches(listing: Listing, folder: Path, part: str) -> list[str]:
    """The names in a folder that a part of a glob matches; hidden ones only where it says so."""
    if part == "..":
        return [part]
    names: Iterable[str] = listing.names(folder)
    if not part.startswith("."):
        names = [name for name in names if not name.startswith(".")]
    return fnmatch.filter(names, part)
