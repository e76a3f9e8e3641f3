"""Training on rows that are made as they are needed, and the accuracy of the answers.

No row is seen twice, so what a model answers right while it trains is what it can do: a run that
has answered nearly everything for a while is ended there. On the CPU, in float32.
"""

import hashlib
import json
import logging
import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from retnet.errors import UserError, os_errors
from retnet.experiments.contenders import Contender
from retnet.experiments.recall.tasks import Batch, Task
from retnet.files import read_json, write_json
from retnet.generation import evaluation_mode
from retnet.model.causal_lm import DecoderForCausalLM
from retnet.model.configuration import DecoderConfig
from retnet.model.loss import IGNORE_INDEX
from retnet.terminal import harmless
from retnet.training import Config, load_config
from retnet.training.build import build_model, check_model_fits, model_config
from retnet.training.optimizer import build_optimizer, learning_rate
from retnet.training.spec import mixer_keys

logger = logging.getLogger(__name__)

VERSION = 1  # of what a run computes; results of others are not reused
# of models; with aft's own rank its tables of positions leave nothing to the rest of them
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 2, "aft_rank": 8}
# keys of train that mean something here, beside those that options set
TRAIN_KEYS = (
    "optimizer", "adamw_learning_rate", "schedule", "decay_fraction", "warmup_steps",
    "final_learning_rate", "weight_decay", "beta1", "beta2", "grad_clip",
)  # fmt: skip
RESULT = "result.json"
SOLVED = 0.995  # of the answers of the last ``LAST`` steps: training ends
LAST = 20
TEST_ROWS = 512  # of each count
ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Cell:
    """Answers to questions at a distance of ``distance / 2 + 1`` to ``distance`` tokens."""

    count: int
    distance: int
    right: int
    asked: int


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        steps: Steps taken, fewer than asked for where the task was solved before.
        seconds: Of training.
        loss: Nats per answer in the last steps; None where it was not finite, which ends a run.
        cells: What it answers on rows made with another seed.
    """

    parameters: int
    steps: int
    seconds: float
    loss: float | None
    cells: tuple[Cell, ...]

    @property
    def accuracy(self) -> float:
        """Share of right answers, each count's the same weight."""
        counts = {cell.count for cell in self.cells}
        return sum(share(self.cells, count=count) for count in counts) / len(counts)


def share(cells: Sequence[Cell], **only: int) -> float:
    """Right answers of those asked, nan where there are none, of the cells with these values."""
    own = [c for c in cells if all(getattr(c, key) == value for key, value in only.items())]
    asked = sum(cell.asked for cell in own)
    return sum(cell.right for cell in own) / asked if asked else math.nan


@dataclass(frozen=True)
class Run:
    """A run that can be begun."""

    task: Task
    contender: Contender
    config: Config
    model: DecoderConfig
    out: Path

    @property
    def settings(self) -> dict[str, Any]:
        """All that determines the result, as JSON has it."""
        train = vars(self.config.train)
        names = (*TRAIN_KEYS, "learning_rate", "max_steps", "seed")
        task = {"name": self.task.name, **asdict(self.task)}
        del task["steps"]  # of all runs it is max_steps
        found = {
            "version": VERSION,
            "task": task,
            "model": asdict(self.config.model),
            "train": {name: train[name] for name in names},
            "solved": [SOLVED, LAST],
            "test_rows": TEST_ROWS,
        }
        return json.loads(json.dumps(found))

    @property
    def folder(self) -> Path:
        """Named by the task, who and which rate and seed, and a hash of all settings."""
        train = self.config.train
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()
        name = (self.task.name, self.contender.name, f"{train.peak:g}", train.seed, digest[:8])
        return self.out / "-".join(map(str, name))

    def finished(self) -> Outcome | None:
        """The result of a run with the same settings, where there is one.

        A ``UserError`` where its file can't be read.
        """
        file, fix = self.folder / RESULT, "remove that folder to train the run again"
        if not file.exists():
            return None
        content = read_json(file, fix)
        if content.get("settings") != self.settings:
            raise UserError(f"{file}: settings are not those that its folder is named by: {fix}")
        try:
            result = content["result"]
            cells = tuple(Cell(**cell) for cell in result.pop("cells"))
            return Outcome(**result, cells=cells)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file} holds no result: {fix}") from error

    def __call__(self) -> Outcome:
        """Train, measure, and write the result."""
        outcome = train(self.task, self.model, self.config, self.folder.name)
        with os_errors(f"--out ({self.out}) cannot be written", "name another folder"):
            self.folder.mkdir(parents=True, exist_ok=True)
            result = asdict(outcome)
            write_json(self.folder / RESULT, {"settings": self.settings, "result": result})
        return outcome


