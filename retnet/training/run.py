"""Setting a run up, running it, and saying how it ended."""

import logging
import os
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed

from retnet.data import PreparedData, TrainingBatches, prepare_data
from retnet.errors import UserError
from retnet.training.build import Model, build_model, load_initial_weights, model_config
from retnet.training.checkpoint import FINAL, Progress, load_checkpoint_state, step_folder
from retnet.training.config import Config, TrainSpec
from retnet.training.loop import EXIT_DIVERGED, DivergedError, Trainer
from retnet.training.optimizer import build_optimizer
from retnet.training.report import describe_run
from retnet.training.run_folder import open_run_folder, plan_start
from retnet.training.signals import stop_on_signals
from retnet.training.tracking import format_seconds, start_trackers

logger = logging.getLogger(__name__)


def train(config: Config) -> int:
    """Train as configured, from the run folder's newest checkpoint if there is one.

    Returns:
        The exit code: 0 when finished (also before), 3 when the loss is not finite, 130 or 143
        when asked to stop by a signal.

    Raises:
        UserError: The configuration, the data or the run folder don't allow it.
    """
    start = plan_start(config)
    run = Path(str(config.train.out_dir))
    if start.finished:
        logger.info(
            "the run in %s is finished (%d steps): nothing to do. A longer run: train.max_steps; "
            "another one: train.out_dir",
            run,
            config.train.max_steps,
        )
        return 0
    accelerator = build_accelerator(config.train)
    if not accelerator.is_main_process:
        logging.getLogger("retnet").setLevel(logging.WARNING)
    with accelerator.main_process_first():  # the others find the token files made
        data = prepare_data(config.data)
    trainer = build_trainer(config, accelerator, data)
    lock = open_run_folder(config) if accelerator.is_main_process else None
    if start.checkpoint is not None:
        _go_on(trainer, start.checkpoint)
    elif config.model.init_from:
        folder = load_initial_weights(trainer.bare_model, config.model.init_from)
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
    start_trackers(accelerator, config)
    try:
        return _run(trainer, run)
    finally:
        accelerator.end_training()
        if lock is not None:
            lock.release()


def _run(trainer: Trainer, run: Path) -> int:
    with stop_on_signals() as stop:
        try:
            finished = trainer.run(stop)
        except DivergedError as error:
            logger.error("training stopped: %s", error)
            return EXIT_DIVERGED
    progress = trainer.progress
    if not finished:
        logger.info(
            "stopped after step %d, saved in %s; the same command goes on from there",
            progress.step,
            step_folder(run, progress.step),
        )
        return stop.exit_code
    logger.info(
        "finished %d steps in %s; best validation loss %.4f at step %s; weights in %s",
        progress.step,
        format_seconds(progress.seconds),
        progress.best_loss,
        progress.best_step,
        run / FINAL,
    )
    return 0


def build_accelerator(spec: TrainSpec) -> Accelerator:
    """Device, processes and precision.

    Raises:
        UserError: They are not to be had here.
    """
    cuda = torch.cuda.is_available()
    if spec.device == "cuda" and not cuda:
        raise UserError("train.device (cuda) is not available here: use auto or cpu")
    cpu = spec.device == "cpu" or not cuda
    precision = spec.precision
    if precision == "auto":
        precision = "bf16" if not cpu and torch.cuda.is_bf16_supported() else "fp32"
    AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision="bf16" if precision == "bf16" else "no",
        log_with=list(spec.trackers) or None,
        project_dir=spec.out_dir,
    )
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != world_size:
        raise UserError(
            f"WORLD_SIZE ({world_size}) is set, but accelerate runs {accelerator.num_processes} "
            "process: start several processes with torchrun"
        )
    return accelerator


def build_trainer(config: Config, accelerator: Accelerator, data: PreparedData) -> Trainer:
    """Model, optimizer and batches of a run, nothing loaded yet."""
    spec = config.train
    tokenizer = data.tokenizer
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    network = model_config(config, len(tokenizer), ids)
    set_seed(spec.seed)
    bare_model: Model = build_model(network)
    if spec.gradient_checkpointing:
        bare_model.activation_checkpointing_enable({"use_reentrant": False})
    if spec.compile:
        _check_compiler(accelerator.device)
        bare_model.compile()
    model, optimizer = accelerator.prepare(bare_model, build_optimizer(bare_model, spec))
    batches = TrainingBatches(
        data.train,
        seq_len=config.data.seq_len,
        batch_size=spec.batch_size,
        seed=spec.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        accumulation=spec.gradient_accumulation_steps,
        reset_at_documents=config.data.reset_state_at_documents,
    )
    progress = Progress(global_batch=batches.global_batch)
    return Trainer(config, accelerator, model, bare_model, optimizer, data, batches, progress)


def _go_on(trainer: Trainer, checkpoint: Path) -> None:
    progress = load_checkpoint_state(checkpoint, trainer.model, trainer.optimizer.optimizer)
    if progress.global_batch != trainer.batches.global_batch:
        raise UserError(
            f"train.batch_size x train.gradient_accumulation_steps x processes "
            f"({trainer.batches.global_batch}) must stay {progress.global_batch}, the rows of a "
            f"step in {checkpoint}"
        )
    trainer.progress = progress
    logger.info("going on from %s (step %d)", checkpoint, progress.step)


def _check_compiler(device: torch.device) -> None:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "cl"]
    if device.type == "cpu" and not any(shutil.which(name) for name in names):
        raise UserError(
            f"train.compile (true) needs a C++ compiler and finds none ({', '.join(names)}): "
            "install one, or set train.compile=false"
        )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
