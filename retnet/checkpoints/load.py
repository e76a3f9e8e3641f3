"""Loading a checkpoint: local files and safetensors only."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from retnet.checkpoints.adapter import find_base, merge_adapter
from retnet.checkpoints.configuration import CORRECT, read_config
from retnet.checkpoints.find import find_checkpoint
from retnet.checkpoints.format import CONFIG, COPY_AGAIN, DATA_RECORD, TOKENIZER
from retnet.checkpoints.quantised import (
    bits_of,
    change_format,
    check_stored,
    format_of,
    refuse_quantised,
    stored_names,
    target_format,
)
from retnet.checkpoints.verify import check_weights_unchanged
from retnet.checkpoints.weights import check_size, stored_shapes, stored_tensors
from retnet.data.tokenizer import max_token_id, panics_as_errors, tokenizer_hash
from retnet.data.tokenizer_files import check_tokenizer_files
from retnet.errors import UserError, is_out_of_memory
from retnet.files import read_json
from retnet.model.causal_lm import DecoderForCausalLM
from retnet.model.configuration import DecoderConfig
from retnet.model.fast_decode.weights import lay_out_for_decoding
from retnet.model.models import model_class
from retnet.model.ops.precision import wide_dtype
from retnet.model.quantised import replace_linears

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint."""

    path: Path  # of its folder; of an adapter that of the adapter
    model: DecoderForCausalLM  # in evaluation mode
    tokenizer: PreTrainedTokenizerFast  # has a <bos> and no id beyond the model's vocabulary
    data_record: dict[str, Any] | None  # how its data was made; None if the folder lacks it
    base: Path | None = None  # of an adapter the checkpoint that it was merged into

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
    base: str | Path | None = None,
    weights: str = "auto",
) -> Checkpoint:
    """Load a checkpoint without a network; its own code runs with ``trust_remote_code`` only.

    The weights keep the dtype they were saved in when ``dtype`` is None. ``weights`` says how the
    matrices are stored: as saved ("auto"), plainly ("fp32"), or in a format of ``model.quantised``
    ("bf16", "int8", "int4"), whose model computes in float32. An adapter beside the weights is not
    applied; a folder with an adapter alone is merged into the checkpoint ``base``, else into
    the one that it names itself. Its tokenizer and data record are its own where it has them.

    Raises:
        UserError: There is no such checkpoint, or something in it is missing or does not fit.
    """
    named = find_checkpoint(path, adapters=True)
    folder, why = find_base(named, base)
    with quiet_transformers():
        config = read_config(folder, trust_remote_code=trust_remote_code)
        check_weights_unchanged(folder)
        stored = format_of(folder)
        target = target_format(folder, stored, weights, dtype)
        if target or stored or weights == "fp32":
            dtype = torch.float32
        if folder != named:
            refuse_quantised(folder, f"base ({folder})", "into which no adapter can be merged")
        model = _load_model(folder, config, dtype, stored)
        if folder != named:
            merge_adapter(model, named, folder, why)
        if target != stored:
            change_format(folder, model, target)
        model.to(torch.device(device))  # type: ignore[arg-type]
        lay_out_for_decoding(model)
        own = named if (named / TOKENIZER).is_file() else folder
        tokenizer = _load_tokenizer(own, model.config, trust_remote_code)
    files = [file for file in (named / DATA_RECORD, folder / DATA_RECORD) if file.is_file()]
    record = read_json(files[0], COPY_AGAIN) if files else None
    if (record or {}).get("tokenizer_sha256") not in (None, tokenizer_hash(tokenizer)):
        logger.warning(
            f"{own / TOKENIZER} is not the tokenizer that the model was trained with: copy it "
            "again, if you did not change it yourself"
        )
    found = folder if folder != named else None
    return Checkpoint(named, model.eval(), tokenizer, record, found)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bar, which loading takes no time for, and no lines of transformers' own."""
    log = transformers_logging
    shown, verbosity = log.is_progress_bar_enabled(), log.get_verbosity()
    log.disable_progress_bar()
    log.set_verbosity(log.CRITICAL)
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if shown:
            log.enable_progress_bar()


def _load_model(
    folder: Path, config: Any, dtype: torch.dtype | None, stored: str | None
) -> DecoderForCausalLM:
    """Build the model of a configuration and fill it; its weights are ``stored`` in a format.

    First without memory, so that what does not fit is found before anything is allocated.
    """
    with _problems(folder):
        model = _empty(folder, config, stored)
        names = model.state_dict().keys()
        if any(name not in names for name, _ in model.named_buffers()):
            model = _build(config)  # which fills what is not stored
            replace_linears(model, stored, fill=False)
        wide: list[str] = getattr(model, "wide_names", list)()  # code of its own may know of none
        weights = _converted(folder, dtype or config.dtype, wide, stored_names(model))
        check_stored(folder, model, weights)
        _check_tied(folder, model, weights)
        model.load_state_dict(weights, strict=False, assign=True)
        model.tie_weights()
    if not hasattr(model, "new_cache"):
        raise UserError(
            f"checkpoint ({folder}) holds a {type(model).__name__}, which has no new_cache(): "
            "use a model made from retnet.model"
        )
    return model


