"""Claims about what a RetNet costs."""

from retnet.evaluation.costs import prepared_step
from retnet.evaluation.speed import Timing
from retnet.experiments.claims.claim import PAPER, Claim
from retnet.experiments.claims.setup import ROWS, Setup, ms_per_token, ratio
from retnet.experiments.claims.verdict import Figure, Finding, at_least, at_most, exact

FLAT = 1.10  # of a time that does not grow
LINEAR = 1.10  # of an exponent
INDEPENDENT = 1.25  # of a time that is "nearly" independent
SHORT = 64  # the short context is the long one divided by this
LOOP = 128  # tokens of a row whose training token by token is timed: its graph has every state
BATCHES = (1, 2, 4, ROWS)
PUBLISHED_OF = "6.7 billion parameters on one A100"
PUBLISHED = {"throughput": 8.4, "memory": 3.4, "latency": 15.6}


def _contexts(setup: Setup) -> tuple[int, int]:
    return max(1, setup.context // SHORT), setup.context


def constant_decode(
    setup: Setup, *mixers: str, keys: tuple[str, ...] = (), name: str = ""
) -> list[Finding]:
    """Time and bytes of a token after the long context, over those after the short one.

    The first mixer's have limits, the others' stand beside; ``name`` is for the first.
    """
    short, long = _contexts(setup)
    prepares, sizes = [], []
    for mixer in mixers:
        model = setup.model(mixer, *keys)
        for context in (short, long):
            work, size = setup.decoding(model, context)
            prepares.append(work)
            sizes.append(size)
    timings, findings = setup.time(prepares), []
    for i, mixer in enumerate(mixers):
        first, second = timings[2 * i : 2 * i + 2]
        shown = name or mixer
        what, size = f"{shown}: {{}} after {long:,} tokens / after {short:,}", sizes[2 * i + 1]
        flat, same = (at_most(FLAT), at_most(1.0)) if i == 0 else (None, None)
        findings += [
            Finding(what.format("time of a token"), ratio(second, first), "times", flat),
            Finding(what.format("bytes"), exact(size / sizes[2 * i]), "times", same),
            Finding(f"{shown}: a token after {long:,} tokens", ms_per_token(second), "ms"),
            Finding(f"{shown}: state or cache after {long:,} tokens", exact(size / 1e6), "MB"),
        ]
    return findings


def decode_constant(setup: Setup) -> list[Finding]:
    return constant_decode(setup, "retention", "attention")


def batch_latency(setup: Setup) -> list[Finding]:
    """The time of a step with several rows, over that with one."""
    model = setup.model("retention")
    pieces = [setup.decoding(model, setup.context, rows)[0] for rows in BATCHES]
    one, *others = setup.time(pieces)
    findings = [
        Finding(f"time of a step with {rows} rows / with 1", ratio(timing, one), "times",
                at_most(INDEPENDENT))
        for rows, timing in zip(BATCHES[1:], others, strict=True)
    ]  # fmt: skip
    return [*findings, Finding("a step with 1 row", ms_per_token(one), "ms")]


def parallel_training(setup: Setup) -> list[Finding]:
    """Training token by token against the parallel form, and time by length in chunks."""
    model, loop = setup.model("retention"), min(LOOP, setup.context)
    steps = [prepared_step(model, 1, loop, mode) for mode in ("recurrent", "parallel")]
    recurrent, parallel = setup.time(steps)
    lengths = setup.lengths
    shown = f"{lengths[0]:,} to {lengths[-1]:,} tokens"
    own = setup.training_exponent(model, lengths, "chunkwise")
    other = setup.training_exponent(setup.model("attention"), lengths)
    what = f"training step of {loop} tokens: token by token / in parallel"
    return [
        Finding(what, ratio(recurrent, parallel), "times", at_least(2)),
        Finding(f"chunkwise: b in time = T^b, {shown}", own, "", at_most(LINEAR)),
        Finding(f"the Transformer's b, {shown}", other),
    ]


def inference_at_length(setup: Setup) -> list[Finding]:
    """Throughput, memory and latency of the Transformer against the RetNet's."""
    works, weights, caches = {}, {}, {}
    for mixer in ("retention", "attention"):
        model = setup.model(mixer)
        weights[mixer] = sum(weight.nbytes for weight in model.parameters())
        for rows in (1, ROWS):
            works[mixer, rows], caches[mixer, rows] = setup.decoding(model, setup.context, rows)
    times: dict[tuple[str, int], Timing] = dict(
        zip(works, setup.time([*works.values()]), strict=True)
    )

    def memory(mixer: str) -> int:
        return weights[mixer] + caches[mixer, ROWS]

    found: dict[str, tuple[str, Figure]] = {
        "throughput": (f"{ROWS} rows", ratio(times["attention", ROWS], times["retention", ROWS])),
        "memory": (f"weights, {ROWS} rows", exact(memory("attention") / memory("retention"))),
        "latency": ("1 row", ratio(times["attention", 1], times["retention", 1])),
    }
    findings = []
    for name, (of, figure) in found.items():
        for what, least in (("better at all", 1), ("as published", PUBLISHED[name])):
            findings.append(Finding(f"{name} ({of}), {what}", figure, "times", at_least(least)))
    return findings


CLAIMS = (
    Claim(
        "decode-constant",
        "A token costs the same time and memory whatever the context.",
        f"{PAPER}, sections 1 and 3.4, figure 6",
        "Greedy tokens of one row from a state that has read the context, the long and the short "
        "one in turn; the Transformer with its cache beside it.",
        decode_constant,
        seconds=15,
    ),
    Claim(
        "batch-latency",
        "The latency of a step is nearly independent of the batch, from 1 to 8 rows.",
        f"{PAPER}, section 3.4, figure 6c",
        "The same at this size on this machine, after the same context. A GPU reads its weights "
        "once for all rows and waits for that; a processor computes for each.",
        batch_latency,
        seconds=15,
        of=PUBLISHED_OF,
    ),
    Claim(
        "parallel-training",
        "It trains in parallel over a text, in time linear in its length with chunks.",
        f"{PAPER}, section 2.1, equations 5 and 7",
        "Forward and backward passes of one row, in the three forms; b is the slope of the "
        "logarithm of time over that of T.",
        parallel_training,
        seconds=75,
    ),
    Claim(
        "inference-8k",
        "At 8k tokens 8.4 times the throughput, 3.4 times less memory, 15.6 times less latency "
        "than a Transformer with its cache.",
        f"{PAPER}, figure 1 and section 3.4",
        "The same three ratios at this size on this machine, at the context that is given. A small "
        "model has few weights beside its cache, so memory and many rows gain more than there "
        "(there: --size retnet-6.7b --dtype bfloat16).",
        inference_at_length,
        seconds=50,
        of=PUBLISHED_OF,
    ),
)
