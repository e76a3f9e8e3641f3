"""Upload a checkpoint to the Hugging Face Hub, or list what would go.

    python -m retnet.checkpoints.push CHECKPOINT USER/NAME --dry-run
    python -m retnet.checkpoints.push CHECKPOINT USER/NAME

A run folder means its final/. What goes: configuration, weights, tokenizer, the model's code,
README.md and LICENSE. All else stays and is named: what only training needs, data.json and
manifest.json (they tell of files and paths of this machine; the Hub keeps checksums of its own),
and whatever else lies in the folder. A dry run needs neither network nor account. An upload that
was interrupted goes on where it was: what is there already is not sent again.
"""

import argparse
import glob
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from retnet.checkpoints.code import SUFFIX
from retnet.checkpoints.export import parts_of
from retnet.checkpoints.find import find_checkpoint
from retnet.checkpoints.format import CARD, CONFIG, DATA_RECORD, FINAL, TOKENIZER, is_run
from retnet.checkpoints.verify import described_files, find_damage
from retnet.checkpoints.weights import weight_files
from retnet.cli import ArgumentParser, run
from retnet.data.network import answered, is_network_failure, reason_of, while_reachable
from retnet.errors import UserError
from retnet.files import unreadable
from retnet.paths import expand
from retnet.terminal import in_one_line, write_out

logger = logging.getLogger("retnet.checkpoints.push")  # __name__ is __main__ in a command

T = TypeVar("T")
EXPORT = "python -m retnet.checkpoints.export writes a folder that can be pushed"


def files_to_push(folder: Path) -> tuple[list[Path], list[str]]:
    """The files of a checkpoint that go to the Hub, and the names of those that stay.

    A ``UserError`` where one is not what its manifest describes, or the card's header can't be
    read.
    """
    damage, described = find_damage(folder), described_files(folder)
    if damage is None:
        lacking = [x for x in (CONFIG, TOKENIZER, *weight_files(folder)) if x not in described]
        damage = f"its manifest says nothing of {', '.join(lacking)}" if lacking else None
    if damage is not None:
        raise UserError(
            f"checkpoint ({folder}) can't be verified, {damage}: copy it again; if you changed it "
            f"yourself, {EXPORT}"
        )
    parts, rest = parts_of(folder)
    code = [folder / name for name in described if name.endswith(SUFFIX)]
    files = [*(file for file in parts if file.name != DATA_RECORD), *code]
    stay = [*rest, *(file.name for file in parts if file.name == DATA_RECORD)]
    _check_card(folder / CARD if folder / CARD in files else None)
    if not code:
        logger.warning("%s has no code, people will need this package: %s", folder, EXPORT)
    return sorted(files), sorted(stay)


def _check_card(card: Path | None) -> None:
    """Say what a model card lacks; a ``UserError`` where it is none that the Hub can read."""
    if card is None:
        logger.warning(f"there is no {CARD}: the Hub will show no model card")
        return
    try:
        header: Any = ModelCard(card.read_text(encoding="utf-8")).data
    except PermissionError as error:
        raise UserError(unreadable(card)) from error
    except Exception as error:  # YAML's, the library's, or of the encoding
        raise UserError(
            f"{card}: the Hub can't read its header ({reason_of(error)}): correct what stands "
            "between the first two ---"
        ) from error
    if header.license is None:
        logger.warning(f"{card} names no license: add one between the first two ---")


def push(folder: Path, files: Sequence[Path], name: str, *, private: bool) -> str:
    """Upload files of a folder to a repository, which is made where there is none.

    Returns the address of the commit; a ``UserError`` where the Hub does not answer or refuses it.
    """
    what, api = f"NAME ({name})", HfApi()
    make = api.create_repo
    repository = _asked(
        what, lambda: answered(lambda: make(name, private=private or None, exist_ok=True))
    )

    def upload() -> str:
        done = api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=folder,
            allow_patterns=[glob.escape(file.name) for file in files],
            commit_message="Upload checkpoint",
        )
        return str(done.commit_url)

    return _asked(what, lambda: while_reachable(upload, repository.repo_id, "model", what))


def _asked(what: str, call: Callable[[], T]) -> T:
    """What the Hub gives; a ``UserError`` where it can't be reached or refuses."""
    try:
        return call()
    except UserError:
        raise
    except Exception as error:  # each transport has its own
        if is_network_failure(error):
            raise UserError(
                f"{what}: the Hub cannot be reached ({reason_of(error)}): connect to the network, "
                "or list what would go with --dry-run"
            ) from error
        if isinstance(error, HfHubHTTPError):
            raise UserError(
                f"{what}: the Hub refuses it ({str(error).splitlines()[0]}): correct the name, or "
                "log in with a token that may write there (hf auth login)"
            ) from error
        raise


def _find(path: str) -> Path:
    """The checkpoint that is meant; of a run nothing but its end."""
    folder = find_checkpoint(path)
    given = expand(path, "checkpoint")
    if folder != given and is_run(given) and folder.name != FINAL:
        raise UserError(
            f"checkpoint ({path}) is a run without {FINAL}/: finish it, or name the checkpoint "
            f"itself ({folder})"
        )
    return folder


def main(argv: Sequence[str]) -> None:
    """Parse, check, list and upload."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser(
        prog="python -m retnet.checkpoints.push", description=__doc__, formatter_class=raw
    )
    parser.add_argument("checkpoint", help="a checkpoint folder, or a run folder")
    parser.add_argument("name", metavar="NAME", help="of the repository: USER/NAME, or NAME")
    parser.add_argument("--dry-run", action="store_true", help="list what would go, and end")
    parser.add_argument("--private", action="store_true", help="if it is made now: for you alone")
    arguments = parser.parse_args(argv)
    name = arguments.name
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(
            f"NAME ({name}) can't be a repository's: write USER/NAME, of letters, digits, - _ and "
            "single dots"
        ) from error
    if not arguments.dry_run and get_token() is None:
        raise UserError(
            f"NAME ({name}) needs an account on the Hub, and there is no token: run hf auth login, "
            "or set HF_TOKEN; --dry-run lists what would go without"
        )
    folder = _find(arguments.checkpoint)
    files, stay = files_to_push(folder)
    lines = [f"{file.stat().st_size:>15,}  {in_one_line(file.name)}" for file in files]
    total = sum(file.stat().st_size for file in files)
    verb = "would go" if arguments.dry_run else "go"
    lines.append(f"{total:>15,}  bytes in {len(files)} files of {folder} {verb} to {name}")
    if stay:
        lines.append(f"not uploaded: {in_one_line(', '.join(stay))}")
    write_out("\n".join(lines))
    if not arguments.dry_run:
        write_out(push(folder, files, name, private=arguments.private))


if __name__ == "__main__":
    sys.exit(run(main))
