"""What three models were found to be, by made-up figures: reports are about how they say it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from retnet.evaluation import EvaluationText
from retnet.evaluation.bootstrap import Difference
from retnet.evaluation.comparison import Comparison, ModelResult, describe_environment
from retnet.evaluation.costs import Costs, TrainingCost
from retnet.evaluation.profile import MeanLoss, Profile
from retnet.evaluation.report import Findings
from retnet.evaluation.report.findings import History
from retnet.evaluation.scoring import DocumentScores
from retnet.evaluation.speed import DecodeSpeed
from retnet.evaluation.token_weights import TokenWeights

CONTEXTS = (128, 512, 2048)
NASTY = "<script>alert(1)</script>|$x_1$`\x1b[31m"


def result(name: str, mixer: str, nats: float, first: bool = False) -> ModelResult:
    targets = np.array([100, 300])
    scores = DocumentScores(nats * targets, targets, 3 * targets)
    gap = Difference(nats - 2.0, nats - 2.1, nats - 1.9)
    bits = None if first else Difference(gap.value / 2, gap.low / 2, gap.high / 2)
    own = (name, Path(f"runs/{name}"), mixer, "float32", "bf16", 12345, scores, True)
    return ModelResult(*own, None if first else gap, bits, [])


def speeds(ms: float, growth: float, size: int, grows: bool, stop: int | None) -> list[DecodeSpeed]:
    found = []
    for context in CONTEXTS:
        if stop is not None and context > stop:
            found.append(DecodeSpeed(context, stopped=True))
            continue
        time = ms * (1 + growth * context)
        memory = size * context if grows else size
        spread = (time, 0.9 * time, 1.1 * time)
        peak = 2 * memory + 1_000_000
        found.append(DecodeSpeed(context, *spread, memory, context / 1e4, peak_bytes=peak))
    return found


def batches(growth: float) -> list[DecodeSpeed]:
    """At the longest context nothing but one row of the first model, whose time does not grow."""
    found = []
    for context in CONTEXTS:
        for rows in (1, 4):
            if context == CONTEXTS[-1] and (growth or rows > 1):
                found.append(DecodeSpeed(context, rows=rows, stopped=True))
            else:
                found.append(DecodeSpeed(context, rows * 0.8, 0, 0, 9, 0.1, rows))
    return found


def profile(shift: float, defined: bool) -> Profile:
    kinds = {"the same pair of tokens was there before": MeanLoss(1.0 + shift, 250),
             "the pair of tokens is new": MeanLoss(3.0 + shift, 150),
             "rarer than rank 10": MeanLoss(None, 0)}  # fmt: skip
    positions = {1: MeanLoss(4.0 + shift, 9), 2: MeanLoss(3.5 + shift, 9), 16: MeanLoss(2.0, 382)}
    contexts = {c: MeanLoss(2.5 - c / 1000 + shift, 64) for c in (64, 256)}
    beyond = MeanLoss(2.0 + 10 * shift, 64) if defined else None
    distances = {1: MeanLoss(0.5 + shift, 100), 2: MeanLoss(1.3, 150), 16: MeanLoss(None, 0)}
    return Profile(positions, kinds, distances, {**contexts, 512: beyond})


@pytest.fixture(scope="module")
def findings() -> Findings:
    models = [result("a", "retention", 2.0, first=True), result("b", "attention", 2.1),
              result(NASTY, "retention", 1.95)]  # fmt: skip
    text = EvaluationText("some <b>text</b>", ["one", "two"])
    comparison = Comparison(text, 256, 256, models, describe_environment(torch.device("cpu")))
    costs = [
        Costs(
            speeds(1.0, growth, size, grows, stop),
            batches(growth),
            [TrainingCost(128, 16, 9e3, 5_000_000), TrainingCost(512, 4, 8e3 / (1 + growth))],
        )
        for growth, size, grows, stop in (
            (0, 300_000, False, None), (0.01, 1000, True, None), (0, 300_000, False, 512)
        )
    ]  # fmt: skip
    timed = History([1, 2, 3], [0.5, 1.0, 1.5], [5.0, 4.0, 3.0], {3: 2.9})
    untimed = History([1, 2, 3], None, [5.0, 4.5, 3.5], {})
    return Findings(
        comparison,
        [profile(0.0, True), profile(0.1, True), profile(-0.05, False)],
        [0.95, None, 0.9],
        costs,
        [timed, untimed, None],
        [256, 256, 256],
        [[32.0, 64.0, float("inf")], [], [100.0]],
        [TokenWeights(1, 0, ["<bos>", "\n", NASTY], np.tril(np.ones((3, 3)))), None, None],
    )
