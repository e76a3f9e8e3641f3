"""The training loop. In each step: update -> evaluate -> sample -> save -> log.

Everything random is a function of (seed, step, micro-step, rank), so a run that goes on from a
checkpoint is the run that was never interrupted.
"""

import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from retnet.data import PreparedData, TrainingBatches, ValidationBatches
from retnet.evaluation import evaluate_batches
from retnet.generation import sample_text
from retnet.training.build import Model
from retnet.training.checkpoint import (
    BEST,
    CHECKPOINTS,
    FINAL,
    Progress,
    Snapshot,
    prune_checkpoints,
    save_checkpoint,
    step_folder,
)
from retnet.training.config import Config
from retnet.training.optimizer import learning_rate
from retnet.training.signals import StopRequest
from retnet.training.tracking import Console, MetricsFile

logger = logging.getLogger(__name__)

EXIT_DIVERGED = 3
DIVERGED = "diverged.json"
FIRST_LOSS_MARGIN = 0.5


class DivergedError(RuntimeError):
    """Loss or gradient are not finite; the weights are those of the last good step."""


@dataclass
class Trainer:
    """A run that is set up and ready to train.

    Attributes:
        config: The resolved configuration.
        accelerator: Device, processes, precision.
        model: Prepared by accelerate.
        bare_model: The transformers model inside.
        optimizer: Prepared by accelerate.
        data: Tokens and tokenizer.
        batches: This process's training rows.
        progress: Where the run stands.
    """

    config: Config
    accelerator: Accelerator
    model: nn.Module
    bare_model: Model
    optimizer: Any
    data: PreparedData
    batches: TrainingBatches
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self.spec = self.config.train
        self.run_folder = Path(str(self.spec.out_dir))
        self.snapshot = Snapshot(self.data.tokenizer, self.data.record)

    def run(self, stop: StopRequest) -> bool:
        """Train until ``max_steps`` or a request to stop.

        Returns:
            Whether the run is finished; if not, its newest checkpoint is the last completed step.

        Raises:
            DivergedError: Loss or gradient are not finite.
        """
        main = self.accelerator.is_main_process
        metrics = MetricsFile(self.run_folder, self.progress.step) if main else None
        console = Console(
            done=self.progress.step, total=self.spec.max_steps, every=self.spec.log_every
        ) if main else None  # fmt: skip
        saved = self.progress.step
        try:
            while self.progress.step < self.spec.max_steps:
                values = self._step(self.progress.step, stop)
                if values is None:
                    if self.progress.step > saved:
                        self._save(step_folder(self.run_folder, self.progress.step))
                    return False
                self.progress.step += 1
                step, last = self.progress.step, self.progress.step == self.spec.max_steps
                if step % self.spec.eval_every == 0 or last:
                    values |= self._evaluate(console)
                if step % self.spec.save_every == 0 or last:
                    self._save(step_folder(self.run_folder, step))
                    saved = step
                self._log(values, metrics, console)
        finally:
            if metrics is not None:
                metrics.close()
            if console is not None:
                console.close()
        self._save(self.run_folder / FINAL, resumable=False)
        return True

    def _step(self, step: int, stop: StopRequest) -> dict[str, float] | None:
        """One optimizer step; None, and nothing changed, when asked to stop on the way."""
        began = time.perf_counter()
        self.model.train()
        micro_steps = self.spec.gradient_accumulation_steps
        micro_batches = [self.batches.batch(step, micro_step) for micro_step in range(micro_steps)]
        waited = time.perf_counter() - began
        targets = torch.stack([(b["shift_labels"] != -100).sum() for b in micro_batches]).sum()
        targets = self._sum_over_processes(targets.to(self.accelerator.device))
        loss = torch.zeros((), device=self.accelerator.device)
        for micro_step, batch in enumerate(micro_batches):
            if self._asked_to_stop(stop):
                self.optimizer.zero_grad()
                return None
            self._seed(step, micro_step)
            last = micro_step == micro_steps - 1
            # gradients are exchanged between processes once, with the last micro-batch
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                inputs = {k: v.to(self.accelerator.device) for k, v in batch.items()}
                part = self.model(
                    **inputs, num_items_in_batch=targets, return_logits=False, use_cache=False
                ).loss
                # DDP averages over processes; the targets were counted over all of them
                self.accelerator.backward(part * self.accelerator.num_processes)
            loss += part.detach()
        loss_value = self._sum_over_processes(loss).item()
        norm = self._clip()
        if not (math.isfinite(loss_value) and math.isfinite(norm)):
            self._report_divergence(step, loss_value, norm)
        if self._asked_to_stop(stop):
            self.optimizer.zero_grad()
            return None
        rate = learning_rate(step + 1, self.spec)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        seconds = time.perf_counter() - began
        self.progress.seconds += seconds
        if step == 0 and not self.config.model.init_from:
            self._check_first_loss(loss_value)
        return {
            "step": step + 1,
            "train/loss": loss_value,
            "optim/lr": rate,
            "optim/grad_norm": norm,
            "data/epoch": self.batches.epoch(step + 1),
            "perf/tokens_per_s": self.batches.global_batch * self.config.data.seq_len / seconds,
            "perf/data_wait_share": waited / seconds,
        }

    def _asked_to_stop(self, stop: StopRequest) -> bool:
        """Whether any process was asked to; all of them must answer alike."""
        if self.accelerator.num_processes == 1:
            return bool(stop)
        flag = torch.tensor(float(bool(stop)), device=self.accelerator.device)
        return self._sum_over_processes(flag).item() > 0

    def _sum_over_processes(self, value: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return value
        return self.accelerator.reduce(value, reduction="sum")

    def _seed(self, step: int, micro_step: int) -> None:
        """Dropout's randomness: a function of seed, step, micro-step and rank."""
        parts = (self.spec.seed, step, micro_step, self.accelerator.process_index)
        seed = 0
        for part in parts:  # a multiplicative hash, 63 bits
            seed = (seed * 6364136223846793005 + part + 1442695040888963407) % 2**63
        torch.manual_seed(seed)

    def _clip(self) -> float:
        limit = self.spec.grad_clip if self.spec.grad_clip is not None else math.inf
        return float(self.accelerator.clip_grad_norm_(self.model.parameters(), limit))

    def _check_first_loss(self, loss: float) -> None:
        expected = math.log(self.bare_model.config.vocab_size)
        if abs(loss - expected) > FIRST_LOSS_MARGIN:
            logger.warning(
                "the first loss is %.3f, but ln(vocabulary) is %.3f: fresh weights should know "
                "nothing; look at the initialisation and the labels",
                loss,
                expected,
            )

    def _report_divergence(self, step: int, loss: float, norm: float) -> None:
        norms = {
            name: None if parameter.grad is None else parameter.grad.norm().item()
            for name, parameter in self.bare_model.named_parameters()
        }
        first = step * self.batches.global_batch
        report = {
            "step": step + 1,
            "loss": loss,
            "grad_norm": norm,
            "rows": [first, first + self.batches.global_batch - 1],
            "grad_norms": norms,
        }
        if self.accelerator.is_main_process:
            (self.run_folder / DIVERGED).write_text(json.dumps(report, indent=2) + "\n")
        raise DivergedError(
            f"step {step + 1}: loss {loss}, gradient norm {norm}; the step was not taken, see "
            f"{self.run_folder / DIVERGED}. Go on from an older checkpoint with a lower "
            "train.learning_rate or train.grad_clip"
        )

    def _evaluate(self, console: Console | None) -> dict[str, float]:
        """Perplexity on the validation tokens, a sample, and the best checkpoint."""
        batches = ValidationBatches(
            self.data.validation,
            seq_len=self.config.data.seq_len,
            batch_size=self.spec.batch_size,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            max_tokens=self.spec.eval_max_tokens,
            reset_at_documents=self.config.data.reset_state_at_documents,
        )
        with self.accelerator.autocast():
            nll, targets = evaluate_batches(self.bare_model, batches)
        both = torch.tensor([nll, targets], dtype=torch.float64, device=self.accelerator.device)
        nll, targets = self._sum_over_processes(both).tolist()
        loss = nll / targets
        values = {
            "val/loss": loss,
            "val/perplexity": math.exp(loss),
            "val/bits_per_byte": nll / math.log(2) / batches.num_bytes,
        }
        if console is not None:
            console.say(
                f"step {self.progress.step}: validation loss {loss:.4f}, perplexity "
                f"{values['val/perplexity']:.2f}, {values['val/bits_per_byte']:.4f} bits per byte "
                f"({int(targets):,} tokens)"
            )
            for line in self._sample():
                console.say(line)
        if self.progress.best_loss is None or loss < self.progress.best_loss:
            self.progress.best_loss, self.progress.best_step = loss, self.progress.step
            self._save(self.run_folder / BEST, resumable=False)
        return values

    def _sample(self) -> Iterator[str]:
        if not self.spec.sample_tokens:
            return
        # its lengths vary: compiling it would cost more than it gives
        with self.accelerator.autocast(), torch.compiler.set_stance("force_eager"):
            text = sample_text(
                self.bare_model,
                self.data.tokenizer,
                self.spec.sample_prompt,
                max_new_tokens=self.spec.sample_tokens,
                seed=self.spec.seed,
            )
        for line in (self.spec.sample_prompt + text).splitlines():
            yield f"  | {line}"

    def _save(self, folder: Path, *, resumable: bool = True) -> None:
        save_checkpoint(
            folder,
            self.model,
            self.bare_model,
            self.optimizer.optimizer if resumable else None,
            self.progress,
            self.snapshot,
            main_process=self.accelerator.is_main_process,
        )
        if self.accelerator.is_main_process and folder.parent.name == CHECKPOINTS:
            prune_checkpoints(self.run_folder, self.spec.keep)
        self.accelerator.wait_for_everyone()

    def _log(
        self, values: dict[str, float], metrics: MetricsFile | None, console: Console | None
    ) -> None:
        if metrics is not None and console is not None:
            metrics.write(values)
            console.step(
                int(values["step"]),
                values["train/loss"],
                values["optim/lr"],
                values["perf/tokens_per_s"],
            )
        if self.spec.trackers:
            self.accelerator.log(values, step=int(values["step"]))
