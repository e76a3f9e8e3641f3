"""What this repository set out to reach, row by row, and whether a run reached it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.against_llama import PAIRS, llama_case
from benchmarks.against_llama import PLAIN as RETNET
from benchmarks.contenders import COMPILED
from benchmarks.decoding import (
    BARE,
    GENERATE,
    LOOP,
    LOOP_CASE,
    batch_case,
    context_case,
    large_case,
)
from benchmarks.decoding import long_case as after_case
from benchmarks.family import DECODING, FAMILY_BOUNDS, PLAIN, TRAINING
from benchmarks.measure import (
    DECODE,
    FAMILY,
    LIMIT,
    LLAMA,
    MATMULS,
    PREFILL,
    STEPS,
    TRAIN,
    Plan,
    Results,
)
from benchmarks.memory import memory_case
from benchmarks.others import TORCHSCALE
from benchmarks.steps import NARROW, PASSES
from benchmarks.training import long_case, training_case


@dataclass(frozen=True)
class Target:
    """One row.

    Attributes:
        title: What is compared.
        bound: The figure to reach.
        at_least: Whether more is better; otherwise the bound is the most that is allowed.
        value: The figure reached; None when its parts were not measured.
        gate: What is reached at least before the bound is, if there is such a figure.
    """

    title: str
    bound: float
    at_least: bool
    value: float | None
    gate: float | None = None

    @property
    def reached(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.bound if self.at_least else self.value <= self.bound


def targets(plan: Plan, results: Results) -> list[Target]:
    """All rows, whatever was measured."""
    return [
        *_training(plan, results),
        *_reading(plan, results),
        *_decoding(plan, results),
        *_against_llama(plan, results),
        *_family(plan, results),
        *_steps(plan, results),
    ]


def _speedups(results: Results, benchmark: str) -> Callable[..., float | None]:
    """speedup(case, fast, slow[, case of slow]): tokens per second of fast over slow."""

    def speedup(case: str, fast: str, slow: str, slow_case: str | None = None) -> float | None:
        return results.speedup(
            results.find(benchmark, case, fast), results.find(benchmark, slow_case or case, slow)
        )

    return speedup


def _training(plan: Plan, results: Results) -> Iterator[Target]:
    speedup = _speedups(results, TRAIN)
    cases = {
        length: training_case(max(1, plan.step_tokens // length), length)
        for length in plan.train_lengths
    }
    lengths = plan.train_lengths[-3:]
    middle = cases[plan.train_short]
    yield Target(
        f"training, T = {plan.train_short}: against torchscale's parallel form",
        4.5,
        True,
        speedup(middle, "RetNet", f"{TORCHSCALE} parallel"),
    )
    for length, bound in zip(lengths, (1.0, 1.3, 2.0), strict=True):
        value = speedup(cases[length], "RetNet", "Transformer")
        yield Target(f"training, T = {length}: against our Transformer", bound, True, value)
    yield Target(
        f"training, T = {plan.train_short}: fraction of the linear layers' limit by torch.mm",
        0.65,
        True,
        speedup(middle, "RetNet", MATMULS),
    )
    yield Target(
        f"training, T = {plan.train_short}: fraction of that limit by the products we use",
        0.65,
        True,
        speedup(middle, "RetNet", LIMIT),
    )
    short, long = long_case(plan.train_short), long_case(plan.train_long)
    yield Target(
        f"training tokens/s, T = {plan.train_long} against {plan.train_short}",
        0.9,
        True,
        speedup(long, "RetNet", "RetNet", short),
    )
    rows = plan.train_long // plan.train_short
    low = results.peak(memory_case(rows, plan.train_short), "RetNet")
    high = results.peak(memory_case(1, plan.train_long), "RetNet")
    yield Target(
        f"training, peak memory, T = {plan.train_long} against {plan.train_short}, same tokens",
        1.15,
        False,
        high.num_bytes / low.num_bytes if high and low and low.num_bytes else None,
    )


def _reading(plan: Plan, results: Results) -> Iterator[Target]:
    speedup = _speedups(results, PREFILL)
    short, long = long_case(plan.prefill_short), long_case(plan.prefill_long)
    yield Target(
        f"prefill tokens/s, {plan.prefill_long} tokens against {plan.prefill_short}",
        0.95,
        True,
        speedup(long, "RetNet", "RetNet", short),
    )


def _decoding(plan: Plan, results: Results) -> Iterator[Target]:
    speedup = _speedups(results, DECODE)
    near, far, farthest = plan.contexts
    compiled = "RetNet" + COMPILED
    for name, note in (("RetNet", "eager"), (compiled, "compiled")):
        value = speedup(after_case(near), name, name, after_case(farthest))
        title = f"decode ms/token after {farthest} tokens against {near}, {note}"
        yield Target(title, 1.05, False, value)
    for name, note, bound in (("RetNet", "eager", 1.5), (compiled, "compiled", 2.5)):
        value = speedup(context_case(near), name, TORCHSCALE)
        yield Target(f"decode against torchscale's recurrent step, {note}", bound, True, value)
    yield Target(
        f"decode after {far} tokens against Llama with DynamicCache, compiled",
        9.0,
        True,
        speedup(context_case(far), compiled, "Llama"),
    )
    parameters = results.parameters.get(str(plan.large), {}).get("RetNet", 0)
    case = large_case(plan.large, parameters)
    for name, note in (("RetNet", "eager"), (compiled, "compiled")):
        large = f"width {plan.large.hidden_size}, {plan.large.num_hidden_layers} layers"
        title = f"decode at {large}: fraction of the bandwidth limit, {note}"
        yield Target(title, 0.75, True, speedup(case, name, LIMIT))
    for name, note in (("RetNet", "eager"), (compiled, "compiled")):
        value = speedup(batch_case(plan.batch), name, name, batch_case(1))
        title = f"decode tokens/s, batch {plan.batch} against 1, {note}"
        yield Target(title, 6.0, True, value)
    title = "whole generate.py loop against the bare decode step"
    yield Target(title, 1.1, False, speedup(LOOP_CASE, BARE, LOOP))
    title = "model.generate against the bare decode step"
    yield Target(title, 2.0, False, speedup(LOOP_CASE, BARE, GENERATE))


def _against_llama(plan: Plan, results: Results) -> Iterator[Target]:
    speedup = _speedups(results, LLAMA)
    small, large = plan.llama_sizes[0], plan.llama_sizes[-1]
    near, far, farthest = plan.llama_contexts
    case = llama_case(large, 1, near, results)
    width = f"width {large.hidden_size}"
    exact, narrow = {near: 0.85, farthest: 2.2}, {near: 1.0, far: 2.5, farthest: 4.0}
    for how in ("", COMPILED):
        for weights, bound, gate in (("bf16", 0.6, 0.8), ("int8", 0.45, 0.6)):
            title = f"decode at {width}: {weights} weights{how} against float32{how}, ms/token"
            value = speedup(case, RETNET + how, f"{RETNET} {weights}{how}")
            yield Target(title, bound, False, value, gate)
        for weights, (ours, theirs) in PAIRS.items():
            for context, bound in (exact if weights == "float32" else narrow).items():
                title = f"decode at {width} after {context} tokens: {weights}{how} against {theirs}"
                value = speedup(llama_case(large, 1, context, results), ours + how, theirs)
                yield Target(title, bound, True, value)
    case = llama_case(small, 1, near, results)
    found = [results.find(LLAMA, case, name) for name in (RETNET, RETNET + COMPILED)]
    times = [1000 / one.tokens_per_second for one in found if one]
    title = f"decode at width {small.hidden_size}: ms/token, eager or compiled"
    yield Target(title, 0.3, False, min(times, default=None))


def _family(plan: Plan, results: Results) -> Iterator[Target]:
    speedup = _speedups(results, FAMILY)
    for name, bound in FAMILY_BOUNDS.items():
        value = speedup(TRAINING, "retention", name)
        yield Target(f"training, {name} against retention", bound, False, value)
    case = DECODING.format(plan.family_contexts[0])
    for name in FAMILY_BOUNDS:
        title = f"decode, {name} against the RetNet's plain forward pass"
        yield Target(title, 1.5, False, speedup(case, PLAIN, name))


def _steps(plan: Plan, results: Results) -> Iterator[Target]:
    value = _speedups(results, STEPS)(PASSES.format(plan.train_short), "RetNet", "RetNet" + NARROW)
    yield Target("training in bfloat16 against float32", 0.55, False, value)
