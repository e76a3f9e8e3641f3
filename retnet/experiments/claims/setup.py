"""What a claim is measured with: a recipe's model, a machine, rounds, a length of text."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from retnet.errors import UserError
from retnet.evaluation.costs import prepared_step
from retnet.evaluation.speed import (
    TOKENS_PER_ROUND,
    Timing,
    decoding,
    interleaved,
    read_context,
)
from retnet.experiments.claims.verdict import Figure, median
from retnet.generation import check_text_fits
from retnet.model.causal_lm import DecoderForCausalLM
from retnet.model.configuration import DecoderConfig
from retnet.training import load_config
from retnet.training.build import build_model, check_model_fits, model_config
from retnet.training.recipes import find_recipe, recipe_names

SIZE = "tiny"
CONTEXT = 8192  # of the paper's figures
LEAST_CONTEXT = 64
ROUNDS = 9
ROWS = 8  # the paper's largest batch

Prepare = Callable[[], Callable[[], object]]  # what ``interleaved`` takes


def recipe_of(size: str) -> str:
    """The recipe of ``--size``: a YAML file, or the name of one in configs/."""
    if Path(size).suffix or Path(size).is_file():
        return size
    if Path(size).name != size or find_recipe(size) is None:
        names = ", ".join(recipe_names())
        raise UserError(f"--size ({size}) must be a recipe of configs/ ({names}) or a YAML file")
    return f"configs/{size}.yaml"


@contextmanager
def _quiet() -> Iterator[None]:
    """No line of keys without a meaning: one recipe is taken for all mixers."""
    logger = logging.getLogger("retnet.training")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@dataclass(frozen=True)
class Setup:
    """Of the claims that need no training."""

    size: str = SIZE
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    dtype: torch.dtype = torch.float32
    rounds: int = ROUNDS
    context: int = CONTEXT

    def model(
        self, mixer: str, *keys: str, seed: int = 0, dtype: torch.dtype | None = None
    ) -> DecoderForCausalLM:
        """A fresh model of the size, in evaluation mode; ``keys``: more ``section.key=value``.

        A ``UserError`` where they make none, or one that is too large for this machine.
        """
        config = self._config(mixer, *keys)
        check_model_fits(config)
        torch.manual_seed(seed)
        model = build_model(config).to(dtype=dtype or self.dtype, device=self.device)  # type: ignore[call-arg]
        return model.eval()

    def _config(self, mixer: str, *keys: str) -> DecoderConfig:
        overrides = [f"model.mixer={mixer}", f"data.seq_len={self.context}", *keys]
        with _quiet():
            config = load_config(recipe_of(self.size), overrides)
        return model_config(config, config.data.vocab_size)

    def check(self) -> None:
        """Raise a ``UserError`` where the size is none, or the memory can't hold what is needed."""
        largest = self.model("attention")
        # every round reads a copy
        what = f"--context ({self.context:,}) with {ROWS} rows needs"
        check_text_fits(largest, 2 * (self.context + TOKENS_PER_ROUND), ROWS, what)
        self._config("retention")

    def describe(self) -> str:
        """The size in words."""
        config, dtype = self._config("retention"), str(self.dtype).removeprefix("torch.")
        with torch.device("meta"):
            model = build_model(config)
        return (
            f"{recipe_of(self.size)}: width {config.hidden_size}, {config.num_hidden_layers} "
            f"layers, {config.num_heads} heads, vocabulary {config.vocab_size:,}, "
            f"{model.num_parameters():,} parameters, {dtype}"
        )

    def time(self, prepares: Sequence[Prepare]) -> list[Timing]:
        """Pieces of work in turn."""
        return interleaved(prepares, self.device, rounds=self.rounds)

    def decoding(
        self, model: DecoderForCausalLM, context: int, rows: int = 1
    ) -> tuple[Prepare, int]:
        """A piece of work, some tokens after a context; and the bytes of what was kept of that."""
        cache, _ = read_context(model, context, rows, TOKENS_PER_ROUND)
        return decoding(model, cache, rows, TOKENS_PER_ROUND), cache.num_bytes()

    def training_exponent(
        self, model: DecoderForCausalLM, lengths: Sequence[int], mode: str | None = None
    ) -> Figure:
        """b, where a training step of one row of T tokens takes time in proportion to T^b."""
        steps = [prepared_step(model, 1, length, mode) for length in lengths]
        rounds = np.array([timing.seconds for timing in self.time(steps)])  # [lengths, rounds]
        return median([exponent(lengths, seconds) for seconds in rounds.T])

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of rows to train on: an eighth, a quarter, half of the context."""
        return tuple(max(1, self.context // part) for part in (8, 4, 2))


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """The slope of a straight line through the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def ratio(first: Timing, second: Timing) -> Figure:
    """How often the second fits into the first, round by round: they ran side by side."""
    pairs = zip(first.seconds, second.seconds, strict=True)
    return median([one / other for one, other in pairs])


def ms_per_token(timing: Timing) -> Figure:
    return median([1000 * seconds / TOKENS_PER_ROUND for seconds in timing.seconds])
