"""Where a run begins, and going on from a checkpoint: whether it fits, then its state."""

import logging
from collections.abc import Collection
from pathlib import Path

from retnet.checkpoints import load_checkpoint_state
from retnet.checkpoints.format import (
    BEST,
    CHECKPOINTS,
    DATA_RECORD,
    FINAL,
    METRICS,
    list_checkpoints,
)
from retnet.checkpoints.format import CONFIG as CHECKPOINT_CONFIG
from retnet.checkpoints.verify import checkpoint_damage
from retnet.errors import UserError
from retnet.files import read_json
from retnet.paths import expand, kind_of
from retnet.training.config import is_recorded, load_config
from retnet.training.health import DIVERGED
from retnet.training.loop import Trainer
from retnet.training.precision import precision_before_it_was_recorded
from retnet.training.run_folder import CONFIG, Start, step_of
from retnet.training.spec import RESUMABLE_KEYS, Config, flatten

logger = logging.getLogger(__name__)

TEXT_HASHES = ("train_sha256", "validation_sha256")
TOKENIZER_HASHES = ("tokenizer_sha256", "chat_template_sha256")  # the latter of conversations
WARMUP = "train.warmup_steps"
PRECISION = "train.precision"


def plan_start(config: Config, by_hand: Collection[str]) -> Start:
    """Decide from the run folder, which must be locked, and ``train.resume``; writes nothing.

    ``by_hand`` are the keys that were asked for on the command line.

    A ``UserError`` where the folder is of another configuration, or not to be gone on with.
    """
    run, resume = config.train.run_folder, config.train.resume
    if not list_checkpoints(run) and not (run / FINAL).exists():
        _check_nothing_of_others(run)
    if resume == "auto":
        return _automatic_start(config, run, by_hand)
    if resume != "never":
        return _named_start(expand(resume, "train.resume"), run, config.train.max_steps)
    if _holds_run(run):
        raise UserError(
            f"train.out_dir ({run}) already holds a run and train.resume is never: remove it, "
            "or set another train.out_dir"
        )
    return Start()


def _holds_run(run: Path) -> bool:
    """Whether something of a run is there; one that died before its first save has only best/."""
    return bool(list_checkpoints(run)) or (run / FINAL).exists() or (run / BEST).exists()


def _check_nothing_of_others(run: Path) -> None:
    """Raise a ``UserError`` where something that no run wrote would be written over.

    A run writes its configuration first: without it, the other files are not a run's either.
    """
    file, best = run / CONFIG, run / BEST
    if file.is_file():
        foreign = [] if is_recorded(file) else [file]
    else:
        named = (run / METRICS, run / DIVERGED)
        foreign = [path for path in named if path.is_file() and path.stat().st_size]
    if best.is_dir() and any(best.iterdir()) and not (best / CHECKPOINT_CONFIG).exists():
        foreign.append(best)
    if foreign:
        raise UserError(
            f"train.out_dir ({run}) holds no run, and {foreign[0]}, which a run would write over: "
            "move that away, or set another train.out_dir"
        )


def _automatic_start(config: Config, run: Path, by_hand: Collection[str]) -> Start:
    """From the newest whole checkpoint of the run folder."""
    warmup = _check_same_configuration(config, run, by_hand)
    final, damage = run / FINAL, None
    if final.exists():
        damage = checkpoint_damage(final, resumable=False)
        done = step_of(final)
        if damage is None and done >= config.train.max_steps:
            return Start(finished=done)
    checkpoint = _newest_whole(run)
    if checkpoint is not None:
        _check_length(checkpoint, config.train.max_steps)
    elif final.exists():  # it was written after the last checkpoint
        raise UserError(
            f"train.out_dir ({run}) has {FINAL}/ and no checkpoint in {CHECKPOINTS}/ to go on "
            "from: put one back, or set another train.out_dir (model.init_from takes the weights)"
        )
    if damage is not None:
        logger.warning(f"checkpoint ({final}) is damaged, {damage}: it is written again")
    return Start(checkpoint, damaged_end=damage is not None, warmup_steps=warmup)


def _named_start(checkpoint: Path, run: Path, max_steps: int) -> Start:
    """From the checkpoint that ``train.resume`` names."""
    if kind_of(checkpoint, "train.resume") != "folder":
        raise UserError(
            f"train.resume ({checkpoint}) must be auto, never, or a checkpoint folder that exists"
        )
    damage = checkpoint_damage(checkpoint, resumable=checkpoint.parent.name == CHECKPOINTS)
    if damage is not None:
        raise UserError(
            f"train.resume ({checkpoint}) is no whole checkpoint, {damage}: name another one, or "
            "use auto, which takes the newest whole one"
        )
    own = checkpoint.resolve().parent == (run / CHECKPOINTS).resolve()
    if not own and _holds_run(run):
        inside = run.resolve() in checkpoint.resolve().parents
        whose = f"is none of its {CHECKPOINTS}/" if inside else "is of another"
        raise UserError(
            f"train.out_dir ({run}) already holds a run, and train.resume ({checkpoint}) {whose}: "
            "go on with the run there by train.resume=auto, or set another train.out_dir"
        )
    _check_length(checkpoint, max_steps)
    return Start(checkpoint)


