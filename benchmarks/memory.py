"""Peak memory of a training step, each in a process of its own.

    python -m benchmarks.memory CONTENDER ROWS LENGTH --size WIDTH LAYERS HEADS VOCABULARY ...

What is counted, ``retnet.evaluation.memory`` says.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence

import torch

from benchmarks.contenders import Contender, Field, Llama, Size, add_ours, make_llama
from benchmarks.measure import Peak, Plan, Results, random_ids
from benchmarks.others import add_others
from retnet.evaluation.memory import peak_of as peak_memory
from retnet.machine import keep_freed_memory, use_fast_products

CONTENDERS = ("RetNet", "Transformer", "Llama", "torchscale chunkwise")


def memory_case(rows: int, length: int) -> str:
    return f"peak of a training step, {rows} x {length} tokens"


def memory(plan: Plan, results: Results) -> None:
    """The same number of tokens in rows of the short and of the long length."""
    for length in (plan.train_short, plan.train_long):
        rows = plan.train_long // length
        for name in CONTENDERS:
            num_bytes = _in_own_process(name, rows, length, plan)
            if num_bytes is None:
                results.absent[name] = "its package is absent"
            else:
                results.peaks.append(Peak(memory_case(rows, length), name, num_bytes))
        print(f"memory: {rows} x {length} done", file=sys.stderr, flush=True)


def _in_own_process(name: str, rows: int, length: int, plan: Plan) -> int | None:
    size = [str(number) for number in vars(plan.size).values()]
    dtype = str(plan.dtype).removeprefix("torch.")
    options = ["--size", *size, "--device", str(plan.device), "--dtype", dtype]
    threads = ["--threads", str(torch.get_num_threads())]
    keep = ["--keep-memory"] if plan.keep_memory else []
    command = [sys.executable, "-m", "benchmarks.memory", name, str(rows), str(length)]
    output = subprocess.run(
        [*command, *options, *threads, *keep], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    last = output.split()[-1]
    return None if last == "absent" else int(last)


def _contender(name: str, size: Size, field: Field) -> Contender | None:
    add_ours(field, size)
    field.add(Llama("Llama", make_llama(size)))
    add_others(field, size, forms=True)
    return next((one for one in field.contenders if one.name == name), None)


def peak_of(name: str, rows: int, length: int, plan: Plan) -> int | None:
    """Bytes of one training step, to be called once in a process; None for an absent contender."""
    contender = _contender(name, plan.size, Field(plan.device, plan.dtype))
    if contender is None:
        return None
    ids = random_ids(rows, length, plan, plan.size)
    # a tiny step first: libraries are loaded and threads have their stacks before the count begins
    contender.training_step(ids[:1, :16], ids[:1, :16])()()
    return peak_memory(contender.training_step(ids, ids)(), plan.device)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("benchmarks.memory", description=__doc__)
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("rows", type=int)
    parser.add_argument("length", type=int)
    parser.add_argument("--size", nargs=4, type=int, required=True)
    parser.add_argument("--device", type=torch.device, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--keep-memory", action="store_true")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    use_fast_products()  # as in the process that started this one
    if arguments.keep_memory:
        keep_freed_memory()
    plan = Plan(arguments.device, getattr(torch, arguments.dtype), size=Size(*arguments.size))
    num_bytes = peak_of(arguments.contender, arguments.rows, arguments.length, plan)
    print("absent" if num_bytes is None else num_bytes)


if __name__ == "__main__":
    main(sys.argv[1:])
