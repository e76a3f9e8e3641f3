"""Setting a run up, running it, and saying how it ended."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from filelock import FileLock

from retnet.checkpoints import Progress, find_checkpoint, load_checkpoint_state
from retnet.checkpoints.format import DATA_RECORD, FINAL, step_folder
from retnet.checkpoints.match import TAKE_OVER, check_same_meaning
from retnet.data import CarriedBatches, PreparedData, TrainingBatches, prepare_data
from retnet.errors import UserError
from retnet.files import read_json
from retnet.machine import keep_freed_memory, set_up_compiler
from retnet.training.build import build_model, load_initial_weights, model_config
from retnet.training.carry import CarriedState
from retnet.training.health import DivergedError
from retnet.training.limits import check_run_fits
from retnet.training.loop import Trainer
from retnet.training.optimizer import build_optimizer
from retnet.training.processes import build_accelerator
from retnet.training.run_folder import LOCK, Start, lock_run_folder, open_run_folder, plan_start
from retnet.training.signals import stop_on_signals
from retnet.training.spec import Config
from retnet.training.summary import describe_run
from retnet.training.tracking import check_trackers, end_training, format_seconds, start_trackers
from retnet.training.validation import check_sample

logger = logging.getLogger(__name__)

EXIT_DIVERGED = 3
TEXT_HASHES = ("train_sha256", "validation_sha256")
T = TypeVar("T")


def train(config: Config) -> int:
    """Train as configured, from the run folder's newest checkpoint if there is one.

    Returns:
        The exit code: 0 when finished (also before), 3 when the loss is not finite, 130 or 143
        when asked to stop by a signal.

    Raises:
        UserError: The configuration, the data or the run folder don't allow it.
    """
    keep_freed_memory()
    check_trackers(config)
    check_run_fits(config)
    model_config(config, config.data.vocab_size)  # mistakes are found before the data is prepared
    if config.model.init_from:
        find_checkpoint(config.model.init_from)
    accelerator = build_accelerator(config.train)
    lock = FileLock(config.train.run_folder / LOCK)

    def plan() -> Start:
        lock_run_folder(lock)
        return plan_start(config)

    try:
        start = _decided_by_main(accelerator, plan)
        if start.finished:
            logger.info(
                f"the run in {config.train.out_dir} is finished ({start.finished} steps): nothing "
                "to do. A longer run: train.max_steps; another one: train.out_dir"
            )
            return 0
        trainer = _set_up(config, accelerator, start)
        if not _decided_by_main(accelerator, lambda: open_run_folder(config, start, lock)):
            trainer.progress.forget_best()  # the next evaluation writes best/ again
        _decided_by_main(accelerator, lambda: start_trackers(accelerator, config))
        return _run(trainer)
    finally:
        end_training(accelerator)
        lock.release(force=True)


def _decided_by_main(accelerator: Accelerator, decide: Callable[[], T]) -> T:
    """What the main process finds out, in all processes; its UserError too."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = decide()
        except UserError as error:
            outcome[1] = str(error)
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def _set_up(config: Config, accelerator: Accelerator, start: Start) -> Trainer:
    """The trainer as it stands at the start, after saying what it is."""
    made: list[PreparedData] = []  # by the main process; the others find it made
    _decided_by_main(accelerator, lambda: made.append(prepare_data(config.data)))
    data = made[0] if made else prepare_data(config.data)
    trainer = _build_trainer(config, accelerator, data)
    check_sample(trainer.bare_model, data.tokenizer, config.train)
    if start.checkpoint is not None:
        _go_on(trainer, start.checkpoint)
    elif config.model.init_from:
        folder = load_initial_weights(trainer.bare_model, config.model.init_from, data.tokenizer)
        logger.info(f"weights from {folder}")
    for line in describe_run(trainer):
        logger.info(line)
    return trainer


def _go_on(trainer: Trainer, checkpoint: Path) -> None:
    """Put a checkpoint's state into a fresh trainer.

    Raises:
        UserError: The checkpoint is of another model, tokenizer or size of a step; or of another
            text, unless ``train.resume`` names it.
    """
    _check_data(trainer, checkpoint)
    progress = load_checkpoint_state(checkpoint, trainer.model, trainer.optimizer.optimizer)
    check_same_meaning(trainer.bare_model, checkpoint, f"checkpoint ({checkpoint})", TAKE_OVER)
    if progress.global_batch != trainer.batches.global_batch:
        raise UserError(
            f"train.batch_size x train.gradient_accumulation_steps x processes "
            f"({trainer.batches.global_batch}) must stay {progress.global_batch}, the rows of a "
            f"step in {checkpoint}"
        )
    trainer.progress = progress
    if trainer.carried is not None:
        trainer.carried.load(checkpoint, trainer.accelerator)
    logger.info(f"going on from {checkpoint} (step {progress.step})")


def _check_data(trainer: Trainer, checkpoint: Path) -> None:
    """Compare tokenizer and text with those that the checkpoint was trained on."""
    data, now = trainer.config.data, trainer.data.record
    fix = "go on from another one, or use its weights alone with model.init_from"
    before = read_json(checkpoint / DATA_RECORD, fix)
    if before.get("tokenizer_sha256") != now["tokenizer_sha256"]:
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


def _run(trainer: Trainer) -> int:
    with stop_on_signals() as stop:
        try:
            finished = trainer.run(stop)
        except DivergedError as error:
            logger.error(f"training stopped: {error}")
            return EXIT_DIVERGED
    run, progress = trainer.run_folder, trainer.progress
    if finished:
        best = "none" if progress.best_loss is None else f"{progress.best_loss:.4f}"
        logger.info(
            f"finished {progress.step} steps in {format_seconds(progress.seconds)}; best "
            f"validation loss {best} at step {progress.best_step}; weights in {run / FINAL}"
        )
        return 0
    if progress.step == 0:
        logger.info("stopped before the end of the first step: there is nothing to save yet")
    else:
        logger.info(
            f"stopped after step {progress.step}, saved in {step_folder(run, progress.step)}; "
            f"{trainer.spec.command_to_go_on} goes on from there"
        )
    return stop.exit_code


def _build_trainer(config: Config, accelerator: Accelerator, data: PreparedData) -> Trainer:
    """Model, optimizer and batches of a run, nothing loaded yet."""
    spec, tokenizer = config.train, data.tokenizer
    kind: Any = CarriedBatches
    if not spec.carry_state:
        reset = config.data.reset_state_at_documents
        kind = partial(TrainingBatches, reset_at_documents=reset)
    batches = kind(
        data.train,
        seq_len=config.data.seq_len,
        batch_size=spec.batch_size,
        seed=spec.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        accumulation=spec.gradient_accumulation_steps,
    )
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    network = model_config(config, len(tokenizer), **ids)
    set_seed(spec.seed)
    bare_model = build_model(network)
    if spec.gradient_checkpointing:
        bare_model.activation_checkpointing_enable({"use_reentrant": False})
    if spec.compile:
        set_up_compiler(accelerator.device, "train.compile (true)")
        bare_model.compile()
    model, optimizer = accelerator.prepare(bare_model, build_optimizer(bare_model, spec))
    return Trainer(
        config,
        accelerator,
        model,
        bare_model,
        optimizer,
        data,
        batches,
        Progress(global_batch=batches.global_batch),
        CarriedState(bare_model, spec.gradient_accumulation_steps) if spec.carry_state else None,
    )
