"""One token through a checkpoint's model as a program of its own, for phones and browsers.

    python -m retnet.checkpoints.export_step CHECKPOINT FILE

FILE is step.onnx for ONNX (it needs the packages onnx and onnxscript), or step.pt2 for
torch.export; either runs where this package is not. A token and the states go in, the logits and
the next states come out. What is in the file besides says how they are named and shaped, what the
states are at first, and which tokens begin and end a text. A state has one size whatever the
length, so models whose memory grows (attention without a window) can't be had.
"""

import argparse
import importlib.util
import io
import json
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retnet.checkpoints.load import Checkpoint, load_checkpoint
from retnet.cli import ArgumentParser, file_path, positive_int, run
from retnet.errors import UserError, os_errors
from retnet.files import try_to_write, write_bytes
from retnet.model.cache import PARTS
from retnet.model.causal_lm import DecoderForCausalLM
from retnet.model.documents import NEXT_POSITION
from retnet.model.quantised import quantised_format
from retnet.paths import kind_of
from retnet.terminal import write_out

logger = logging.getLogger("retnet.checkpoints.export_step")  # __name__ is __main__ in a command

ENDINGS = {"onnx": ".onnx", "torch": ".pt2"}
NEEDED = ("onnx", "onnxscript")  # to write ONNX
ABOUT = "retnet_step"  # the key in ONNX's metadata; with .json the extra file in a .pt2
NEXT = "next."  # before the name of a state in ONNX, where inputs and outputs share none
POSITION = "position"
MOST_IN_ONNX = 2**31 - 2**24  # bytes of weights: a file of it is below 2 GiB
States = dict[str, Tensor]


class OneToken(nn.Module):
    """A model's own pass over one token of each row, its memory handed in and out."""

    def __init__(self, model: DecoderForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, token: Tensor, states: States) -> tuple[Tensor, States]:
        """token int64 [rows]; logits [rows, vocab] and the states after it, none changed in place.

        states: by the names of ``DecoderCache.tensors``, and the ``position`` int64 [rows].
        """
        cache, position = self.model.new_cache(), states[POSITION]
        cache.rows["record"] = torch.stack((position, position, torch.zeros_like(position)), dim=1)
        cache.length = 1  # above 0: there are states, which hold what is so before a first token
        for name, x in states.items():
            if name != POSITION:
                cache.put(name, x.clone())  # the model may write into what it is given
        logits = self.model(token[:, None], past_key_values=cache, logits_to_keep=1).logits
        after = cache.tensors()
        after[POSITION] = after.pop("record")[:, NEXT_POSITION].clone()
        return logits[:, 0], {name: after[name] for name in states}


def first_states(model: DecoderForCausalLM, rows: int) -> States:
    """The states before the first token."""
    states = {POSITION: torch.zeros(rows, dtype=torch.int64, device=model.device)}
    for index, layer in enumerate(model.model.layers):
        for part in PARTS:
            own = getattr(layer, part).init_state(rows, model.device, model.dtype)
            states |= {f"layers.{index}.{part}.{name}": x for name, x in own.items()}
    return states


def describe_step(checkpoint: Checkpoint, states: States) -> dict[str, Any]:
    """What a program without this package must know, as JSON can have it."""
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    ends = model.generation_config.eos_token_id  # a chat's may end with more than <eos>
    ends = {ends} if isinstance(ends, int) else {*(ends or ())}
    about = []
    for name, x in states.items():
        initial = x.flatten()[0].item()
        assert bool((x == initial).all()), f"{name} has no one initial value"
        kind = str(x.dtype).removeprefix("torch.")
        about.append({"name": name, "shape": [*x.shape], "dtype": kind, "initial": initial})
    return {
        "model_type": model.config.model_type,
        "rows": len(states[POSITION]),
        "vocab_size": model.config.vocab_size,
        "longest": model.config.longest,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_ids": sorted({*ends, tokenizer.eos_token_id} - {None}),
        "states": about,
    }