def check_loads(folder: Path, config: Any) -> None:
    """Raise a ``UserError`` where the weights do not fit, as ``load_checkpoint`` would."""
    with _problems(folder):
        _empty(folder, config, format_of(folder))


def _empty(folder: Path, config: Any, stored: str | None) -> Any:
    """The model without memory, which the weights fit that are ``stored`` in a format."""
    check_size(folder, config, least_bits=bits_of(stored))
    with torch.device("meta"):
        model = _build(config)
        replace_linears(model, stored, fill=False)
    _check_fits(folder, model, stored_shapes(folder))
    return model


@contextmanager
def _problems(folder: Path) -> Iterator[None]:
    """A ``UserError`` for what a folder's configuration or weights bring about."""
    try:
        yield
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
        raise UserError(f"{folder / CONFIG}: {kind}{error}: {CORRECT}") from error


def _build(config: Any) -> Any:
    if isinstance(config, DecoderConfig) and not config.auto_map:
        return model_class(config.mixer_class.name)(config)
    return AutoModelForCausalLM.from_config(config, trust_remote_code=True)


def _converted(
    folder: Path, dtype: torch.dtype | None, wide: list[str], quantised: set[str]
) -> dict[str, Tensor]:
    """The weights in memory of their own; numbers of ``dtype``, or of the first one's.

    Those that are named by ``wide`` are never below float32, ``quantised`` ones stay as they are.
    """
    weights = {}
    for name, tensor in stored_tensors(folder, quantised):
        if name in quantised:
            weights[name] = tensor.clone()
            continue
        dtype = dtype or tensor.dtype
        weights[name] = tensor.to(wide_dtype(dtype) if name in wide else dtype, copy=True)
    return weights


def _check_fits(folder: Path, model: Any, stored: dict[str, tuple[int, ...]]) -> None:
    """Raise a ``UserError`` where stored weights are not exactly those of a model."""
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = model.all_tied_weights_keys.keys() if model.config.tie_word_embeddings else ()
    missing = own.keys() - stored.keys() - set(tied)
    could_be_tied: Mapping[str, str] = getattr(model, "_tied_weights_keys", None) or {}
    if missing and missing <= could_be_tied.keys():
        name = min(missing)
        raise UserError(
            f"{folder / CONFIG}: tie_word_embeddings (false) makes {name} and "
            f"{could_be_tied[name]} two, and the weights hold one: set it to true, or copy the "
            "checkpoint again"
        )
    mismatched = {name for name in own.keys() & stored.keys() if own[name] != stored[name]}
    for names, problem in (
        (missing, "missing from the weights"),
        (mismatched, f"of another shape than {CONFIG} says"),
        (stored.keys() - own.keys(), "in the weights but not in the model"),
    ):
        if names:
            raise UserError(
                f"checkpoint ({folder}) is incomplete, {min(names)} is {problem} "
                f"({len(names)} such): copy it again"
            )


def _check_tied(folder: Path, model: Any, weights: dict[str, Tensor]) -> None:
    """Raise a ``UserError`` where two weights are one by the configuration, and stored as two."""
    if not model.config.tie_word_embeddings:
        return
    for one, other in model.all_tied_weights_keys.items():
        if one in weights and other in weights and not torch.equal(weights[one], weights[other]):
            raise UserError(
                f"{folder / CONFIG}: tie_word_embeddings (true) makes {one} and {other} one, "
                "and the weights hold two: set it to false"
            )


def _load_tokenizer(folder: Path, config: Any, trust_remote_code: bool) -> PreTrainedTokenizerFast:
    if not (folder / TOKENIZER).is_file():
        raise UserError(
            f"checkpoint ({folder}) has no tokenizer, {TOKENIZER} is missing: copy it there from "
            "the run's other checkpoints, or from where the model comes from"
        )
    check_tokenizer_files(folder, "copy its tokenizer files again")
    try:
        with panics_as_errors():
            tokenizer = AutoTokenizer.from_pretrained(
                folder,
                config=config,  # else it reads config.json in its own way
                local_files_only=True,
                trust_remote_code=trust_remote_code,
            )
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
    if largest >= config.vocab_size:
        raise UserError(
            f"{folder / TOKENIZER}, with what tokenizer_config.json adds: its largest id "
            f"({largest}) is beyond the model's vocab_size ({config.vocab_size}): use the "
            "tokenizer the model was trained with"
        )
    if tokenizer.bos_token_id is None:
        raise UserError(
            f"{folder / TOKENIZER}: it has no bos_token, with which every text begins: set "
            "bos_token in tokenizer_config.json"
        )
    return tokenizer
