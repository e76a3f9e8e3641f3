"""How much memory a piece of work takes at its peak.

On a GPU: what torch's allocator held at most, less what it held before. On the CPU, where torch
keeps no books: how far the process's largest resident size rises over what it was just before.
That counts everything, freed memory that the C library keeps included, and nothing from before.

    python -m retnet.evaluation.memory RUN training 256 512 --device cpu --dtype float32 --threads 2

prints as JSON what training steps of one row take, the shorter rows first; with ``generating`` what
reading prompts of one row and making a few tokens does.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import torch

from retnet.evaluation.loading import load_contender
from retnet.evaluation.speed import generating
from retnet.machine import largest_resident_size, use_fast_products
from retnet.model.causal_lm import DecoderForCausalLM

logger = logging.getLogger("retnet.evaluation.memory")  # __name__ is __main__ in a command

PACKAGES = Path(__file__).parents[2]  # the folder that this package lies in


def peak_of(work: Callable[[], object], device: torch.device) -> int:
    """Bytes that a piece of work takes above what there was before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    before = largest_resident_size()
    work()
    return largest_resident_size() - before


def training_step(
    model: DecoderForCausalLM, rows: int, length: int, mode: str | None = None
) -> Callable[[], object]:
    """Forward and backward pass on random tokens; the gradients are dropped afterwards.

    ``mode``: the mixer's form; None: the one that it would take.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (rows, length), generator=generator)
    ids = ids.to(model.device)
    form = {} if mode is None else {"mode": mode}

    def work() -> None:
        loss = model(ids, labels=ids, return_logits=False, use_cache=False, **form).loss
        loss.backward()
        for parameter in model.parameters():
            parameter.grad = None

    return work


WORKS: dict[str, Callable[[DecoderForCausalLM, int], Callable[[], object]]] = {
    "training": lambda model, length: training_step(model, 1, length),
    "generating": generating,
}


def measured_peaks(
    work: str,
    path: Path,
    lengths: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
) -> list[int]:
    """The peak of work on one row of each length, ascending, in a process of its own.

    Nothing, and a warning, where that process fails: it may have been ended for its memory.

    Args:
        work: One of ``WORKS``.
    """
    # -P: what lies in the current folder, of which nothing is known, is no module
    command = [sys.executable, "-P", "-m", "retnet.evaluation.memory", str(path), work]
    options = ["--device", str(device), "--dtype", str(dtype).removeprefix("torch.")]
    options += ["--trust-remote-code"] if trust_remote_code else []
    options += ["--threads", str(torch.get_num_threads())]
    places = [str(PACKAGES), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [*command, *map(str, lengths), *options],
        capture_output=True, check=False, encoding="utf-8", errors="replace",
        env=os.environ | {"PYTHONPATH": os.pathsep.join(places)},
    )  # fmt: skip
    if done.returncode == 0:
        found: list[int] = json.loads(done.stdout)
        return found
    said = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
    reason = f"signal {-done.returncode}" if done.returncode < 0 else said[0]
    logger.warning(f"the memory of {work} {path} was not measured: its process failed ({reason})")
    return []


def peaks(work: str, model: DecoderForCausalLM, lengths: Sequence[int]) -> list[int]:
    """Those of work on one row; to be called once in a process, the lengths ascending."""
    # a tiny one first: libraries are loaded and threads have their stacks before the count begins
    WORKS[work](model, min(16, *lengths))()
    rises = [peak_of(WORKS[work](model, length), model.device) for length in lengths]
    # on the CPU, each is counted from the largest of those before
    return rises if model.device.type == "cuda" else list(accumulate(rises))


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("retnet.evaluation.memory", description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("work", choices=WORKS)
    parser.add_argument("lengths", type=int, nargs="+")
    parser.add_argument("--device", type=torch.device, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--trust-remote-code", action="store_true")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    use_fast_products()  # as in the process that started this one
    dtype = getattr(torch, arguments.dtype)
    model = load_contender(
        arguments.checkpoint, device=arguments.device, dtype=dtype,
        trust_remote_code=arguments.trust_remote_code,
    ).model  # fmt: skip
    print(json.dumps(peaks(arguments.work, model, arguments.lengths)))


if __name__ == "__main__":
    main(sys.argv[1:])
