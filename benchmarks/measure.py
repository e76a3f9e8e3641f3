"""Measured groups: pieces of work that ran in turn, and how to find and compare them."""

import gc
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from benchmarks.contenders import Field, Prepare, Size
from retnet.evaluation import Timing, interleaved

TRAIN, PREFILL, DECODE, MEMORY, FORMS = "train", "prefill", "decode", "memory", "forms"
FAMILY, STEPS, LAYER = "family", "steps", "layer"
LLAMA, UTILISATION = "llama", "utilisation"
LIMIT = "limit"  # the contender that nobody beats
MATMULS = "products by torch.mm"
SLOW_S = 10  # seconds of a contender's call above which it is named at once


@dataclass(frozen=True)
class Plan:
    """What is measured, on what, how often.

    Attributes:
        device, dtype: Of the models.
        rounds: Counted rounds, after one that is not.
        compiled: Whether compiled contenders take part.
        size: Of the models.
        large: Of the model whose decoding is limited by the memory's bandwidth.
        step_tokens: In a training step; more where a row is longer.
        train_lengths: T, every contender that can.
        train_short, train_long: T of the two training steps of the RetNet whose cost per token, and
            whose memory, are compared.
        prefill_lengths: T, every contender that can.
        prefill_short, prefill_long: The same for prefill.
        contexts: Tokens before the first that is decoded: for all contenders; for all that need not
            read token by token; for the RetNet.
        family_contexts: Tokens before the first that is decoded, for every mixer.
        family_positions: T_max of those whose positions are weights.
        batch: Rows of the larger batch.
        tokens: Made in a round of decoding.
        loop_tokens: Made in a round of whole loops.
        llama_sizes: Of the models beside llama.cpp, growing.
        llama_contexts: Tokens before the first that is decoded, growing, of one row; the first also
            of many, the second of the first number of these.
        llama_batches: Numbers of rows, growing.
        keep_memory: Whether the C library keeps freed memory, as it does in train.py.
        form_widths, form_chunks, form_lengths: K of a head, C and T of the forms that are compared;
            V = 2 K.
    """

    device: torch.device
    dtype: torch.dtype
    rounds: int = 5
    compiled: bool = True
    size: Size = field(default_factory=Size)
    large: Size = field(default_factory=lambda: Size(1024, 12, 4, 4096))
    step_tokens: int = 2048
    train_lengths: tuple[int, ...] = (128, 512, 2048, 8192)
    train_short: int = 2048
    train_long: int = 16384
    prefill_lengths: tuple[int, ...] = (2048, 8192)
    prefill_short: int = 2048
    prefill_long: int = 65536
    contexts: tuple[int, int, int] = (128, 8192, 65536)
    family_contexts: tuple[int, int] = (128, 4096)
    family_positions: int = 8192
    batch: int = 16
    tokens: int = 16
    loop_tokens: int = 200  # generate.py's default
    llama_sizes: tuple[Size, ...] = (
        Size(256, 4, 4, 4096),
        Size(512, 8, 8, 4096),
        Size(1024, 12, 8, 4096),
    )
    llama_contexts: tuple[int, int, int] = (128, 4096, 8192)
    llama_batches: tuple[int, ...] = (16, 64)
    keep_memory: bool = True
    form_widths: tuple[int, ...] = (64, 128, 256)
    form_chunks: tuple[int, ...] = (32, 64, 128, 256)
    form_lengths: tuple[int, ...] = (64, 128, 256, 512)

    def quick(self) -> "Plan":
        """The same benchmarks at sizes that say nothing about speed, to see that they work."""
        small = Size(32, 1, 2, 320)
        return Plan(
            self.device, self.dtype, 1, self.compiled, small, small,
            step_tokens=32, train_lengths=(8, 16, 32, 64), train_short=32, train_long=64,
            prefill_lengths=(16, 32), prefill_short=16, prefill_long=32, contexts=(4, 8, 16),
            family_contexts=(4, 8), family_positions=64, batch=2, tokens=2, loop_tokens=2,
            llama_sizes=(small,), llama_contexts=(4, 8, 300), llama_batches=(2, 3),
            keep_memory=self.keep_memory, form_widths=(4,),
            form_chunks=(4, 8), form_lengths=(8, 16),
        )  # fmt: skip


