"""A checkpoint with the model's code beside it, for people who do not have this package.

    python -m retnet.checkpoints.export CHECKPOINT FOLDER

``AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`` then loads it. train.py
does the same for final/ (train.export_code).
"""

import argparse
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from retnet.checkpoints.code import MODEL, MODELS, SUFFIX, model_code
from retnet.checkpoints.find import find_checkpoint
from retnet.checkpoints.format import (
    CARD,
    CARRIED,
    CONFIG,
    COPY_AGAIN,
    DATA_RECORD,
    LORA,
    MANIFEST,
    OPTIMIZER,
    TOKENIZER,
    TRAINING_STATE,
    WEIGHTS_INDEX,
)
from retnet.checkpoints.quantised import refuse_quantised
from retnet.checkpoints.verify import check_weights_unchanged, described_files, write_manifest
from retnet.checkpoints.weights import weight_files
from retnet.cli import ArgumentParser, file_path, run
from retnet.errors import UserError, os_errors
from retnet.files import read_json, replacing, write_json
from retnet.paths import kind_of
from retnet.terminal import write_out

logger = logging.getLogger("retnet.checkpoints.export")  # __name__ is __main__ in a command

TOKENIZER_CONFIG = "tokenizer_config.json"
# What is taken along beside the weights: who publishes an export knows what is in it.
TOKENIZER_FILES = (TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "merges.txt", "chat_template.jinja")  # fmt: skip
PARTS = (CONFIG, "generation_config.json", *TOKENIZER_FILES, DATA_RECORD, CARD, "LICENSE")
NOT_NAMED = (OPTIMIZER, TRAINING_STATE, MANIFEST, CARRIED, LORA)  # for training, or written anew
CACHE = "blobs"  # where the links of huggingface_hub's own folders lead


def export_checkpoint(checkpoint: str | Path, folder: Path) -> Path:
    """Write a new folder with what ``find_checkpoint`` finds and the code of its model.

    Returns the checkpoint's folder; a ``UserError`` where there is none, its model has no public
    class, or ``folder`` is there already, lies in the checkpoint or can't be written.
    """
    source = find_checkpoint(checkpoint)
    check_new_folder(folder, source)
    check_weights_unchanged(source)
    refuse_quantised(source, f"checkpoint ({source})", "which transformers can't load")
    config = read_json(source / CONFIG, COPY_AGAIN)
    code = model_code(config.get("model_type"))
    if code is None:
        raise UserError(
            f"{source / CONFIG}: model_type ({config.get('model_type')}) has no class in "
            f"{MODEL / MODELS}{SUFFIX}: export a checkpoint of one that has"
        )
    config.pop("custom_pipelines", None)  # code of somebody else
    with (
        os_errors(f"folder ({folder}) cannot be written", "name another one, or free space there"),
        replacing(folder) as new,
    ):
        taken, left = parts_of(source)
        left = [name for name in left if name not in NOT_NAMED]
        if left:
            logger.warning("not exported: %s", ", ".join(left))
        for file in taken:
            shutil.copyfile(file, new / file.name)
        write_json(new / CONFIG, config)
        if (new / TOKENIZER_CONFIG).exists():
            settings = read_json(new / TOKENIZER_CONFIG, COPY_AGAIN)
            settings.pop("auto_map", None)
            write_json(new / TOKENIZER_CONFIG, settings)
        code.write(new)
        write_manifest(new)
    return source


def check_new_folder(folder: Path, source: Path) -> None:
    """Raise a ``UserError`` where a copy of a checkpoint can't be a new folder there."""
    if kind_of(folder, "folder") is not None:
        raise UserError(f"folder ({folder}) exists: name one that does not, or remove it")
    if source.resolve() in folder.resolve().parents:
        raise UserError(
            f"folder ({folder}) lies in the checkpoint ({source}), which is replaced and removed "
            "as a whole: name one elsewhere"
        )


def parts_of(source: Path) -> tuple[list[Path], list[str]]:
    """The files of a checkpoint that others may have, without code; and the names of the rest.

    Whatever a stranger has put beside them, code for instance, stays behind, and so does what a
    link leads to elsewhere on this machine, but for the weights. Code that came with the
    checkpoint is not named.
    """
    weights, described = {*weight_files(source), WEIGHTS_INDEX}, described_files(source)
    taken, left = [], []
    for file in sorted(source.iterdir()):
        real = file.resolve()
        inside = real.parent == source.resolve() or real.parent.name == CACHE
        if file.is_file() and (file.name in weights or (file.name in PARTS and inside)):
            taken.append(file)
        elif not (file.suffix == SUFFIX and file.name in described):
            left.append(file.name)
    return taken, left


def main(argv: Sequence[str]) -> None:
    """Parse and export."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser(
        prog="python -m retnet.checkpoints.export", description=__doc__, formatter_class=raw
    )
    parser.add_argument("checkpoint", help="a checkpoint folder, or a run folder")
    parser.add_argument("folder", type=file_path, help="to write; must not be there yet")
    arguments = parser.parse_args(argv)
    source = export_checkpoint(arguments.checkpoint, arguments.folder)
    write_out(f"{source} with the model's code: {arguments.folder}")


if __name__ == "__main__":
    sys.exit(run(main))
