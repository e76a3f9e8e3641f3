"""Peak memory in a process for each cell, then times in turn; what takes too much is stopped."""

import gc
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.layer.mixing import CONTENDERS, Inputs, make_layer
from benchmarks.measure import LAYER, Piece, Plan, Results, measure
from retnet.errors import is_out_of_memory
from retnet.evaluation import Timing, interleaved
from retnet.evaluation.memory import peak_of
from retnet.machine import use_fast_products

PROGRAM = "benchmarks.single_layer"
# all that it imports; not itself, which each process runs again under a name of its own
IMPORTED = [__name__, "benchmarks.layer.report", "benchmarks.report"]
LEAST_RUNS = 3
RUN_S = 1.0  # seconds of one run above which there are fewer than asked for
TINY = 16  # tokens of the run before the one that is counted
START_S = 0.2  # of a process, for the estimate
TIME, MEMORY = "time", "memory"  # why a contender is stopped
PROJECTED = " + projections"


@dataclass(frozen=True)
class Setup:
    """What is measured.

    Attributes:
        device: Where.
        rows, width: B and d, of one head.
        lengths: T, ascending.
        contenders: Names in ``CONTENDERS``.
        projected: False, True or both: without and with projections.
        runs: Counted passes of each, where they take a second or less.
        limit_s: Seconds of one pass above which a contender is stopped.
        limit_bytes: Peak memory above which it is; None where none can be told.
        total_s: Seconds of all timed passes together, as far as ``LEAST_RUNS`` allow.
    """

    device: torch.device
    rows: int
    width: int
    lengths: tuple[int, ...]
    contenders: tuple[str, ...]
    projected: tuple[bool, ...]
    runs: int
    limit_s: float
    limit_bytes: int | None
    total_s: float


@dataclass(frozen=True)
class Cell:
    """One contender at one length.

    Attributes:
        contender, projected, length: Which.
        first_s: Seconds of the first pass, in the process whose memory was measured.
        num_bytes: Peak above what the inputs and weights take.
        stopped: "time" or "memory" where it would have taken too much; empty where it is measured.
        timing: Of the counted passes.
    """

    contender: str
    projected: bool
    length: int
    first_s: float | None = None
    num_bytes: int | None = None
    stopped: str = ""
    timing: Timing | None = None

    @property
    def label(self) -> str:
        return self.contender + (PROJECTED if self.projected else "")

    @property
    def mean(self) -> float:
        """Seconds."""
        assert self.timing is not None
        return float(np.mean(self.timing.seconds))

    @property
    def deviation(self) -> float | None:
        """Standard deviation of one run, in seconds; None of a single run."""
        assert self.timing is not None
        seconds = self.timing.seconds
        return float(np.std(seconds, ddof=1)) if len(seconds) > 1 else None


def first_passes(setup: Setup) -> Iterator[Cell]:
    """Each contender once at each length, the shorter ones first; or why it is stopped."""
    last: dict[tuple[str, bool], Cell] = {}
    cells = [Cell(name, own, 0) for name in setup.contenders for own in setup.projected]
    bar = tqdm(total=len(cells) * sum(setup.lengths), desc="memory", disable=None, leave=False)
    with bar:
        for length in setup.lengths:
            for cell in cells:
                key = cell.contender, cell.projected
                cell = replace(cell, length=length)
                stopped = "" if key not in last else _too_much(last[key], length, setup)
                last[key] = replace(cell, stopped=stopped) if stopped else _first(cell, setup)
                bar.update(length)
                yield last[key]
            left = first_passes_left(list(last.values()), setup)
            text = f"memory: {length:,} tokens done; about {_shown(left)} left of this part, "
            text += f"then about {_shown(setup.total_s)} of timed runs, or less"
            print(text, file=sys.stderr, flush=True)


def _too_much(before: Cell, length: int, setup: Setup) -> str:
    """Why it is stopped at this length: it was, or would take too much if costs were quadratic."""
    if before.stopped:
        return before.stopped
    assert before.first_s is not None and before.num_bytes is not None
    growth = (length / before.length) ** 2
    if growth * before.first_s > setup.limit_s:
        return TIME
    limit = setup.limit_bytes
    return MEMORY if limit is not None and growth * before.num_bytes > limit else ""


def _first(cell: Cell, setup: Setup) -> Cell:
    try:
        if setup.device.type == "cuda":  # torch keeps books there
            seconds, num_bytes = first_pass(cell, setup)
        else:
            seconds, num_bytes = _in_own_process(cell, setup)
    except BrokenProcessPool:  # the system has ended it
        return replace(cell, stopped=MEMORY)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return replace(cell, stopped=MEMORY)
    if seconds > setup.limit_s:
        return replace(cell, stopped=TIME)
    if setup.limit_bytes is not None and num_bytes > setup.limit_bytes:
        return replace(cell, stopped=MEMORY)
    return replace(cell, first_s=seconds, num_bytes=num_bytes)


