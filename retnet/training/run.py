"""Setting a run up, running it, and saying how it ended."""

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed

from retnet.checkpoints import Progress, find_checkpoint
from retnet.checkpoints.format import FINAL, step_folder
from retnet.data import (
    CarriedBatches,
    PreparedData,
    TokenFile,
    TrainingBatches,
    prepare_data,
)
from retnet.errors import UserError
from retnet.machine import keep_freed_memory, set_up_compiler
from retnet.training.build import (
    Model,
    build_model,
    load_initial_weights,
    model_config,
)
from retnet.training.carry import CarriedState
from retnet.training.config import Config, command_to_go_on
from retnet.training.health import DivergedError
from retnet.training.limits import check_run_fits
from retnet.training.loop import EXIT_DIVERGED, Trainer
from retnet.training.optimizer import build_optimizer
from retnet.training.processes import build_accelerator
from retnet.training.resume import go_on
from retnet.training.run_folder import (
    Start,
    lock_run_folder,
    open_run_folder,
    plan_start,
    run_lock,
)
from retnet.training.signals import stop_on_signals
from retnet.training.summary import describe_run
from retnet.training.tracking import check_trackers, end_training, format_seconds, start_trackers
from retnet.training.validation import check_sample

logger = logging.getLogger(__name__)

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
    lock = run_lock(config)

    def plan() -> Start:
        lock_run_folder(lock)
        return plan_start(config)

    try:
        start = _decided_by_main(accelerator, plan)
        if start.finished:
            logger.info(
                "the run in %s is finished (%d steps): nothing to do. A longer run: "
                "train.max_steps; another one: train.out_dir",
                config.train.out_dir,
                start.finished,
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


def _prepare(config: Config, accelerator: Accelerator) -> PreparedData:
    """The data: made by the main process, the others find it made."""
    made: list[PreparedData] = []
    _decided_by_main(accelerator, lambda: made.append(prepare_data(config.data)))
    return made[0] if made else prepare_data(config.data)


def _set_up(config: Config, accelerator: Accelerator, start: Start) -> Trainer:
    """The trainer as it stands at the start, after saying what it is."""
    data = _prepare(config, accelerator)
    trainer = build_trainer(config, accelerator, data)
    check_sample(trainer.bare_model, data.tokenizer, config.train)
    if start.checkpoint is not None:
        go_on(trainer, start.checkpoint)
    elif config.model.init_from:
        folder = load_initial_weights(trainer.bare_model, config.model.init_from, data.tokenizer)
        logger.info("weights from %s", folder)
    for line in describe_run(
        config,
        trainer.bare_model,
        data,
        trainer.batches,
        device=_device_name(accelerator.device),
        precision="bf16" if accelerator.mixed_precision == "bf16" else "fp32",
        processes=accelerator.num_processes,
    ):
        logger.info("%s", line)
    return trainer


def _run(trainer: Trainer) -> int:
    run = trainer.run_folder
    with stop_on_signals() as stop:
        try:
            finished = trainer.run(stop)
        except DivergedError as error:
            logger.error("training stopped: %s", error)
            return EXIT_DIVERGED
    progress = trainer.progress
    if not finished:
        if progress.step == 0:
            logger.info("stopped before the end of the first step: there is nothing to save yet")
        else:
            logger.info(
                "stopped after step %d, saved in %s; %s goes on from there",
                progress.step,
                step_folder(run, progress.step),
                command_to_go_on(trainer.spec),
            )
        return stop.exit_code
    best = progress.best_loss
    logger.info(
        "finished %d steps in %s; best validation loss %s at step %s; weights in %s",
        progress.step,
        format_seconds(progress.seconds),
        "none" if best is None else f"{best:.4f}",
        progress.best_step,
        run / FINAL,
    )
    return 0


def build_trainer(config: Config, accelerator: Accelerator, data: PreparedData) -> Trainer:
    """Model, optimizer and batches of a run, nothing loaded yet."""
    spec = config.train
    tokenizer = data.tokenizer
    batches = _build_batches(config, accelerator, data.train)
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    network = model_config(config, len(tokenizer), ids)
    set_seed(spec.seed)
    bare_model: Model = build_model(network)
    if spec.gradient_checkpointing:
        bare_model.activation_checkpointing_enable({"use_reentrant": False})
    if spec.compile:
        set_up_compiler(accelerator.device, "train.compile (true)")
        bare_model.compile()
    model, optimizer = accelerator.prepare(bare_model, build_optimizer(bare_model, spec))
    progress = Progress(global_batch=batches.global_batch)
    carried = None
    if spec.carry_state:
        carried = CarriedState(bare_model, spec.gradient_accumulation_steps)
    return Trainer(
        config, accelerator, model, bare_model, optimizer, data, batches, progress, carried
    )


def _build_batches(
    config: Config, accelerator: Accelerator, tokens: TokenFile
) -> TrainingBatches | CarriedBatches:
    cut = {
        "seq_len": config.data.seq_len,
        "batch_size": config.train.batch_size,
        "seed": config.train.seed,
        "rank": accelerator.process_index,
        "world_size": accelerator.num_processes,
        "accumulation": config.train.gradient_accumulation_steps,
    }
    if config.train.carry_state:
        return CarriedBatches(tokens, **cut)
    reset = config.data.reset_state_at_documents
    return TrainingBatches(tokens, **cut, reset_at_documents=reset)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
