"""Loading a checkpoint: local files and safetensors only."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from retnet.checkpoints.find import find_checkpoint
from retnet.checkpoints.format import CONFIG, COPY_AGAIN, DATA_RECORD, TOKENIZER, WEIGHTS
from retnet.checkpoints.verify import check_weights_unchanged
from retnet.checkpoints.weights import check_size
from retnet.data.tokenizer import max_token_id
from retnet.errors import UserError, is_out_of_memory
from retnet.files import read_json
from retnet.model.decoder import DecoderForCausalLM
from retnet.model.fast_decode.weights import lay_out_for_decoding
from retnet.model.mixers import MIXERS
from retnet.model.models import configuration, model_class

FLA_MODEL_TYPE = "retnet"  # flash-linear-attention's


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint."""

    path: Path  # of its folder
    model: DecoderForCausalLM  # in evaluation mode
    tokenizer: PreTrainedTokenizerFast  # has a <bos> and no id beyond the model's vocabulary
    data_record: dict[str, Any] | None  # how its data was made; None if the folder lacks it

    @property
    def mixer(self) -> str:
        """The name of its mixer."""
        return str(self.model.config.mixer_class.name)


def load_checkpoint(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> Checkpoint:
    """Load a checkpoint without a network; its own code runs with ``trust_remote_code`` only.

    The weights keep the dtype they were saved in when ``dtype`` is None. A ``UserError`` where
    there is no such checkpoint, or something in it is missing or does not fit.
    """
    folder = find_checkpoint(path)
    _check_config(folder, trust_remote_code)
    check_weights_unchanged(folder)
    local = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    model = _load_model(folder, dtype, local)
    model.to(torch.device(device))  # type: ignore[arg-type]
    lay_out_for_decoding(model)
    tokenizer = _load_tokenizer(folder, model.config.vocab_size, local)
    record_file = folder / DATA_RECORD
    record = read_json(record_file, COPY_AGAIN) if record_file.is_file() else None
    return Checkpoint(folder, model.eval(), tokenizer, record)


def _check_config(folder: Path, trust_remote_code: bool) -> None:
    file = folder / CONFIG
    config = read_json(file, COPY_AGAIN)
    dtype = config.get("dtype", config.get("torch_dtype"))
    if dtype is not None and not isinstance(getattr(torch, str(dtype), None), torch.dtype):
        raise UserError(f"{file}: dtype ({dtype}) is none of torch's: {COPY_AGAIN}")
    weights = config.get("transformers_weights")
    if weights is not None:
        raise UserError(
            f"{file}: transformers_weights ({weights}) names a file of weights: remove it, they "
            f"are in {WEIGHTS}"
        )
    model_type = config.get("model_type")
    if model_type == FLA_MODEL_TYPE:
        raise UserError(
            f"{file}: model_type ({model_type}) is flash-linear-attention's format: it needs a "
            "converter to ours, its weights have other names"
        )
    known = [configuration(model_class(mixer)).model_type for mixer in MIXERS]
    if model_type in known:
        return
    if "auto_map" not in config:
        raise UserError(
            f"{file}: model_type ({model_type}) is none of {', '.join(known)}: name a checkpoint "
            "made by train.py"
        )
    if not trust_remote_code:
        raise UserError(
            f"{file}: model_type ({model_type}) needs code from the checkpoint's own folder: read "
            "that code, then add --trust-remote-code"
        )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bar, which loading takes no time for, and no table of what does not fit."""
    log = transformers_logging
    shown, verbosity = log.is_progress_bar_enabled(), log.get_verbosity()
    log.disable_progress_bar()
    log.set_verbosity_error()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if shown:
            log.enable_progress_bar()


def _load_model(
    folder: Path, dtype: torch.dtype | None, local: dict[str, bool]
) -> DecoderForCausalLM:
    try:
        with _quiet_transformers():
            config = AutoConfig.from_pretrained(folder, **local)
            check_size(folder, config)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype="auto" if dtype is None else dtype,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # reported below, with the parameter's name
                output_loading_info=True,
                **local,
            )
    except UserError:
        raise
    except SafetensorError as error:
        raise UserError(
            f"checkpoint ({folder}) has damaged weights ({error}): copy it again"
        ) from error
    except Exception as error:  # each wrong value of the configuration fails in a way of its own
        if is_out_of_memory(error):
            raise
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise UserError(
            f"{folder / CONFIG}: {kind}{error}: correct it, or copy the checkpoint again"
        ) from error
    model, info = loaded
    for names, problem in (
        (info["missing_keys"], "missing from the weights"),
        ([entry[0] for entry in info["mismatched_keys"]], f"of another shape than {CONFIG} says"),
        (info["unexpected_keys"], "in the weights but not in the model"),
    ):
        if names:
            raise UserError(
                f"checkpoint ({folder}) is incomplete, {min(names)} is {problem} "
                f"({len(names)} such): copy it again"
            )
    if not hasattr(model, "new_cache"):
        raise UserError(
            f"checkpoint ({folder}) holds a {type(model).__name__}, which has no new_cache(): "
            "use a model made from retnet.model"
        )
    return model


def _load_tokenizer(
    folder: Path, vocab_size: int, local: dict[str, bool]
) -> PreTrainedTokenizerFast:
    if not (folder / TOKENIZER).is_file():
        raise UserError(
            f"checkpoint ({folder}) has no tokenizer, {TOKENIZER} is missing: copy it there from "
            "the run's other checkpoints"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **local)
    except Exception as error:  # each damaged file fails in a way of its own
        if "trust_remote_code" in str(error):  # transformers' words for a class it does not have
            reason, fix = "needs code from its own folder", "read it, then add --trust-remote-code"
        else:
            reason, fix = f"{type(error).__name__}: {error}", "copy its tokenizer files again"
        raise UserError(
            f"checkpoint ({folder}) has a tokenizer that cannot be loaded ({reason}): {fix}"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"{folder / TOKENIZER}: {type(tokenizer).__name__} is not a fast tokenizer: use one "
            "that the tokenizers library can run"
        )
    largest = max_token_id(tokenizer)
    if largest >= vocab_size:
        raise UserError(
            f"{folder / TOKENIZER}: its largest id ({largest}) is beyond the model's vocab_size "
            f"({vocab_size}): use the tokenizer the model was trained with"
        )
    if tokenizer.bos_token_id is None:
        raise UserError(
            f"{folder / TOKENIZER}: it has no bos_token, with which every text begins: set "
            "bos_token in tokenizer_config.json"
        )
    return tokenizer
