"""The network of another commit beside this one's: training steps and decode steps, side by side.

    python -m benchmarks.revisions COMMIT [--mixer retention] [--threads 2] [--rounds 15]

Both are loaded into one process from their retnet/model/ (which imports nothing else) and run in
turn, A B A B ...; ratios are this one's time over the other's, of medians and of pairs.
"""

import argparse
import importlib
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import Size
from retnet.cli import ArgumentParser, positive_int, run
from retnet.machine import keep_freed_memory, use_fast_products
from retnet.model import fast_decode

SIZE = Size(256, 4, 4, 4096)
TRAINING = ((4, 512), (1, 2048), (1, 8192))  # rows, tokens
DECODING = (1, 16)  # rows
TOKENS = 32
CLASSES = {
    "retention": ("RetNetForCausalLM", "RetNetConfig"),
    "attention": ("TransformerForCausalLM", "TransformerConfig"),
}


def load(commit: str | None, folder: Path) -> Any:
    """retnet/model of a commit, or as it lies here, as a package of its own."""
    name = f"model_{commit or 'here'}".replace("~", "_").replace("^", "_")
    packed = subprocess.run(
        ["git", "archive", commit or "HEAD", "retnet/model"], check=True, capture_output=True
    ).stdout
    target = folder / name
    if commit is None:
        target.symlink_to(Path(fast_decode.__file__).parents[1])
    else:
        with tarfile.open(fileobj=BytesIO(packed)) as archive:
            archive.extractall(folder / "unpacked", filter="data")
        (folder / "unpacked" / "retnet" / "model").rename(target)
    return importlib.import_module(name)


def make_model(package: Any, mixer: str) -> Any:
    kind, config = (getattr(package, name) for name in CLASSES[mixer])
    torch.manual_seed(0)
    sizes = vars(SIZE)
    return kind(config(**sizes))


def training_step(package: Any, model: Any, ids: torch.Tensor) -> Callable[[], None]:
    """Forward and backward pass; with what commits of before 2026-11-26 put around it."""
    try:
        products = importlib.import_module(f"{package.__name__}.products")
    except ModuleNotFoundError:
        products = None

    def step() -> None:
        with products.fast_products(ids.device) if products else nullcontext():
            loss = model.train()(
                ids, shift_labels=ids.roll(-1, 1), return_logits=False, use_cache=False
            ).loss
            loss.backward()
        model.zero_grad()

    return step


def decode_steps(package: Any, model: Any, rows: int) -> Callable[[], None]:
    """Some tokens after a short context, by the lean step.

    Commits of before 2026-11-26 took torch's switch for each product that wanted it; their steps
    run without it, as they did.
    """
    switch, before = torch.backends.mkldnn.matmul, torch.backends.mkldnn.matmul.fp32_precision
    name, model = package.__name__, model.eval()
    try:
        weights = importlib.import_module(f"{name}.fast_decode.weights")
        step, _ = importlib.import_module(f"{name}.fast_decode.step").make_decode_step(model)
    except ModuleNotFoundError:
        before = "none"
        weights = importlib.import_module(f"{name}.step_parts")
        step = importlib.import_module(f"{name}.step").DecodeStep(model)
    weights.lay_out_for_decoding(model)
    step = type(step)(model)
    cache = model.new_cache(4096)
    with torch.inference_mode():
        model(torch.zeros(rows, 128, dtype=torch.int64), past_key_values=cache, use_cache=True)

    @torch.inference_mode()
    def work() -> None:
        tokens = torch.zeros(rows, dtype=torch.int64)
        set_at_start, switch.fp32_precision = switch.fp32_precision, before
        for _ in range(TOKENS):
            tokens = step(tokens, cache).argmax(-1)
        switch.fp32_precision = set_at_start

    return work


def compare(case: str, mine: Callable[[], None], other: Callable[[], None], rounds: int) -> str:
    """One line of the table."""
    seconds: dict[str, list[float]] = {"mine": [], "other": []}
    for number in range(rounds + 2):
        pair = [("mine", mine), ("other", other)]
        for name, work in pair if number % 2 else reversed(pair):
            began = time.perf_counter()
            work()
            if number > 1:
                seconds[name].append(time.perf_counter() - began)
    ours, theirs = (1000 * statistics.median(own) for own in (seconds["mine"], seconds["other"]))
    pairs = (a / b for a, b in zip(seconds["mine"], seconds["other"], strict=True))
    return (
        f"{case:<28} {theirs:9.2f} {ours:9.2f} {ours / theirs:9.3f} {statistics.median(pairs):9.3f}"
    )


def main(argv: Sequence[str]) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser("benchmarks.revisions", description=__doc__, formatter_class=raw)
    parser.add_argument("commit", help="of the other network, as git names it")
    parser.add_argument("--mixer", choices=CLASSES, default="retention", help="(retention)")
    parser.add_argument("--threads", type=positive_int, default=2, help="of the CPU (2)")
    parser.add_argument("--rounds", type=positive_int, default=15, help="counted rounds (15)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    use_fast_products()
    print(f"{'ms, ' + arguments.mixer:<28} {'other':>9} {'here':>9} {'medians':>9} {'pairs':>9}")
    with tempfile.TemporaryDirectory() as folder:
        sys.path.insert(0, folder)
        packages = [load(None, Path(folder)), load(arguments.commit, Path(folder))]
        models = [make_model(package, arguments.mixer) for package in packages]
        for rows, length in TRAINING:
            ids = torch.randint(SIZE.vocab_size, (rows, length))
            works = [training_step(p, m, ids) for p, m in zip(packages, models, strict=True)]
            case = f"training step, {rows} x {length}"
            print(compare(case, *works, arguments.rounds), flush=True)
        for rows in DECODING:
            works = [decode_steps(p, m, rows) for p, m in zip(packages, models, strict=True)]
            case = f"{TOKENS} tokens, {rows} rows"
            print(compare(case, *works, arguments.rounds), flush=True)


if __name__ == "__main__":
    sys.exit(run(main))
