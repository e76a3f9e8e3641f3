"""Claims that RWKV's and AFT's authors make about what these cost."""

import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from retnet.data import load_tokenizer
from retnet.evaluation.memory import measured_peaks
from retnet.experiments.claims.claim import Claim
from retnet.experiments.claims.costs import LINEAR, constant_decode
from retnet.experiments.claims.setup import Setup, exponent
from retnet.experiments.claims.verdict import Figure, Finding, at_most, exact, worst
from retnet.model.causal_lm import DecoderForCausalLM

SQUARE = 2.1  # of an exponent
PROCESSES = 3  # that measure memory
RWKV, AFT = "RWKV-4, arXiv 2305.13048", "AFT, arXiv 2105.14103"


def state_exponent(setup: Setup, mixer: str, *keys: str) -> Figure:
    """b, where the state of one row has a size in proportion to d^b at a fixed number of heads."""
    width = setup.model(mixer, *keys).config.hidden_size
    widths, sizes = (width, 2 * width), []
    for own in widths:
        model = setup.model(mixer, *keys, f"model.hidden_size={own}", "model.num_hidden_layers=1")
        sizes.append(setup.decoding(model, 1)[1])
    return exact(exponent(widths, sizes))


def memory_exponent(setup: Setup, model: DecoderForCausalLM, lengths: Sequence[int]) -> Figure:
    """b, where the memory of a training step beyond what it takes at any length grows as T^b.

    The lengths double. From the growth of the peak: of c + a T^b the second increase is 2^b times
    the first. Each time in a process of its own.
    """
    tokenizer, found = load_tokenizer("bytes"), []
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for _ in range(PROCESSES):
            peaks = measured_peaks("training", Path(folder), lengths, model.device, model.dtype)
            first, second = (b - a for a, b in pairwise(peaks))
            found.append(float(np.log2(second / first)) if first > 0 < second else np.nan)
    return worst(found, "processes")


def rwkv_cost(setup: Setup) -> list[Finding]:
    lengths = setup.lengths
    training = setup.training_exponent(setup.model("rwkv"), lengths)
    state = state_exponent(setup, "rwkv")
    return [
        *constant_decode(setup, "rwkv"),
        Finding("b in size of the state = d^b", state, "", at_most(1.01)),
        Finding("retention's b, with as many heads", state_exponent(setup, "retention")),
        Finding(
            f"b in time of a training step = T^b, {lengths[0]:,} to {lengths[-1]:,} tokens",
            training, "", at_most(LINEAR),
        ),
    ]  # fmt: skip


def aft_cost(setup: Setup) -> list[Finding]:
    """w and the table of positions alone may exceed 12 d^2 a layer, so the width is given."""
    width = setup.model("attention").config.hidden_size
    lengths, findings = setup.lengths, []
    shown = f"{lengths[0]:,} to {lengths[-1]:,} tokens"
    room = f"data.seq_len={2 * setup.context}"  # beyond which nothing is defined
    common = (f"model.intermediate_size={4 * width}", room)
    for variant, limit in (("simple", LINEAR), ("local", LINEAR), ("full", SQUARE)):
        model = setup.model("aft", *common, f"model.aft_variant={variant}")
        found = setup.training_exponent(model, lengths)
        what = f"{variant}: b in time of a training step = T^b, {shown}"
        findings.append(Finding(what, found, "", at_most(limit)))
        if variant == "full":
            found = memory_exponent(setup, model, lengths)
            what = f"{variant}: b in memory of a training step = T^b, {shown}"
            findings.append(Finding(what, found, "", at_most(LINEAR)))
    simple = (*common, "model.aft_variant=simple")
    own = ("model.positions=none", "model.aft_variant=simple")
    state = state_exponent(setup, "aft", *own)
    findings.append(Finding("simple: b in size of the state = d^b", state, "", at_most(1.01)))
    return [*findings, *constant_decode(setup, "aft", keys=simple, name="simple")]


CLAIMS = (
    Claim(
        "rwkv-cost",
        "RWKV reads T tokens in time T d and memory d: a token costs the same at any length.",
        f"{RWKV}, table 1",
        "A token after a long and a short context, the size of the state when the width doubles, "
        "and the time of training steps by length, which the paper has linear too.",
        rwkv_cost,
        seconds=20,
    ),
    Claim(
        "aft-cost",
        "AFT needs memory T d; time T d (simple), T s d with a window of s (local), T^2 d (full).",
        f"{AFT}, table 1",
        "Training steps by length, the peak of memory of the full variant's in processes of their "
        "own, the state of the simple one and its tokens after a long and a short context.",
        aft_cost,
        seconds=120,
    ),
)
