"""A checkpoint with the model's code beside it, for people who do not have this package.

    python -m retnet.checkpoints.export CHECKPOINT FOLDER

``AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`` then loads it. transformers
copies flat relative imports only (``from .a import b``), so the model's folders become one: the
file of ``mixers.retention`` is mixers_retention.py, and the imports are rewritten.
"""

import argparse
import ast
import logging
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import retnet.model
from retnet.checkpoints.find import find_checkpoint
from retnet.checkpoints.format import (
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
from retnet.checkpoints.verify import check_weights_unchanged, write_manifest
from retnet.checkpoints.weights import weight_files
from retnet.cli import ArgumentParser, file_path, run
from retnet.errors import UserError, os_errors
from retnet.files import read_json, replacing, write_json, write_text
from retnet.model.models import PUBLIC, configuration
from retnet.paths import kind_of
from retnet.terminal import write_out

logger = logging.getLogger("retnet.checkpoints.export")  # __name__ is __main__ in a command

MODEL = Path(retnet.model.__file__).parent
MODELS = "models"  # the module with the public classes, below that
TOKENIZER_CONFIG = "tokenizer_config.json"
# What is taken along beside the weights: who publishes an export knows what is in it.
PARTS = (CONFIG, "generation_config.json", TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json",
         "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", DATA_RECORD,
         "README.md", "LICENSE")  # fmt: skip
NOT_NAMED = (OPTIMIZER, TRAINING_STATE, MANIFEST, CARRIED, LORA)  # for training, or written anew
CACHE = "blobs"  # where the links of huggingface_hub's own folders lead


def export_checkpoint(checkpoint: str | Path, folder: Path) -> Path:
    """Write a new folder with what ``find_checkpoint`` finds and the code of its model.

    Returns the checkpoint's folder; a ``UserError`` where there is none, its model has no public
    class, or ``folder`` is there already, lies in the checkpoint or can't be written.
    """
    source = find_checkpoint(checkpoint)
    if kind_of(folder, "folder") is not None:
        raise UserError(f"folder ({folder}) exists: name one that does not, or remove it")
    if source.resolve() in folder.resolve().parents:
        raise UserError(
            f"folder ({folder}) lies in the checkpoint ({source}), which is replaced and removed "
            "as a whole: name one elsewhere"
        )
    check_weights_unchanged(source)
    config = read_json(source / CONFIG, COPY_AGAIN)
    config["auto_map"] = _auto_map(source, config.get("model_type"))
    config.pop("custom_pipelines", None)  # code of somebody else
    with (
        os_errors(f"folder ({folder}) cannot be written", "name another one, or free space there"),
        replacing(folder) as new,
    ):
        taken = _taken(source)
        for file in taken:
            shutil.copyfile(file, new / file.name)
        write_json(new / CONFIG, config)
        if (new / TOKENIZER_CONFIG).exists():
            settings = read_json(new / TOKENIZER_CONFIG, COPY_AGAIN)
            settings.pop("auto_map", None)
            write_json(new / TOKENIZER_CONFIG, settings)
        for name, text in flat_code(MODELS):
            write_text(new / f"{name}.py", text)
        write_manifest(new)
    return source


def _taken(source: Path) -> list[Path]:
    """The files of a checkpoint that an export has; a warning names the others.

    Whatever a stranger has put beside them, code for instance, stays behind, and so does what a
    link leads to elsewhere on this machine, but for the weights.
    """
    weights = {*weight_files(source), WEIGHTS_INDEX}
    taken, left = [], []
    for file in sorted(source.iterdir()):
        real = file.resolve()
        inside = real.parent == source.resolve() or real.parent.name == CACHE
        if file.is_file() and (file.name in weights or (file.name in PARTS and inside)):
            taken.append(file)
        elif file.name not in NOT_NAMED:
            left.append(file.name)
    if left:
        logger.warning("not exported: %s", ", ".join(left))
    return taken


def _auto_map(source: Path, model_type: object) -> dict[str, str]:
    """Which class transformers finds where."""
    for model in PUBLIC:
        if configuration(model).model_type == model_type:
            parts = {
                "AutoConfig": configuration(model),
                "AutoModel": model.model_class,
                "AutoModelForCausalLM": model,
            }
            return {auto: f"{MODELS}.{kind.__name__}" for auto, kind in parts.items()}
    raise UserError(
        f"{source / CONFIG}: model_type ({model_type}) has no class in {MODEL / MODELS}.py: export "
        "a checkpoint of one that has"
    )


def flat_code(module: str) -> Iterator[tuple[str, str]]:
    """A module (dotted, below the model's folder) and all that it imports there, as of one folder.

    Yields names without dots, and the text with the imports rewritten.
    """
    waiting, done = [module], set()
    while waiting:
        name = waiting.pop()
        if name in done:
            continue
        done.add(name)
        file = MODEL.joinpath(*name.split(".")).with_suffix(".py")
        package = name if not file.exists() else name.rpartition(".")[0]
        text = (file if file.exists() else file.with_suffix("") / "__init__.py").read_text()
        lines = text.splitlines(keepends=True)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.module, f"{name} line {node.lineno}: import from a module by its name"
                base = package.split(".") if package else []
                target = ".".join([*base[: len(base) - node.level + 1], node.module])
                waiting.append(target)
                own = re.escape("." * node.level + node.module)
                new = f"from .{target.replace('.', '_')} import"
                line = node.lineno - 1
                lines[line] = re.sub(rf"from {own} import", new, lines[line], count=1)
        yield name.replace(".", "_"), "".join(lines)


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
