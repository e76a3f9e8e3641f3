"""The models that are compared: checkpoints of ours, and any causal language model of transformers.

The latter may be a folder or a name on the Hub, which is looked for in the local cache first. No
code of a model's own is run unless that is asked for, and weights are safetensors.
"""

import importlib
import importlib.util
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from retnet.checkpoints import Checkpoint, check_weights_unchanged, find_checkpoint, load_checkpoint
from retnet.checkpoints.adapter import find_base, merge_adapter
from retnet.checkpoints.configuration import CORRECT, check_values
from retnet.checkpoints.format import ADAPTER, CONFIG, COPY_AGAIN, TOKENIZER, is_adapter
from retnet.checkpoints.load import quiet_transformers
from retnet.checkpoints.weights import stored_shapes, weight_files
from retnet.cli import shortened
from retnet.data.network import hub_revision, reason_of, while_reachable
from retnet.data.tokenizer import panics_as_errors
from retnet.data.tokenizer_files import check_tokenizer_files
from retnet.errors import UserError, is_out_of_memory
from retnet.evaluation.foreign import MOST_OF_A_REASON, ForeignModel
from retnet.evaluation.tokens import plain_ids, use_eos_for_bos
from retnet.files import read_json
from retnet.model.mixers import MIXERS
from retnet.model.models import configuration, model_class
from retnet.paths import expand, kind_of

REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
WANTED = ["*.json", "model.safetensors", "model-*.safetensors", "*.txt", "*.model", "*.tiktoken"]
CODE = "*.py"
FLA = "fla"  # the package of flash-linear-attention
CACHED = "models--"  # how the Hub's client names a model's folder: models--openai-community--gpt2
# Files of tokenizers: without any, transformers makes an empty one.
TOKENIZER_FILES = ("*token*", "*vocab*", "*.model", "merges.txt")


def load_contenders(
    names: Sequence[str], *, base: str | Path | None = None, **options: Any
) -> list[Checkpoint]:
    """``load_contender`` of each, with the options of ``load_checkpoint``.

    ``base`` is for all that are adapters; a ``UserError`` where none is.
    """
    adapters = [is_adapter(expand(name, "checkpoint")) for name in names]
    if base is not None and not any(adapters):
        raise UserError(
            f"--base ({base}) has no effect, none of {', '.join(names)} is an adapter: leave it out"
        )
    each = zip(names, adapters, strict=True)
    return [load_contender(name, base=base if own else None, **options) for name, own in each]


def load_contender(
    name: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    base: str | Path | None = None,
    weights: str = "auto",
) -> Checkpoint:
    """A checkpoint or run of ours, or a causal language model by its folder or name on the Hub.

    For the arguments see ``load_checkpoint``. The model of a ``Checkpoint`` that is not of this
    package is a ``ForeignModel``, its tokenizer perhaps a slow one.

    Raises:
        UserError: There is none, something of it is missing or does not fit, it would run code that
            was not asked for, or it is no causal language model.
    """
    named = find_contender(name, trust_remote_code=trust_remote_code)
    folder, why = find_base(named, base)
    options: dict[str, Any] = {"device": device, "dtype": dtype, "base": base, "weights": weights}
    options["trust_remote_code"] = trust_remote_code
    stored = read_json(folder / CONFIG, COPY_AGAIN)
    if stored.get("model_type") in {configuration(model_class(x)).model_type for x in MIXERS}:
        return load_checkpoint(named, **options)
    if weights != "auto":
        raise UserError(
            f"--weights ({weights}) is for models of this package, and checkpoint ({folder}) is "
            f"none (model_type {stored.get('model_type')}): quantise yours once with python -m "
            "retnet.checkpoints.quantize and name that folder"
        )
    with quiet_transformers():
        inner = _load_model(folder, stored, dtype, trust_remote_code)
        if hasattr(inner, "new_cache"):  # the code of one of ours, changed and under another name
            del inner
            return load_checkpoint(named, **options)
        if folder != named:
            merge_adapter(inner, named, folder, why)
        own = named if _has_tokenizer(named) else folder
        tokenizer = _load_tokenizer(own, inner.config, trust_remote_code)
    try:
        model: Any = ForeignModel(inner.to(torch.device(device)).eval())
    except UserError as error:
        raise UserError(f"checkpoint ({folder}): {error}: name another model") from error
    found = folder if folder != named else None
    return Checkpoint(named, model.eval(), tokenizer, None, found)  # type: ignore[arg-type]


def find_contender(name: str | Path, *, trust_remote_code: bool = False) -> Path:
    """The folder of a checkpoint: on this machine, in the Hub's local cache, or fetched from there.

    It may be that of an adapter alone. A name is one of the Hub's only where nothing is at that
    path, nor at the folder above it. A ``UserError`` where there is none, or the Hub does not
    answer within seconds.
    """
    try:
        return find_checkpoint(name, adapters=True)
    except UserError as error:
        if isinstance(name, Path) or not REPOSITORY.fullmatch(name):
            raise
        path = expand(name, "checkpoint")
        if kind_of(path, "checkpoint") or ("/" in name and kind_of(path.parent, "checkpoint")):
            raise
        missing = error
    patterns = [*WANTED, CODE] if trust_remote_code else WANTED
    cached = _cached(name, patterns)
    if cached is not None:
        return cached
    what = f"checkpoint ({name})"
    try:
        commit = hub_revision(name, "model", what)
        return Path(while_reachable(lambda: _snapshot(name, patterns, commit), name, "model", what))
    except UserError as error:
        raise type(error)(f"{error}; {missing}") from error
    except Exception as error:  # whatever the client meets on the way
        raise UserError(
            f"{what} cannot be loaded from the Hub ({reason_of(error)}): start again, or name "
            "another one"
        ) from error