@dataclass(frozen=True)
class Measurement:
    """One contender in one case.

    Attributes:
        benchmark: "train", "prefill", "decode", "llama", "forms", "family", "steps" or "layer".
        case: What was done, the same for all contenders of a group.
        contender: Who.
        tokens: In each call; for a batch, of all rows.
        timing: Seconds of each call.
    """

    benchmark: str
    case: str
    contender: str
    tokens: int
    timing: Timing

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.timing.median


@dataclass(frozen=True)
class Peak:
    """Memory that a training step takes at its peak, above what the process had before.

    Attributes:
        case: As in ``Measurement``.
        contender: Who.
        num_bytes: Activations, gradients, workspaces.
    """

    case: str
    contender: str
    num_bytes: int


@dataclass
class Results:
    """Everything that one run has found out.

    Attributes:
        measurements: In the order they were made; contenders of a case are neighbours.
        peaks: Of memory.
        absent: Contender -> why it was not measured.
        parameters: Size -> contender -> number of parameters.
        facts: Name -> number that is no time, such as the bytes behind a limit.
    """

    measurements: list[Measurement] = field(default_factory=list)
    peaks: list[Peak] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, dict[str, int]] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)

    def find(self, benchmark: str, case: str, contender: str) -> Measurement | None:
        """One measurement, or None where there is none."""
        for one in self.measurements:
            if (one.benchmark, one.case, one.contender) == (benchmark, case, contender):
                return one
        return None

    def speedup(self, fast: Measurement | None, slow: Measurement | None) -> float | None:
        """Tokens per second of the one over those of the other, by rounds side by side."""
        if fast is None or slow is None:
            return None
        return slow.timing.ratio(fast.timing) * fast.tokens / slow.tokens

    def peak(self, case: str, contender: str) -> Peak | None:
        for one in self.peaks:
            if (one.case, one.contender) == (case, contender):
                return one
        return None

    def groups(self, benchmark: str) -> Iterator[tuple[str, list[Measurement]]]:
        """The cases of a benchmark with their measurements."""
        own = [one for one in self.measurements if one.benchmark == benchmark]
        for case in dict.fromkeys(one.case for one in own):
            yield case, [one for one in own if one.case == case]

    def note_field(self, size: Size, field: Field) -> None:
        """Remember who took part, with how many parameters, and who did not."""
        counts = {one.name: one.num_parameters for one in field.contenders}
        self.parameters.setdefault(str(size), {}).update(counts)
        self.absent.update(field.absent)


@dataclass(frozen=True)
class Piece:
    """One entry of a group: a contender's work in a case, ``tokens`` of them at each call."""

    case: str
    contender: str
    tokens: int
    prepare: Prepare


def measure(
    benchmark: str,
    pieces: Sequence[Piece],
    plan: Plan,
    results: Results,
    rounds: Sequence[int] | None = None,
) -> None:
    """Run a group in turn, A B A B ..., and add what comes out.

    rounds: Of each piece; those of the plan when None.
    """
    gc.collect()
    rounds = rounds or [plan.rounds] * len(pieces)
    total = sum(rounds) + len(pieces)
    bar = tqdm(total=total, desc=pieces[0].case, disable=None, leave=False)
    began: list[tuple[str, float]] = []
    said_of: set[str] = set()

    def say_if_slow() -> None:
        for name, start in began:
            seconds = time.perf_counter() - start
            if seconds > SLOW_S and name not in said_of:
                said_of.add(name)
                said = f"{benchmark}: {pieces[0].case}, {name}: one call in {seconds:.0f} s"
                print(said, file=sys.stderr, flush=True)
        began.clear()

    def counted(piece: Piece) -> Prepare:
        def prepare_and_count():
            say_if_slow()
            bar.update()
            bar.set_postfix_str(piece.contender, refresh=False)
            began.append((piece.contender, time.perf_counter()))
            return piece.prepare()

        return prepare_and_count

    with bar:
        timings = interleaved([counted(one) for one in pieces], plan.device, rounds=rounds)
    say_if_slow()
    for piece, timing in zip(pieces, timings, strict=True):
        results.measurements.append(
            Measurement(benchmark, piece.case, piece.contender, piece.tokens, timing)
        )
    print(f"{benchmark}: {pieces[0].case} done", file=sys.stderr, flush=True)


def random_ids(rows: int, length: int, plan: Plan, size: Size) -> torch.Tensor:
    """The same random tokens [B, T] for everybody."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(size.vocab_size, (rows, length), generator=generator)
    return ids.to(plan.device)