def _in_own_process(cell: Cell, setup: Setup) -> tuple[float, int]:
    """``first_pass`` in a new process, forked from one that has only imported what it needs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    threads = torch.get_num_threads()
    with ProcessPoolExecutor(1, context, _set_up, (threads,)) as pool:
        return pool.submit(first_pass, cell, setup).result()


def _set_up(threads: int) -> None:
    gc.freeze()  # a collection need not look at, and so copy, what all these processes share
    torch.set_num_threads(threads)
    use_fast_products()  # as in the process that started this one


def first_pass(cell: Cell, setup: Setup) -> tuple[float, int]:
    """Seconds and bytes of one pass, to be called once in a process."""
    contender, device = CONTENDERS[cell.contender], setup.device
    timings: list[Timing] = []

    def passing(rows: int, length: int) -> Callable[[], None]:
        inputs = Inputs.draw(rows, length, setup.width, device)
        forward = make_layer(contender, inputs, cell.projected)
        return lambda: timings.extend(interleaved([lambda: forward], device, rounds=1, warmup=0))

    # a tiny pass first: libraries are loaded and threads have their stacks before the count begins
    passing(1, min(TINY, cell.length))()
    num_bytes = peak_of(passing(setup.rows, cell.length), device)
    return timings[1].median, num_bytes


def first_passes_left(last: Sequence[Cell], setup: Setup) -> float:
    """Seconds that the longer lengths will take, if each grows as its law says."""
    left = 0.0
    for cell in last:
        law = CONTENDERS[cell.contender]
        done = law.operations(cell.length, setup.width, cell.projected)
        for length in setup.lengths:
            if length <= cell.length or cell.first_s is None:
                continue
            own = cell.first_s * law.operations(length, setup.width, cell.projected) / done
            left += START_S + min(own, setup.limit_s)
    return left


def numbers_of_runs(firsts: Sequence[float], runs: int, total_s: float) -> list[int]:
    """How often each is run: as often as asked, less where that takes more than its share.

    The share, of each cell the same, is as many seconds as runs were asked for (so what takes more
    than a second is run less often), or less, so that all take ``total_s`` with their warm-up. But
    each is run ``LEAST_RUNS`` times, and may have a quarter of ``total_s`` over all cells even if
    those that take long leave nothing.
    """

    def counts(share: float) -> list[int]:
        return [min(runs, max(LEAST_RUNS, int(share / max(own, 1e-9)))) for own in firsts]

    def total(share: float) -> float:
        return sum((n + 1) * own for n, own in zip(counts(share), firsts, strict=True))

    high = runs * RUN_S
    low = min(high, total_s / 4 / len(firsts))
    if total(high) <= total_s:
        return counts(high)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if total(middle) <= total_s else (low, middle)
    return counts(low)


def timed(cells: Sequence[Cell], setup: Setup) -> list[Cell]:
    """The cells with their timings; those of one length run in turn."""
    running = [cell for cell in cells if not cell.stopped]
    firsts = [cell.first_s or 0.0 for cell in running]
    counts = dict(zip(running, numbers_of_runs(firsts, setup.runs, setup.total_s), strict=True))
    seconds = {cell: (n + 1) * (cell.first_s or 0.0) for cell, n in counts.items()}
    least, most = min(counts.values()), max(counts.values())
    text = f"times: {len(running)} contenders and lengths, {least} to {most} runs of each, "
    print(f"{text}about {_shown(sum(seconds.values()))}", file=sys.stderr, flush=True)
    plan, results = Plan(setup.device, torch.float32, setup.runs), Results()
    for length in setup.lengths:
        own = [cell for cell in running if cell.length == length]
        if not own:
            continue
        inputs = Inputs.draw(setup.rows, length, setup.width, setup.device)
        pieces = [_piece(cell, inputs) for cell in own]
        measure(LAYER, pieces, plan, results, [counts[cell] for cell in own])
        left = sum(value for cell, value in seconds.items() if cell.length > length)
        print(f"times: about {_shown(left)} left", file=sys.stderr, flush=True)
    found = {(one.case, one.contender): one.timing for one in results.measurements}
    return [replace(one, timing=found.get((case_of(one.length), one.label))) for one in cells]


def case_of(length: int) -> str:
    return f"{length:,} tokens"


def _piece(cell: Cell, inputs: Inputs) -> Piece:
    forward = make_layer(CONTENDERS[cell.contender], inputs, cell.projected)
    tokens = inputs.hidden.shape[0] * cell.length
    return Piece(case_of(cell.length), cell.label, tokens, lambda: forward)


def _shown(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