def export_step(
    path: str | Path, file: Path, *, kind: str | None = None, rows: int = 1
) -> dict[str, Any]:
    """Write the step of a checkpoint, in float32, and return what is said of it in the file.

    kind: a key of ``ENDINGS``; that of the file's ending when None.

    Raises:
        UserError: The checkpoint, its kind of memory or weights, the file or a package is not what
            it takes; nothing is written.
    """
    kind = kind or next((one for one, ending in ENDINGS.items() if file.suffix == ending), None)
    if kind is None:
        endings = " nor ".join(ENDINGS.values())
        raise UserError(f"FILE ({file}) ends with neither {endings}: name one, or add --format")
    missing = [name for name in NEEDED if kind == "onnx" and importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--format ({kind}) needs {' and '.join(NEEDED)}, and there is no "
            f"{' and no '.join(missing)}: pip install {' '.join(missing)}, or take a .pt2 file"
        )
    found = kind_of(file, "FILE")
    if found is not None:
        fix = "name a file in it" if found == "folder" else "name one that does not, or remove it"
        raise UserError(f"FILE ({file}) exists{' as a folder' * (found == 'folder')}: {fix}")
    with os_errors(f"FILE ({file}) cannot be written", "name another one, or free space there"):
        try_to_write(file)
    checkpoint = load_checkpoint(path, dtype=torch.float32)
    model = checkpoint.model.requires_grad_(False)
    _check(checkpoint, kind)
    for weight in model.parameters():  # loading laid some side by side, of which a .pt2 would
        weight.data = weight.data.clone()  # take each for a part of a tensor that is missing
    states = first_states(model, rows)
    about = describe_step(checkpoint, states)
    logger.info("following one token through the model: some seconds, of many layers minutes")
    with torch.no_grad():
        example = (torch.zeros(rows, dtype=torch.int64), states)
        program = torch.export.export(OneToken(model), example, strict=False)
    content = _as_onnx(program, about) if kind == "onnx" else _as_pt2(program, about)
    with os_errors(f"FILE ({file}) cannot be written", "name another one, or free space there"):
        write_bytes(file, content)
    return about


def _check(checkpoint: Checkpoint, kind: str) -> None:
    """Raise a ``UserError`` for a model that can't be exported."""
    what, model = f"checkpoint ({checkpoint.path})", checkpoint.model
    growing = sorted({name for layer in model.new_cache().layers for name in layer.growing})
    if growing:
        raise UserError(
            f"{what} has a memory that grows with the text ({', '.join(growing)}), and a step takes"
            " states of one size: export a model without attention, or one with attention_window"
        )
    if weights := quantised_format(model):
        raise UserError(
            f"{what} has quantised weights ({weights}): export the checkpoint that it was made of"
        )
    size = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    if kind == "onnx" and size > MOST_IN_ONNX:
        raise UserError(
            f"{what} has {size:,} bytes of float32 weights, and a file of ONNX holds 2 GiB: take a "
            ".pt2 file (--format torch)"
        )


def _as_pt2(program: Any, about: dict[str, Any]) -> bytes:
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={f"{ABOUT}.json": json.dumps(about)})
    return content.getvalue()


def _as_onnx(program: Any, about: dict[str, Any]) -> bytes:
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)  # it says which packages it does not have
    names = [state["name"] for state in about["states"]]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch about itself
            made: Any = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                input_names=["token", *names],
                output_names=["logits", *(NEXT + name for name in names)],
            )
    finally:
        exporter.setLevel(level)
    model = made.model_proto
    model.metadata_props.add(key=ABOUT, value=json.dumps(about))
    content: bytes = model.SerializeToString()
    return content


def main(argv: Sequence[str]) -> None:
    """Parse and export."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser(
        prog="python -m retnet.checkpoints.export_step", description=__doc__, formatter_class=raw
    )
    add = parser.add_argument
    add("checkpoint", help="a checkpoint folder, or a run folder (its final, best or newest)")
    add("file", metavar="FILE", type=file_path, help="to write; must not be there yet")
    add("--format", choices=ENDINGS, help="of the file (by its ending, .onnx or .pt2)")
    add("--rows", type=positive_int, default=1, help="texts made side by side (1)")
    arguments = parser.parse_args(argv)
    file = arguments.file
    about = export_step(arguments.checkpoint, file, kind=arguments.format, rows=arguments.rows)
    size = sum(_bytes(state) for state in about["states"])
    write_out(
        f"{file}: {file.stat().st_size:,} bytes, one token in {len(about['states'])} states of "
        f"{size:,} bytes"
    )


def _bytes(state: dict[str, Any]) -> int:
    empty = torch.empty(state["shape"], dtype=getattr(torch, state["dtype"]), device="meta")
    return empty.nbytes


if __name__ == "__main__":
    sys.exit(run(main))
