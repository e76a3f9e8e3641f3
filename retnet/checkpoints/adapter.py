"""Adapters of PEFT: a folder with what fine-tuning added, to be merged into the model it is for.

    adapter_config.json          the kind of adapter, the layers it is for, its base's name or path
    adapter_model.safetensors    its weights

Merged, it is a model of the base's own layers, so that everything for one works: the fast step for
single tokens, saving. Nothing is downloaded, unpickled or imported for what an adapter says.
"""

import importlib
import logging
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from retnet.checkpoints.find import find_checkpoint
from retnet.checkpoints.format import ADAPTER, COPY_AGAIN, is_adapter
from retnet.checkpoints.match import check_finite, check_same_model
from retnet.checkpoints.weights import read_file
from retnet.cli import shortened
from retnet.errors import UserError, is_out_of_memory
from retnet.files import read_json
from retnet.model.ops.precision import wide_dtype
from retnet.paths import kind_of

logger = logging.getLogger(__name__)

PEFT = "peft>=0.21,<1"  # as requirements-dev.txt has it: an optional package
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Kinds that become part of the base's weights without loss; others are inputs, or layers beside.
MERGED = ("LORA", "ADALORA", "LOHA", "LOKR", "IA3", "OFT", "HRA", "VERA", "FOURIERFT",
          "LN_TUNING", "TRAINABLE_TOKENS")  # fmt: skip
NAME_BASE = "name the model that it was trained on by --base CHECKPOINT"


def import_peft(what: str) -> Any:
    """The package peft; a ``UserError`` where it is missing, which says that ``what`` needs it."""
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise UserError(f'{what} needs the package peft ({error}): pip install "{PEFT}"') from error


def find_base(folder: Path, named: str | Path | None) -> tuple[Path, str]:
    """Where the model of a checkpoint lies: there itself, or of an adapter its base; and why.

    The base is the one ``named``, else the local folder in the adapter's configuration: a path from
    the working directory, else from the adapter's folder.

    Raises:
        UserError: There is none, it is an adapter itself, or one is named and not needed.
    """
    if not is_adapter(folder):
        if named is not None:
            raise UserError(
                f"--base ({named}) has no effect, checkpoint ({folder}) has weights of its own: "
                "leave it out"
            )
        return folder, "it is no adapter"
    if named is not None:
        try:
            return find_checkpoint(named), "named by --base"
        except UserError as error:
            raise UserError(f"--base: {error}") from error
    key = "base_model_name_or_path"
    name = read_json(folder / ADAPTER, COPY_AGAIN).get(key)
    if not isinstance(name, str) or not name:
        raise UserError(f"adapter ({folder}) does not say what it is for: {NAME_BASE}")
    places = {
        Path(name): ", from the working directory",
        folder / name: ", from its own folder",
    }
    for place, where in places.items():
        if kind_of(place, f"{key} of {folder / ADAPTER}") == "folder":
            whole = Path(name).is_absolute()
            return find_checkpoint(place), f"its {key}{'' if whole else where}"
    raise UserError(
        f"adapter ({folder}) is for a base ({name}) that is no folder here, and nothing is "
        f"downloaded: {NAME_BASE}"
    )


def merge_adapter(model: PreTrainedModel, adapter: Path, base: Path, why: str) -> None:
    """Add an adapter to the weights of its base, which stay of their dtype and trainable.

    Args:
        model: The base, on the CPU; it is changed.
        adapter: Its folder.
        base, why: As of ``find_base``, for messages.

    Raises:
        UserError: The package peft is missing; the adapter is of a kind that is not merged, pickled
            or damaged; or it is of another model than this.
    """
    peft = import_peft(f"adapter ({adapter})")
    file, stored = adapter / ADAPTER, _weights(adapter)
    types = {name: p.dtype for name, p in model.named_parameters(remove_duplicate=False)}
    wide = wide_dtype(model.dtype)
    stored = {name: x.to(wide) if x.is_floating_point() else x for name, x in stored.items()}
    try:
        with warnings.catch_warnings(action="ignore"):  # of renamed bases and tied weights
            config = _configuration(peft, file, sum(x.numel() for x in stored.values()))
            # without memory, unless they begin with something that is taken out of the base
            empty = not isinstance(getattr(config, "init_lora_weights", True), str)
            wrapped = peft.get_peft_model(model, config, low_cpu_mem_usage=empty)
            own = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
            if stored.keys() - own.keys():  # the base's embedding may be saved with them
                more = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=True)
                own |= {name: more[name] for name in stored.keys() & more.keys()}
            what = f"adapter ({adapter}), for base ({base}),"
            check_same_model(own, stored, what, NAME_BASE)
            peft.set_peft_model_state_dict(wrapped, stored, low_cpu_mem_usage=empty)
            wrapped.merge_and_unload()
    except UserError:
        raise
    except Exception as error:  # each wrong value fails in a way of its own
        if is_out_of_memory(error):
            raise
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise UserError(f"{file}, for base ({base}): {kind}{error}: {NAME_BASE}") from error
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.data = parameter.data.to(types[name])
        parameter.requires_grad_(True)
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if outputs is not None and inputs.weight is not outputs.weight:  # it was of one of them
        model.config.tie_word_embeddings = False
    logger.info(f"adapter {adapter}: merged into {base} ({why})")


def _configuration(peft: Any, file: Path, numbers: int) -> Any:
    """An adapter's configuration, of a kind that is merged, as data alone.

    ``numbers`` in its weights: more than these no rank can have, for which memory is taken.
    """
    content = read_json(file, COPY_AGAIN)
    kind = content.get("peft_type")
    if kind not in MERGED:
        raise UserError(
            f"{file}: peft_type ({shortened(kind)}) is none that becomes part of the base's "
            f"weights ({', '.join(MERGED)}): use it with peft itself"
        )
    if content.get("megatron_config") is not None:
        raise UserError(f"{file}: megatron_config needs code from elsewhere: remove it")
    pattern = content.get("rank_pattern")
    ranks = [content.get("r"), content.get("init_r")]
    ranks += pattern.values() if isinstance(pattern, dict) else []
    for rank in ranks:
        if isinstance(rank, int) and rank > numbers:
            raise UserError(
                f"{file}: a rank ({rank}) is beyond its {numbers:,} weights: {COPY_AGAIN}"
            )
    options = peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    known = {option.name for option in fields(options)}
    for key in sorted(content.keys() - known):
        if content[key]:  # what is off may be missing
            raise UserError(
                f"{file}: {shortened(key)} ({shortened(content[key])}) is no option of "
                f"{options.__name__} in peft {peft.__version__}: install the version that wrote it "
                f"({content.get('peft_version', 'not told')})"
            )
    return options(**{key: value for key, value in content.items() if key in known})


def _weights(adapter: Path) -> dict[str, Tensor]:
    file = adapter / ADAPTER_WEIGHTS
    if kind_of(file, "adapter") != "file":
        pickled = next((found.name for found in sorted(adapter.glob("*.bin"))), None)
        if pickled:
            raise UserError(
                f"adapter ({adapter}) has pickled weights ({pickled}), which can run code: save "
                f"them as {ADAPTER_WEIGHTS}"
            )
        raise UserError(f"adapter ({adapter}) is incomplete, {file.name} is missing: copy it again")
    try:
        stored = read_file(file)
    except SafetensorError as error:
        raise UserError(f"adapter ({adapter}) is damaged ({error}): copy it again") from error
    check_finite(stored, f"adapter ({adapter})")
    return stored
