"""Writing the checkpoints of a run.

States are gathered by ``torch.distributed.checkpoint``, which gives the same names and whole
tensors for a plain, a DDP and a sharded model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retnet.checkpoints.format import (
    CARRIED,
    CHECKPOINTS,
    DATA_RECORD,
    OPTIMIZER,
    TRAINING_STATE,
    Progress,
    list_checkpoints,
)
from retnet.checkpoints.verify import write_manifest
from retnet.files import remove_folder, replacing, tidy, write_json

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass(frozen=True)
class Snapshot:
    """What is written with the weights, the same in every checkpoint of a run."""

    tokenizer: PreTrainedTokenizerBase
    data_record: dict[str, Any]


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    bare_model: PreTrainedModel,
    optimizer: torch.optim.Optimizer | None,
    progress: Progress,
    snapshot: Snapshot,
    *,
    carried: dict[str, Tensor] | None = None,
    main_process: bool = True,
) -> None:
    """Write a checkpoint; every process must call this, the main one writes.

    Args:
        folder: Its final name; an existing folder there is replaced.
        model: The model that is trained, perhaps wrapped.
        bare_model: The transformers model inside.
        optimizer: None leaves out the optimizer's state: enough to generate, not to go on.
        progress: Saved with it.
        snapshot: Tokenizer and data record.
        carried: States carried from window to window, where there are any.
        main_process: Whether this process writes.

    Raises:
        OSError: It can't be written; nothing has changed then.
    """
    weights = get_model_state_dict(model, options=WHOLE)
    moments = None
    if optimizer is not None:
        moments = get_optimizer_state_dict(model, optimizer, options=WHOLE)
    if not main_process:
        return
    if folder.parent.name == CHECKPOINTS:  # a run folder that was removed stays removed
        folder.parent.mkdir(exist_ok=True)
    with replacing(folder) as new, _failed_writes():
        bare_model.save_pretrained(new, state_dict=weights)
        snapshot.tokenizer.save_pretrained(new)
        write_json(new / DATA_RECORD, snapshot.data_record)
        write_json(new / TRAINING_STATE, asdict(progress))
        if moments is not None:
            save_file(flatten_moments(moments), new / OPTIMIZER)
            if carried is not None:
                save_file(carried, new / CARRIED)
        write_manifest(new)
        for file in new.iterdir():
            file.chmod(0o644)  # safetensors writes files that only their owner can read


@contextmanager
def _failed_writes() -> Iterator[None]:
    """``OSError`` also for what safetensors and tokenizers report in their own way."""
    try:
        yield
    except Exception as error:
        if "(os error " in str(error):
            raise OSError(str(error)) from error
        raise


def flatten_moments(state: dict[str, Any]) -> dict[str, Tensor]:
    """An optimizer's state as it is stored: "name of the parameter/name of the moment"."""
    return {
        f"{name}/{key}": value.contiguous()
        for name, values in state["state"].items()
        for key, value in values.items()
    }


def prune_checkpoints(run: Path, keep: int) -> None:
    """Remove all but the ``keep`` newest checkpoints."""
    for folder in list_checkpoints(run)[:-keep]:
        remove_folder(folder)


def remove_unfinished(run: Path) -> None:
    """Tidy up after an interrupted write."""
    tidy(run)
    tidy(run / CHECKPOINTS)
