"""The training loop. In each step: update -> evaluate -> sample -> log -> save.

Everything random is a function of (seed, step, micro-step, rank), so a run that goes on from a
checkpoint is the run that was never interrupted. A step is logged before it is saved: a checkpoint
then never knows of a step that metrics.jsonl lacks.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from retnet.checkpoints import Progress, Snapshot, save_checkpoint
from retnet.checkpoints.code import model_code
from retnet.checkpoints.format import BEST, CHECKPOINTS, FINAL, list_checkpoints, step_folder
from retnet.checkpoints.save import prune_checkpoints
from retnet.data import CarriedBatches, PreparedData, TrainingBatches
from retnet.errors import UserError
from retnet.files import write_json
from retnet.machine import peak_memory
from retnet.model.causal_lm import DecoderForCausalLM
from retnet.training.card import Trained, model_card
from retnet.training.carry import CarriedState
from retnet.training.health import DIVERGED, DivergedError, SpikeWatch, check_first_loss
from retnet.training.optimizer import learning_rate
from retnet.training.signals import StopRequest
from retnet.training.spec import Config
from retnet.training.trackers import log_text
from retnet.training.tracking import Console, MetricsFile
from retnet.training.validation import draw_sample, validate


@dataclass
class Trainer:
    """A run that is set up and ready to train."""

    config: Config
    accelerator: Accelerator
    model: nn.Module  # prepared by accelerate, as the optimizer
    bare_model: DecoderForCausalLM  # the transformers model inside
    optimizer: Any
    data: PreparedData
    batches: TrainingBatches | CarriedBatches
    progress: Progress
    carried: CarriedState | None  # None without train.carry_state

    def __post_init__(self) -> None:
        self.spec = self.config.train
        self.run_folder = self.spec.run_folder
        self.snapshot = Snapshot(self.data.tokenizer, self.data.record)
        exported = self.spec.export_code != "none"
        self.code = model_code(self.bare_model.config.model_type) if exported else None
        self._metrics: MetricsFile | None = None
        self._console: Console | None = None

    def run(self, stop: StopRequest) -> bool:
        """Train until ``max_steps`` or a request to stop.

        Returns whether the run is finished; if not, its newest checkpoint is the last completed
        step. A ``DivergedError`` where a loss or gradient is not finite, a ``UserError`` where the
        run folder can't be written any more.
        """
        if self.accelerator.is_main_process:
            done, total = self.progress.step, self.spec.max_steps
            with self._writing():
                self._metrics = MetricsFile(self.run_folder, done)
            self._console = Console(done=done, total=total, every=self.spec.log_every)
        try:
            return self._run(stop, SpikeWatch(self._metrics.losses if self._metrics else ()))
        finally:
            if self._metrics is not None and self._console is not None:
                self._metrics.close()
                self._console.close()

    def _run(self, stop: StopRequest, watch: SpikeWatch) -> bool:
        # a checkpoint that train.resume names may lie elsewhere: it is not saved here yet
        saved = self.progress.step if self.spec.resume == "auto" else 0
        while self.progress.step < self.spec.max_steps:
            values = self._step(self.progress.step, stop)
            if values is None:
                if self.progress.step > saved:
                    self._save(step_folder(self.run_folder, self.progress.step))
                return False
            self.progress.step += 1
            step, last = self.progress.step, self.progress.step == self.spec.max_steps
            watch.check(step, values["train/loss"])
            if step % self.spec.eval_every == 0 or last:
                values |= self._evaluate()
            self._log(values)
            if step % self.spec.save_every == 0 or last:
                self._save(step_folder(self.run_folder, step))
                saved = step
        self._save(self.run_folder / FINAL, resumable=False)
        return True

    def _step(self, step: int, stop: StopRequest) -> dict[str, float] | None:
        """One optimizer step; None, and nothing changed, when asked to stop on the way."""
        began = time.perf_counter()
        self.model.train()
        micro_steps = range(self.spec.gradient_accumulation_steps)
        # windows that hold nothing but documents' beginnings have none: their loss is 0
        number = max(1, self.batches.num_targets(step))
        targets = torch.tensor(number, device=self.accelerator.device)
        waited = time.perf_counter() - began
        loss = torch.zeros((), device=self.accelerator.device)
        for micro_step in micro_steps:
            if self._given_up(stop):
                return None
            asked = time.perf_counter()
            batch = self.batches.batch(step, micro_step)  # one at a time: there may be many
            waited += time.perf_counter() - asked
            self._seed(step, micro_step)
            last = micro_step == micro_steps[-1]
            # gradients are exchanged between processes once, with the last micro-batch
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss += self._backward(batch, micro_step, targets)
        loss_value = self.accelerator.reduce(loss, reduction="sum").item()
        norm = self._clip()
        if not (math.isfinite(loss_value) and math.isfinite(norm)):
            self._stop_diverged(step, loss_value, norm)
        if self._given_up(stop):
            return None
        rate = learning_rate(step + 1, self.spec)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["share"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.bare_model.after_step(step + 1, self.spec.seed)
        if self.carried is not None:
            self.carried.commit()
        seconds = time.perf_counter() - began
        self.progress.seconds += seconds
        if step == 0 and not self.config.model.init_from:
            check_first_loss(loss_value, self.bare_model.config.vocab_size)
        return {
            "step": step + 1,
            "train/loss": loss_value,
            "optim/lr": rate,
            "optim/grad_norm": norm,
            "data/epoch": self.batches.epoch(step + 1),
            "perf/tokens_per_s": self.batches.global_batch * self.config.data.seq_len / seconds,
            "perf/seconds": self.progress.seconds,
            "perf/data_wait_share": waited / seconds,
            "perf/peak_memory_bytes": peak_memory(self.accelerator.device),
        }

    def _backward(self, batch: dict[str, Tensor], micro_step: int, targets: Tensor) -> Tensor:
        """Add a micro-batch's gradients; returns its share of the step's loss."""
        inputs: dict[str, Any] = {k: v.to(self.accelerator.device) for k, v in batch.items()}
        cache = None if self.carried is None else self.carried.begin(micro_step)
        inputs |= {"past_key_values": cache, "num_items_in_batch": targets}
        loss = self.model(**inputs, return_logits=False, use_cache=False).loss
        # DDP averages over processes; the targets were counted over all of them
        self.accelerator.backward(loss * self.accelerator.num_processes)
        if self.carried is not None and cache is not None:
            self.carried.end(cache)
        return loss.detach()

    def _given_up(self, stop: StopRequest) -> bool:
        """Whether any process was asked to stop, as all must then; the gradients are gone."""
        asked = bool(stop)
        if self.accelerator.num_processes > 1:
            flag = torch.tensor(float(asked), device=self.accelerator.device)
            asked = self.accelerator.reduce(flag, reduction="sum").item() > 0
        if asked:
            self.optimizer.zero_grad()
        return asked

    def _seed(self, step: int, micro_step: int) -> None:
        """Dropout's randomness: a function of seed, step, micro-step and rank."""
        parts = (self.spec.seed, step, micro_step, self.accelerator.process_index)
        seed = 0
        for part in parts:  # a multiplicative hash, 63 bits
            seed = (seed * 6364136223846793005 + part + 1442695040888963407) % 2**63
        torch.manual_seed(seed)

    def _clip(self) -> float:
        """Limit the gradient's norm and return what it was; one not finite stays as it is."""
        parameters = list(self.model.parameters())
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        value = float(norm)
        if self.spec.grad_clip is not None and math.isfinite(value):
            clip_grads_with_norm_(parameters, self.spec.grad_clip, norm)
        return value

    def _stop_diverged(self, step: int, loss: float, norm: float) -> NoReturn:
        """Write what helps to find out why: the batch's rows, the gradient's norm by parameter."""
        first, file = step * self.batches.global_batch, self.run_folder / DIVERGED
        report = {
            "step": step + 1,
            "loss": loss,
            "grad_norm": norm,
            "epoch": self.batches.epoch(step),
            "rows": [first, first + self.batches.global_batch - 1],
            "window_starts": self.batches.window_starts(step),
            "grad_norms": {  # of a sharded model, every process has to ask for them
                name: None if parameter.grad is None else parameter.grad.norm().item()
                for name, parameter in self.bare_model.named_parameters()
            },
        }
        if self.accelerator.is_main_process:
            with self._writing():
                write_json(file, report, not_finite=str)
        raise DivergedError(
            f"step {step + 1}: loss {loss}, gradient norm {norm}; the step was not taken, see "
            f"{file}. Go on from an older checkpoint (train.resume) with a lower "
            "train.learning_rate or train.grad_clip"
        )

    def _evaluate(self) -> dict[str, float]:
        """Perplexity on the validation tokens, a sample, and the best checkpoint."""
        model, tokenizer = self.bare_model, self.data.tokenizer
        values, targets = validate(model, self.data.validation, self.config, self.accelerator)
        loss = values["val/loss"]
        if self._console is not None:
            self._console.say(
                f"step {self.progress.step}: validation loss {loss:.4f}, perplexity "
                f"{values['val/perplexity']:.2f}, {values['val/bits_per_byte']:.4f} bits per byte "
                f"({targets:,} tokens)"
            )
            sample = draw_sample(model, tokenizer, self.config, self.accelerator)
            for line in sample.splitlines():
                self._console.say(f"  | {line}")
            with self._writing():
                log_text(self.accelerator, "val/sample", sample, self.progress.step)
        if not math.isfinite(loss):  # after the last step no other loss would tell
            raise DivergedError(
                f"step {self.progress.step}: validation loss {loss}; its weights are not saved. "
                "Go on from an older checkpoint (train.resume) with a lower train.learning_rate"
            )
        if loss < (math.inf if self.progress.best_loss is None else self.progress.best_loss):
            self.progress.best_loss, self.progress.best_step = loss, self.progress.step
            self._save(self.run_folder / BEST, resumable=False)
        return values

    def _save(self, folder: Path, *, resumable: bool = True) -> None:
        carried = None
        if resumable and self.carried is not None:
            carried = self.carried.gather(self.accelerator)
        main_process = self.accelerator.is_main_process
        optimizer = self.optimizer.optimizer if resumable else None
        state = self.model, self.bare_model, optimizer, self.progress, self.snapshot
        last = folder.name == FINAL
        code = self.code if last or self.spec.export_code == "all" else None
        with self._writing():
            if self._metrics is not None:
                self._metrics.sync()
            save_checkpoint(
                folder, *state, carried=carried, code=code, main_process=main_process,
                card=self._card(self._metrics) if last and self._metrics is not None else None,
            )  # fmt: skip
            if main_process and folder.parent.name == CHECKPOINTS:
                prune_checkpoints(self.run_folder, self.spec.keep)
        self.accelerator.wait_for_everyone()

    def _card(self, metrics: MetricsFile) -> str:
        step, rows = self.progress.step, self.batches.global_batch
        trained = Trained(step, rows, self.batches.epoch(step), metrics.evaluation)
        exported = self.code is not None
        return model_card(self.config, self.bare_model, self.data, trained, code=exported)

    def _log(self, values: dict[str, float]) -> None:
        if self._metrics is not None and self._console is not None:
            with self._writing():
                self._metrics.write(values)
            self._console.step(values)
        if self.spec.trackers:
            step = int(values.pop("step"))  # which they have of their own
            with self._writing():
                self.accelerator.log(values, step=step)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn a failed write into the one line that says what is left and how to go on."""
        try:
            yield
        except OSError as error:
            left = "it has no checkpoint"
            for folder in list_checkpoints(self.run_folder)[-1:]:
                left = f"{CHECKPOINTS}/{folder.name} is the newest whole checkpoint"
            raise UserError(
                f"train.out_dir ({self.run_folder}) can't be written at step {self.progress.step} "
                f"({error.strerror or error}), {left}: make it writable and free space there, and "
                f"{self.spec.command_to_go_on} goes on"
            ) from error