def hub_name(folder: Path) -> str | None:
    """The name on the Hub of a folder in its local cache; None of any other."""
    repository, snapshots = folder.parent.parent.name, folder.parent.name
    if snapshots != "snapshots" or not repository.startswith(CACHED):
        return None
    return repository.removeprefix(CACHED).replace("--", "/", 1)


def _snapshot(name: str, patterns: list[str], commit: str | None) -> str:
    here = commit is None
    return huggingface_hub.snapshot_download(
        name, revision=commit, allow_patterns=patterns, local_files_only=here
    )


def _cached(name: str, patterns: list[str]) -> Path | None:
    """The folder in the Hub's local cache; None where that lacks something."""
    try:
        folder = Path(_snapshot(name, patterns, None))
        weight_files(folder)
        stored = read_json(folder / CONFIG, COPY_AGAIN)
    except Exception:  # it is not there, or not all of it
        return None
    lacks_code = CODE in patterns and "auto_map" in stored and not any(folder.glob(CODE))
    return None if lacks_code else folder


def _load_model(
    folder: Path, stored: dict[str, Any], dtype: torch.dtype | None, trust_remote_code: bool
) -> Any:
    """A model with all its weights, on the CPU."""
    file = folder / CONFIG
    check_values(file, stored)
    check_weights_unchanged(folder)
    if (folder / ADAPTER).is_file():
        raise UserError(
            f"checkpoint ({folder}) has an adapter ({ADAPTER}) beside its weights: merge it into "
            "them with peft's merge_and_unload, or remove it"
        )
    if "auto_map" not in stored:
        _check_known(file, stored.get("model_type"))
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    with _one_line(file, CORRECT):
        config = AutoConfig.from_pretrained(folder, **options)
    if config.is_encoder_decoder:
        raise UserError(
            f"{file}: model_type ({config.model_type}) is of encoder and decoder, which give no "
            "likelihood of a text by itself: name a causal language model"
        )
    if "auto_map" not in stored or not trust_remote_code:
        _check_size(folder, config)
    with _one_line(file, "name a causal language model, or copy the checkpoint again"):
        load: Any = AutoModelForCausalLM.from_pretrained
        model, found = load(
            folder, config=config, use_safetensors=True, dtype=dtype or "auto",
            output_loading_info=True, **options,
        )  # fmt: skip
    missing = sorted(found["missing_keys"])
    if missing:
        lacks = f"{missing[0]} is missing from the weights ({len(missing)} such)"
        saved = config.architectures or [type(model).__name__]
        if type(model).__name__ not in saved:  # of its encoder alone, or with another head
            raise UserError(
                f"checkpoint ({folder}) is of a {saved[0]}, not of a {type(model).__name__}, "
                f"{lacks}: name a causal language model"
            )
        raise UserError(f"checkpoint ({folder}) is incomplete, {lacks}: copy it again")
    return model


def _check_known(file: Path, model_type: Any) -> None:
    """Raise a ``UserError`` where transformers has no such architecture.

    flash-linear-attention adds its own to those of transformers when it is imported.
    """
    package = importlib.util.find_spec(FLA)
    if model_type not in CONFIG_MAPPING and package is not None:
        with _one_line(file, f"repair the package {FLA}, or name another checkpoint"):
            importlib.import_module(FLA)
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise UserError(
            f"{file}: model_type ({shortened(model_type)}) is none that is known here: install "
            "flash-linear-attention if it is one of its models, or name another checkpoint"
        )


def _check_size(folder: Path, config: Any) -> None:
    """Find out before memory is taken whether the weights are far too few for a configuration."""
    file = folder / CONFIG
    with _one_line(file, COPY_AGAIN):
        number = len(stored_shapes(folder))
        stored = sum((folder / name).stat().st_size for name in weight_files(folder))
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    parameters = 0
    if layers <= number:
        with _one_line(file, "name a causal language model"), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        parameters = sum(x.numel() for x in model.parameters())
    if layers > number or parameters > stored:
        described = f"{parameters:,} parameters" if layers <= number else f"{layers:,} layers"
        raise UserError(
            f"checkpoint ({folder}) is incomplete, its weights have {stored:,} bytes in {number:,} "
            f"tensors and {CONFIG} describes a model of {described}: copy it again"
        )


@contextmanager
def _one_line(file: Path, fix: str) -> Iterator[None]:
    """What a library raises as a ``UserError`` of one line, which says how to go on."""
    try:
        with panics_as_errors():
            yield
    except UserError:
        raise
    except Exception as error:  # each wrong value fails in a way of its own
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:  # transformers' words for a class it does not have
            reason = "it needs code from the checkpoint's own folder"
            fix = "read that code, then add --trust-remote-code"
        shown = reason if len(reason) <= MOST_OF_A_REASON else f"{reason[:MOST_OF_A_REASON]} ..."
        raise UserError(f"{file}: {shown}: {fix}") from error


def _has_tokenizer(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES)


def _load_tokenizer(folder: Path, config: Any, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    if not _has_tokenizer(folder):
        raise UserError(
            f"checkpoint ({folder}) has no tokenizer, which a text is read with: copy its files "
            "there (tokenizer.json, tokenizer_config.json)"
        )
    fix = "copy its tokenizer files again"
    check_tokenizer_files(folder, fix)
    with _one_line(folder / TOKENIZER, fix):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, config=config, local_files_only=True, trust_remote_code=trust_remote_code
        )
    if all(token == tokenizer.unk_token_id for token in plain_ids(tokenizer, "a")):
        raise UserError(f"{folder}: its tokenizer does not know the letter a: {fix}")
    use_eos_for_bos(tokenizer)
    return tokenizer