def planned(
    task: Task, contender: Contender, overrides: Sequence[str], rate: str, seed: int, out: Path
) -> Run:
    """A run with this rate and seed; a ``UserError`` where the keys make none."""
    task.check()
    means = mixer_keys(contender.mixer)
    sizes = [f"model.{key}={value}" for key, value in SIZES.items() if key in means]
    own = [f"train.learning_rate={rate}", f"train.max_steps={task.steps}", f"train.seed={seed}"]
    own += [f"data.seq_len={task.length}"]
    warmup = f"train.warmup_steps={task.steps // 10}"
    keys = [*sizes, warmup, *overrides, *contender.keys, *own]
    config = load_config(None, keys)
    model = model_config(config, task.vocab_size)
    check_model_fits(model)
    return Run(task, contender, config, model, out)


def generators(seed: int) -> tuple[Generator, Generator]:
    """Those of the rows that a run trains on, and of the rows that it is measured on."""
    return Generator().manual_seed(2 * seed), Generator().manual_seed(2 * seed + 1)


def train(task: Task, model_config: DecoderConfig, config: Config, title: str) -> Outcome:
    """Train a fresh model and measure it; ``title`` is that of a progress bar on a terminal."""
    spec, (rows, test_rows) = config.train, generators(config.train.seed)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(spec.seed)  # of weights and dropout
        model = build_model(model_config).train()
        optimizer, began = build_optimizer(model, spec), time.perf_counter()
        last: deque[tuple[float, int, int]] = deque(maxlen=LAST)
        bar = tqdm(total=spec.max_steps, desc=harmless(title), leave=False, disable=None)
        with bar:
            for step in range(1, spec.max_steps + 1):
                last.append(_step(model, optimizer, task.batch(task.rows, rows), config, step))
                bar.update()
                right, asked = (sum(column) for column in list(zip(*last, strict=True))[1:])
                if not math.isfinite(last[-1][0]) or (
                    len(last) == LAST and right >= SOLVED * asked
                ):
                    break
        seconds = time.perf_counter() - began
        cells = measure(model, task, test_rows)
    loss = sum(one for one, _, _ in last) / len(last)
    size = sum(parameter.numel() for parameter in model.parameters())
    return Outcome(size, step, seconds, loss if math.isfinite(loss) else None, tuple(cells))


def _step(
    model: DecoderForCausalLM,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    config: Config,
    step: int,
) -> tuple[float, int, int]:
    """One step; the loss per answer before it, right answers, and how many were asked for."""
    spec, asked = config.train, batch.targets != IGNORE_INDEX
    hidden = model.model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    logits, answers = model.lm_head(hidden[asked]), batch.targets[asked]
    loss = F.cross_entropy(logits, answers)
    loss.backward()
    if spec.grad_clip is not None:
        clip_grad_norm_(model.parameters(), spec.grad_clip)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, spec) * group["share"]
    optimizer.step()
    optimizer.zero_grad()
    model.after_step(step, spec.seed)
    return loss.item(), int((logits.argmax(1) == answers).sum()), len(answers)


def measure(model: DecoderForCausalLM, task: Task, random: Generator) -> list[Cell]:
    """Right answers by count and distance, on ``TEST_ROWS`` rows of each count."""
    found: dict[tuple[int, int], list[int]] = {}
    with evaluation_mode(model), torch.inference_mode():
        for count in task.counts:
            for _ in range(TEST_ROWS // ROWS_AT_ONCE):
                batch = task.sample(ROWS_AT_ONCE, count, random)
                asked = batch.targets != IGNORE_INDEX
                right = model(input_ids=batch.input_ids).logits.argmax(2) == batch.targets
                ends = up_to(batch.distances[asked])
                for end in ends.unique().tolist():
                    cell = found.setdefault((count, end), [0, 0])
                    cell[0] += int(right[asked][ends == end].sum())
                    cell[1] += int((ends == end).sum())
    return [Cell(*key, *values) for key, values in sorted(found.items())]


def up_to(distances: torch.Tensor) -> torch.Tensor:
    """The smallest powers of two, at least 2, that the distances do not pass. int64."""
    exponents = torch.arange(1, 63)
    return 2 ** exponents[torch.searchsorted(2**exponents, distances)]
