"""A checkpoint with its weights stored in fewer bits: smaller, and less to read for each token.

    python -m retnet.checkpoints.quantize CHECKPOINT FOLDER --weights int8

The folder loads like any other, to generate and to compare. It can't be trained, and transformers
does not load it; see docs/checkpoints.md.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from retnet.checkpoints.export import check_new_folder, parts_of
from retnet.checkpoints.find import find_checkpoint
from retnet.checkpoints.format import CONFIG, COPY_AGAIN, WEIGHTS, WEIGHTS_INDEX
from retnet.checkpoints.load import load_checkpoint
from retnet.checkpoints.quantised import refuse_quantised
from retnet.checkpoints.verify import write_manifest
from retnet.checkpoints.weights import weight_files
from retnet.cli import ArgumentParser, file_path, run
from retnet.errors import os_errors
from retnet.files import read_json, replacing, write_json
from retnet.model.configuration import QUANTISED
from retnet.model.quantised import FORMATS
from retnet.terminal import write_out


def quantize_checkpoint(checkpoint: str | Path, folder: Path, weights: str) -> Path:
    """Write a new folder with what ``find_checkpoint`` finds, its weights in a format.

    Returns the checkpoint's folder; a ``UserError`` where there is none, it can't be loaded or has
    quantised weights already, or ``folder`` is there already, lies in it or can't be written.
    """
    source = find_checkpoint(checkpoint)
    check_new_folder(folder, source)
    refuse_quantised(source, f"checkpoint ({source})", "and quantising them again loses more")
    model = load_checkpoint(source, weights=weights).model
    config = read_json(source / CONFIG, COPY_AGAIN)
    config |= {name: getattr(model.config, name) for name in (QUANTISED, "tie_word_embeddings")}
    config["dtype"] = "float32"
    config.pop("torch_dtype", None)
    written_anew = {CONFIG, WEIGHTS_INDEX, *weight_files(source)}
    with (
        os_errors(f"folder ({folder}) cannot be written", "name another one, or free space there"),
        replacing(folder) as new,
    ):
        for file in parts_of(source)[0]:
            if file.name not in written_anew:
                shutil.copyfile(file, new / file.name)
        write_json(new / CONFIG, config)
        save_file(model.state_dict(), new / WEIGHTS, metadata={"format": "pt"})
        (new / WEIGHTS).chmod((new / CONFIG).stat().st_mode)  # else only its owner may read it
        write_manifest(new)
    return source


def main(argv: Sequence[str]) -> None:
    """Parse and quantise."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser(
        prog="python -m retnet.checkpoints.quantize", description=__doc__, formatter_class=raw
    )
    parser.add_argument("checkpoint", help="a checkpoint folder, or a run folder")
    parser.add_argument("folder", type=file_path, help="to write; must not be there yet")
    text = "the format: bf16 (2 bytes a weight), int8 (1), int4 (0.6)"
    parser.add_argument("--weights", choices=FORMATS, required=True, help=text)
    arguments = parser.parse_args(argv)
    source = quantize_checkpoint(arguments.checkpoint, arguments.folder, arguments.weights)
    sizes = [sum((x / name).stat().st_size for name in weight_files(x))
             for x in (source, arguments.folder)]  # fmt: skip
    write_out(f"{source} as {arguments.weights}: {arguments.folder}")
    write_out(f"weights: {sizes[1]:,} bytes, {sizes[1] / sizes[0]:.2f} of {sizes[0]:,}")


if __name__ == "__main__":
    sys.exit(run(main))