def _check_length(checkpoint: Path, max_steps: int) -> None:
    step = step_of(checkpoint)
    if step > max_steps:
        raise UserError(
            f"train.max_steps ({max_steps}) is less than the {step} steps of checkpoint "
            f"({checkpoint}): set at least {step}, or name an earlier checkpoint by train.resume"
        )


def _newest_whole(run: Path) -> Path | None:
    """The newest checkpoint that is as it was written; None in a folder without any."""
    damages: list[str] = []
    for folder in reversed(list_checkpoints(run)):
        damage = checkpoint_damage(folder, resumable=True)
        if damage is None:
            for line in damages:
                logger.warning(f"{line}: going back to {folder.name}")
            return folder
        damages.append(f"checkpoint ({folder}) is damaged, {damage}")
    if damages:
        raise UserError(
            f"{'; '.join(damages)}; and there is no whole one: restore one, or remove {run} to "
            "start again"
        )
    return None


def _check_same_configuration(config: Config, run: Path, by_hand: Collection[str]) -> int | None:
    """Compare with the configuration of the run that is in the folder, if there is one.

    Returns the warm-up of that run where nobody asked for the other one: a recipe's is shortened
    for a short run, which then goes on as a long one.
    """
    file = run / CONFIG
    if not file.is_file():
        checkpoints = list_checkpoints(run)
        if checkpoints or (run / FINAL).exists():
            named = f" go on by train.resume={checkpoints[-1]}," if checkpoints else ""
            raise UserError(
                f"train.out_dir ({run}) holds a run without its {CONFIG}, so that it can't be "
                f"compared with this configuration: restore it,{named} or set another train.out_dir"
            )
        return None
    try:
        before, now = flatten(load_config(file, recorded=True)), flatten(config)
    except UserError as error:
        raise UserError(
            f"{file}, the configuration of the run in train.out_dir, is damaged: {error}; restore "
            "it, or go on by train.resume=CHECKPOINT, which writes it again"
        ) from error
    if before[PRECISION] == "auto":
        before[PRECISION] = precision_before_it_was_recorded(config.train)
    keys = [key for key in now if key not in RESUMABLE_KEYS and now[key] != before[key]]
    if keys == [WARMUP] and WARMUP not in by_hand and before[WARMUP] <= config.train.max_steps:
        return int(before[WARMUP])
    if keys:
        changes = ", ".join(f"{key} ({before[key]} -> {now[key]})" for key in keys)
        raise UserError(
            f"train.out_dir ({run}) holds a run of another configuration, it differs in {changes}: "
            "set another train.out_dir, or remove the folder"
        )
    return None


def go_on(trainer: Trainer, checkpoint: Path) -> None:
    """Put a checkpoint's state into a fresh trainer, whose model it fits (``build.check_fits``).

    A ``UserError`` where it is of another tokenizer or size of a step; or of another text,
    unless ``train.resume`` names it.
    """
    _check_data(trainer, checkpoint)
    progress = load_checkpoint_state(checkpoint, trainer.model, trainer.optimizer.optimizer)
    if progress.global_batch != trainer.batches.global_batch:
        raise UserError(
            f"train.batch_size x train.gradient_accumulation_steps x processes "
            f"({trainer.batches.global_batch}) must stay {progress.global_batch}, the rows of a "
            f"step in {checkpoint}"
        )
    progress.precision = trainer.spec.precision
    trainer.progress = progress
    if trainer.carried is not None:
        trainer.carried.load(checkpoint, trainer.accelerator, trainer.batches.global_batch)
    logger.info(f"going on from {checkpoint} (step {progress.step})")


def _check_data(trainer: Trainer, checkpoint: Path) -> None:
    """Compare tokenizer and text with those that the checkpoint was trained on."""
    data, now = trainer.config.data, trainer.data.record
    fix = "go on from another one, or use its weights alone with model.init_from"
    before = read_json(checkpoint / DATA_RECORD, fix)
    if any(before.get(key) != now.get(key) for key in TOKENIZER_HASHES):
        raise UserError(
            f"data.tokenizer ({data.tokenizer}) is not the tokenizer that checkpoint "
            f"({checkpoint}) was trained with: restore the text it was made from, or set "
            f"data.tokenizer={checkpoint} train.resume={checkpoint} and another train.out_dir"
        )
    if all(before.get(key) == now[key] for key in TEXT_HASHES):
        return
    changed = (
        f"data.source ({data.source}) does not give the text that checkpoint ({checkpoint}) "
        "was trained on"
    )
    if trainer.spec.carry_state:
        raise UserError(
            f"{changed}, and with train.carry_state (true) its states belong to that text: restore "
            f"it, or take the weights alone into another train.out_dir (model.init_from)"
        )
    if trainer.spec.resume == "auto":
        raise UserError(
            f"{changed}: restore it, or go on with the new text by train.resume={checkpoint}"
        )
    logger.warning(f"{changed}: going on with the new text, as train.resume names the checkpoint")
