"""What a checkpoint is: whose format, how large, and how it is read here.

Nothing is computed and nothing loaded beyond the heads of weight files, but for PyTorch's own
files, whose names are pickled.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from tokenizers import Tokenizer

from retnet.checkpoints.configuration import read_config
from retnet.checkpoints.convert.recognise import Format, by_names, recognise
from retnet.checkpoints.convert.sources import PICKLES, read_tensors
from retnet.checkpoints.find import find_checkpoint
from retnet.checkpoints.format import CONFIG, TOKENIZER, TRAINING_STATE, is_adapter, read_progress
from retnet.checkpoints.load import check_loads
from retnet.checkpoints.quantised import stored_format
from retnet.checkpoints.verify import check_weights_unchanged
from retnet.checkpoints.weights import file_heads
from retnet.data.tokenizer import panics_as_errors
from retnet.data.tokenizer_files import check_tokenizer_files
from retnet.errors import UserError
from retnet.files import read_json
from retnet.model.configuration import QUANTISED
from retnet.paths import kind_of

ADAPTS = "with its base model: generate.py and compare.py take it (--base)"
Heads = Mapping[str, tuple[tuple[int, ...], str]]
TYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def inspect(path: Path, convertible: Callable[[str, Path], Any]) -> Iterator[str]:
    """Lines, a name and what it is.

    Args:
        path: A checkpoint or run folder, ours or another's, or a file of weights.
        convertible: Our configuration of a source that a command's converter takes; it raises a
            ``UserError`` where that does not.

    Raises:
        UserError: Nothing is there.
    """
    place = _place(path)
    stored = _configuration(place)
    heads, files, damage = _weights(place)
    found = by_names(heads) or (recognise(place, stored) if place.is_dir() else None)
    own = found is None and str(stored.get("model_type", "")).endswith("_lm")
    yield f"checkpoint   {place}"
    if adapts := place.is_dir() and is_adapter(place):
        yield "format       an adapter of PEFT"
    else:
        kind = "this package's" if own else "not known" if found is None else found.name
        yield f"format       {kind} (model_type {stored.get('model_type', 'not told')})"
    if heads:
        types = Counter(TYPES.get(name, name) for _, name in heads.values())
        size = sum(file.stat().st_size for file in files)
        named = f"{len(files)} file{'s' * (len(files) > 1)}"
        yield f"weights      {size:,} bytes in {named}, {', '.join(types)}"
        parameters = sum(prod(shape) for shape, _ in heads.values())
        if stored.get(QUANTISED) is not None:
            yield f"quantised    {_quantised(place, stored)}"
        else:
            yield f"parameters   {parameters:,}, as stored in {len(heads):,} tensors"
    config, verdict = (None, ADAPTS) if adapts else _verdict(place, own, found, convertible)
    if config is not None:
        yield f"model        {_model(config)}"
    if place.is_dir():
        yield f"tokenizer    {_tokenizer(place)}"
        yield f"step         {_step(place)}"
    yield f"read here    {damage or verdict}"


def _place(path: Path) -> Path:
    kind = kind_of(path, "checkpoint")
    if kind == "file" and path.suffix in (*PICKLES, ".safetensors"):
        return path
    try:
        return find_checkpoint(path)
    except UserError:
        if kind == "folder" and any(_weight_files(path)):
            return path
        raise


def _weight_files(folder: Path) -> list[Path]:
    found = [file for file in sorted(folder.iterdir()) if file.is_file()]
    safe = [file for file in found if file.suffix == ".safetensors"]
    ours = [file for file in safe if file.name.startswith("model")]  # beside an optimizer's
    return ours or safe or [file for file in found if file.suffix in PICKLES]


def _configuration(place: Path) -> dict[str, Any]:
    file = place / CONFIG
    try:
        return read_json(file, "copy it again") if file.is_file() else {}
    except UserError:
        return {}


def _weights(place: Path) -> tuple[Heads, list[Path], str]:
    """Heads of all weights that can be read, their files, and what is wrong with one."""
    files = _weight_files(place) if place.is_dir() else [place]
    heads: dict[str, tuple[tuple[int, ...], str]] = {}
    damage = ""
    for file in files:
        try:
            if file.suffix == ".safetensors":
                heads |= file_heads(file)
            else:
                tensors = read_tensors(file)
                names = {name: str(x.dtype).removeprefix("torch.") for name, x in tensors.items()}
                heads |= {name: (tuple(tensors[name].shape), names[name]) for name in names}
        except SafetensorError as error:  # names the file
            damage = f"no: {error}"
        except UserError as error:
            damage = f"no: {file.name}: {error}"
    return heads, files, damage


def _model(config: Any) -> str:
    return (
        f"{config.mixer_class.name}, {config.num_hidden_layers} layers of width "
        f"{config.hidden_size}, {config.num_heads} heads, vocabulary {config.vocab_size:,}"
    )


def _quantised(place: Path, stored: dict[str, Any]) -> str:
    try:
        return f"{stored_format(place / CONFIG, stored)} weights, to generate and to compare"
    except UserError:
        return "in a format that is not read here"


def _tokenizer(folder: Path) -> str:
    if not (folder / TOKENIZER).is_file():
        return f"none ({TOKENIZER} is missing)"
    try:
        check_tokenizer_files(folder, "copy them again")
        with panics_as_errors():
            return f"{Tokenizer.from_file(str(folder / TOKENIZER)).get_vocab_size():,} entries"
    except Exception as error:  # each damaged file fails in a way of its own
        return f"cannot be read ({' '.join(str(error).split())[:200]})"


def _step(folder: Path) -> str:
    if not (folder / TRAINING_STATE).is_file():
        return "not told"
    try:
        progress = read_progress(folder)
    except UserError as error:
        return str(error)
    best = progress.best_loss
    return f"{progress.step:,}" + ("" if best is None else f", best validation loss {best:.4f}")


def _verdict(
    place: Path, own: bool, found: Format | None, convertible: Callable[[str, Path], Any]
) -> tuple[Any, str]:
    """Its configuration in our terms; and whether it can be read, by which converter, or why not.

    The configuration is None where it can't be told.
    """
    config = None
    try:
        if found is not None:
            config = None if found.converter is None else convertible(found.converter, place)
            return config, f"no: {found.advice(place)}"
        if not own and place.is_file():
            return None, "no: the names of its weights are those of no model known here"
        config = read_config(place, trust_remote_code=False)
        check_weights_unchanged(place)
        check_loads(place, config)
        return config, "yes" if (place / TOKENIZER).is_file() else "yes, once it has a tokenizer"
    except UserError as error:
        return config, f"no: {error}"
