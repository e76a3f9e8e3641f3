"""The format of a run's checkpoints: their files, and the folders they lie in.

A checkpoint is the state after a completed optimizer step, in a folder that alone suffices to
generate, and to load with transformers:

    config.json, generation_config.json, model.safetensors    as transformers writes them
    tokenizer.json, tokenizer_config.json
    data.json              how the training and validation data was made
    training_state.json    ``Progress``: the step, the best validation loss
    optimizer.safetensors  the optimizer's moments, by parameter name (not in best/ and final/)
    carried.safetensors    the states that the next windows begin with (train.carry_state only)
    lora.safetensors       the factors, where the weights are their sums (train.lora_rank only)
    manifest.json          sizes and checksums of the above, and of the model's code
    *.py                   that code, for transformers without this package (train.export_code)
    README.md              the model card, in final/: yours to edit, so not in the manifest

Others' checkpoints may have their weights in several files, named by model.safetensors.index.json,
and lack what only training needs. Nothing is pickled. In a run folder there are

    checkpoints/step_N/    the newest ones, to go on from
    best/                  the lowest validation loss so far
    final/                 the end of the run

A folder with one of these names is complete: it was filled under another name, see
``retnet.files``.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from retnet.errors import UserError
from retnet.files import MAY_LACK, read_record

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
DATA_RECORD = "data.json"
TRAINING_STATE = "training_state.json"
OPTIMIZER = "optimizer.safetensors"
CARRIED = "carried.safetensors"
LORA = "lora.safetensors"
MANIFEST = "manifest.json"
ADAPTER = "adapter_config.json"  # of peft
CARD = "README.md"  # of the model, as the Hub shows it

CHECKPOINTS = "checkpoints"
BEST = "best"
FINAL = "final"
METRICS = "metrics.jsonl"
SET_ASIDE = "set-aside-"  # how the names of checkpoints begin that are not gone on from
PARTS_OF_A_RUN = (CHECKPOINTS, BEST, FINAL)
MOST = 2**63  # no count of a run comes so far
COPY_AGAIN = "copy the checkpoint again"  # what to do about a file that is not as it was written


def is_adapter(folder: Path) -> bool:
    """Whether a folder has an adapter, and no weights beside it, which would count alone."""
    whole = any((folder / name).is_file() for name in (WEIGHTS, WEIGHTS_INDEX))
    return not whole and (folder / ADAPTER).is_file()


def only_an_adapter(folder: Path) -> str:
    """The message for a folder that has an adapter where a whole model is needed."""
    return (
        f"checkpoint ({folder}) is an adapter ({ADAPTER}), which needs its base model: "
        "merge the two (docs/finetuning.md says how), and name the folder of the result"
    )


@dataclass
class Progress:
    """Where a run stands: everything besides weights and moments."""

    step: int = 0  # completed optimizer steps
    global_batch: int = 0  # rows of one, which must stay the same when the run goes on
    best_loss: float | None = None  # of validation, nats per token; None before the first
    best_step: int | None = None
    seconds: float = 0.0  # spent in training
    # fp32 or bf16, of products; None in checkpoints of before it was recorded
    precision: str | None = field(default=None, metadata=MAY_LACK)

    def problem(self) -> str | None:
        """What can't be, with key and value; the types are right."""
        for key, value in vars(self).items():
            if type(value) in (int, float) and key != "best_loss" and not 0 <= value < MOST:
                return f"{key} ({value}) must be at least 0"
        if (self.best_loss is None) != (self.best_step is None):
            return f"best_loss ({self.best_loss}) and best_step ({self.best_step}) belong together"
        if self.best_step is not None and self.best_step > self.step:
            return f"best_step ({self.best_step}) comes after step ({self.step})"
        if self.best_loss is not None and not math.isfinite(self.best_loss):
            return f"best_loss ({self.best_loss}) must be finite"
        if self.best_loss is not None and self.best_loss < 0:
            return f"best_loss ({self.best_loss}) must be at least 0"
        if self.precision not in (None, "fp32", "bf16"):
            return f"precision ({self.precision}) must be fp32 or bf16"
        return None

    def forget_best(self) -> None:
        """The weights of the best evaluation are no longer there to be found."""
        self.best_loss = self.best_step = None


def read_progress(folder: Path) -> Progress:
    """Where the run stood when a checkpoint was written; a ``UserError`` if that is not told."""
    progress = read_record(folder / TRAINING_STATE, Progress, COPY_AGAIN)
    if problem := progress.problem():
        raise UserError(f"{folder / TRAINING_STATE}: {problem}: {COPY_AGAIN}")
    return progress


def trained_in(folder: Path) -> str | None:
    """The precision that a checkpoint was trained in; None where it does not say."""
    return read_progress(folder).precision if (folder / TRAINING_STATE).is_file() else None


def step_folder(run: Path, step: int) -> Path:
    """The folder of the checkpoint after ``step`` steps."""
    return run / CHECKPOINTS / f"step_{step}"


def step_number(folder: Path) -> int:
    """The step that a folder of ``step_folder`` is named after."""
    return int(folder.name.removeprefix("step_"))


def in_order(folders: Iterable[Path]) -> list[Path]:
    """Those of some folders that are named as by ``step_folder``, oldest first."""
    named = (folder for folder in folders if re.fullmatch(r"step_[0-9]+", folder.name))
    return sorted(named, key=step_number)


def is_run(folder: Path) -> bool:
    """Whether checkpoints lie in a folder as a run has them."""
    found = (f"{CHECKPOINTS}/step_*/{CONFIG}", f"{BEST}/{CONFIG}", f"{FINAL}/{CONFIG}")
    return any(any(folder.glob(pattern)) for pattern in found)


def check_outside_of_runs(folder: Path, option: str, fix: str) -> None:
    """Raise a ``UserError`` where the folder that an option names is in a run or checkpoint."""
    for above in (folder, *folder.absolute().parents):
        if is_run(above) or ((above / CONFIG).is_file() and any(above.glob("*.safetensors"))):
            raise UserError(f"{option} ({folder}) lies in a run or checkpoint ({above}): {fix}")


def list_checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first; a ``UserError`` where they can't be looked for."""
    parent = run / CHECKPOINTS
    try:
        return in_order(parent.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(
            f"{parent} can't be read ({error.strerror or error}), and what is there decides where "
            "the run begins: make it readable, or set another train.out_dir"
        ) from error
