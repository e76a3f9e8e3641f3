"""Setting a run up, running it, and saying how it ended."""

import logging
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed

from retnet.checkpoints import Progress, find_checkpoint
from retnet.checkpoints.format import FINAL, list_checkpoints, step_folder
from retnet.checkpoints.lora import add_lora
from retnet.checkpoints.match import TAKE_OVER
from retnet.data import CarriedBatches, PreparedData, TrainingBatches, prepare_data
from retnet.data.chat import ChatFormat
from retnet.errors import UserError
from retnet.machine import keep_freed_memory, set_up_compiler
from retnet.training.build import (
    build_model,
    check_fits,
    check_model_fits,
    initial_weights,
    load_initial_weights,
    model_config,
    vocabulary,
)
from retnet.training.carry import CarriedState
from retnet.training.health import DivergedError
from retnet.training.limits import check_run_fits
from retnet.training.loop import Trainer
from retnet.training.optimizer import build_optimizer
from retnet.training.precision import settled_precision
from retnet.training.processes import build_accelerator
from retnet.training.resume import go_on, plan_start
from retnet.training.run_folder import RunLock, Start, open_run_folder
from retnet.training.signals import stop_on_signals
from retnet.training.spec import Config, flatten
from retnet.training.summary import describe_heads, describe_run
from retnet.training.trackers import check_trackers, end_training, start_trackers
from retnet.training.tracking import check_metrics, format_seconds
from retnet.training.validation import check_sample, check_targets

logger = logging.getLogger(__name__)

EXIT_DIVERGED = 3
T = TypeVar("T")


def check_run(config: Config) -> None:
    """Find mistakes before the data is prepared: a ``UserError`` where the run can't be."""
    check_trackers(config)
    check_run_fits(config)
    rows = config.train.batch_size if config.train.carry_state else 0
    check_model_fits(model_config(config, config.data.vocab_size), rows)
    if config.model.init_from and not list_checkpoints(config.train.run_folder):
        find_checkpoint(config.model.init_from)  # which a run that goes on needs no more


def train(config: Config, by_hand: Collection[str] | None = None) -> int:
    """Train as configured, from the run folder's newest checkpoint if there is one.

    ``by_hand`` are the keys that were asked for on the command line, all of them when None: of the
    others the warm-up gives way to that of the run which is gone on with.

    Returns the exit code: 0 when finished (also before), 3 when the loss is not finite, 130 or 143
    when asked to stop by a signal. A ``UserError`` where the configuration, the data or the
    run folder don't allow it.
    """
    keep_freed_memory()
    check_run(config)
    config = settled_precision(config)
    accelerator = build_accelerator(config.train)
    lock = RunLock(config.train.run_folder)

    def plan() -> Start:
        lock.acquire()
        return plan_start(config, flatten(config) if by_hand is None else by_hand)

    try:
        start = _decided_by_main(accelerator, plan)
        if start.finished:
            logger.info(
                f"the run in {config.train.out_dir} is finished ({start.finished} steps): nothing "
                "to do. A longer run: train.max_steps; another one: train.out_dir"
            )
            return 0
        if start.warmup_steps is not None:
            logger.info(
                f"train.warmup_steps ({config.train.warmup_steps}): the run in "
                f"{config.train.out_dir} goes on with its own {start.warmup_steps}"
            )
            config = replace(config, train=replace(config.train, warmup_steps=start.warmup_steps))
        trainer = _set_up(config, accelerator, start)
        # what may fail comes before anything is written that a new run's folder would keep
        _decided_by_main(accelerator, lambda: check_metrics(config.train.run_folder))
        _decided_by_main(accelerator, lambda: _start_trackers(trainer))
        if not _decided_by_main(accelerator, lambda: open_run_folder(config, start)):
            trainer.progress.forget_best()  # the next evaluation writes best/ again
        return _run(trainer)
    finally:
        end_training(accelerator)
        lock.release()


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
    _decided_by_main(accelerator, lambda: _check_weights(config, start))
    spec = config.data
    if config.model.init_from and start.checkpoint and not Path(spec.tokenizer).exists():
        spec = replace(spec, tokenizer=str(start.checkpoint))  # what it began with may be gone
    made: list[PreparedData] = []  # by the main process; the others find it made
    _decided_by_main(accelerator, lambda: made.append(prepare_data(spec)))
    data = made[0] if made else prepare_data(spec)
    trainer = _build_trainer(config, accelerator, data, start)
    check_sample(trainer.bare_model, data.tokenizer, config)
    check_targets(data.validation, config)
    if start.checkpoint is not None:
        go_on(trainer, start.checkpoint)
    for line in describe_run(trainer):
        logger.info(line)
    return trainer


def _start_trackers(trainer: Trainer) -> None:
    model = trainer.bare_model
    facts = {"parameters": model.num_parameters(), "heads": "; ".join(describe_heads(model.config))}
    start_trackers(trainer.accelerator, trainer.config, facts, trainer.progress.step)


def _check_weights(config: Config, start: Start) -> None:
    """Raise a ``UserError`` where those that the run begins with are of another model."""
    if start.checkpoint is not None:
        check_fits(config, start.checkpoint, f"checkpoint ({start.checkpoint})", TAKE_OVER)
    elif config.model.init_from:
        check_fits(config, *initial_weights(config.model.init_from))


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


def _build_trainer(
    config: Config, accelerator: Accelerator, data: PreparedData, start: Start
) -> Trainer:
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
    network = model_config(config, vocabulary(config, tokenizer, start.checkpoint), **ids)
    check_model_fits(network)
    set_seed(spec.seed)
    bare_model = build_model(network)
    if config.model.init_from and (start.checkpoint is None or spec.lora_rank):
        folder = load_initial_weights(bare_model, config.model.init_from, tokenizer)
        logger.info(f"weights from {folder}")
    if spec.lora_rank:
        add_lora(bare_model, spec.lora_rank)
    if config.data.is_messages:  # where transformers' generate ends an answer
        ends = {tokenizer.eos_token_id, ChatFormat(tokenizer).end}
        bare_model.generation_config.eos_token_id = sorted(ends)
    if spec.gradient_checkpointing:
        bare_model.activation_checkpointing_enable({"use_reentrant": False})
    if spec.compile:
        set_up_compiler(accelerator.device, "train.compile (true)")
        bare_model.compile()
    model, optimizer = accelerator.prepare(bare_model, build_optimizer(bare_model, spec))
    progress = Progress(global_batch=batches.global_batch, precision=spec.precision)
    micro_steps = spec.gradient_accumulation_steps
    carried = CarriedState(bare_model, micro_steps) if spec.carry_state else None
    return Trainer(
        config, accelerator, model, bare_model, optimizer, data, batches, progress, carried
    )
