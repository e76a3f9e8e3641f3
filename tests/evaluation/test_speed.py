"""Rounds alternate, contexts are real, bytes are those of the memory."""

import pytest
import torch

from retnet.evaluation import decode_speed, interleaved, speed
from retnet.evaluation.speed import DecodeSpeed
from tests.generation.builders import MIXERS, tiny_model
from tests.model.conftest import ROW_BYTES

CPU = torch.device("cpu")


def test_rounds_alternate_and_the_warmup_is_not_counted(monkeypatch) -> None:
    clock, order = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def prepare(name: str, seconds: list[float]):
        left = iter(seconds)

        def work() -> None:
            order.append(name)
            clock[0] += next(left)

        def make():
            clock[0] += 50  # preparing takes long and is not timed
            return work

        return make

    first, second = interleaved(
        [prepare("A", [99, 1, 2, 6]), prepare("B", [99, 3, 3, 3])], CPU, rounds=3
    )
    assert "".join(order) == "ABABABAB"
    assert (first.low, first.median, first.high, first.rounds) == (1.5, 2, 4, 3)
    assert second.median == 3


def test_each_piece_has_its_own_number_of_rounds() -> None:
    order: list[str] = []
    names = "ABC"
    prepares = [lambda name=name: lambda: order.append(name) for name in names]
    timings = interleaved(prepares, CPU, rounds=[2, 1, 3])
    assert "".join(order) == "ABC" + "ABC" + "AC" + "C"  # the first round warms up
    assert [timing.rounds for timing in timings] == [2, 1, 3]


def test_ratios_are_over_the_rounds_side_by_side() -> None:
    often = speed.Timing(1, 1, 1, 4, (1.0, 2.0, 100.0, 100.0))
    twice = speed.Timing(3, 3, 3, 2, (3.0, 8.0))
    assert twice.ratio(often) == 3.5
    assert often.ratio(twice) == pytest.approx((1 / 3 + 1 / 4) / 2)


def test_a_single_round_has_no_spread() -> None:
    (timing,) = interleaved([lambda: lambda: None], CPU, rounds=1, warmup=0)
    assert timing.low == timing.median == timing.high


def test_state_stays_and_cache_grows_with_the_context() -> None:
    models = [tiny_model(mixer) for mixer in MIXERS]
    retention, attention = decode_speed(models, (8, 32), tokens=2, rounds=2)
    assert [entry.context for entry in retention] == [8, 32]
    assert retention[0].cache_bytes == retention[1].cache_bytes > 0
    near, far = (entry.cache_bytes - ROW_BYTES for entry in attention)
    assert far == 4 * near
    for entry in (*retention, *attention):
        assert 0 < entry.ms_low <= entry.ms_per_token <= entry.ms_high


def test_a_context_for_which_a_model_is_not_defined() -> None:
    """The others are measured, and nothing is found out about it."""
    results = decode_speed(
        [tiny_model("retention"), tiny_model("aft")], (8, 20), tokens=3, rounds=2
    )
    (_, long), (short, none) = results
    assert long.ms_per_token and short.ms_per_token and short.cache_bytes
    assert none == DecodeSpeed(20)
    alone = decode_speed([tiny_model("aft")], (14,), tokens=3, rounds=2)
    assert alone == [[DecodeSpeed(14)]]


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_round_decodes_the_asked_number_after_the_full_context(mixer, monkeypatch) -> None:
    lengths = []

    def step(token, cache):
        lengths.append(cache.get_seq_length())
        cache.length += 1
        return torch.zeros(1, 259)

    monkeypatch.setattr("retnet.evaluation.speed.make_step", lambda model: step)
    decode_speed([tiny_model(mixer)], (20,), tokens=3, rounds=2)
    assert lengths == [20, 21, 22] * 3


def test_rows_side_by_side_and_the_time_of_reading() -> None:
    ((one,),) = decode_speed([tiny_model("attention")], (8,), tokens=2, rounds=2)
    ((four,),) = decode_speed([tiny_model("attention")], (8,), rows=4, tokens=2, rounds=2)
    assert (one.rows, four.rows) == (1, 4) and four.cache_bytes == 4 * one.cache_bytes
    assert four.tokens_per_second == pytest.approx(4000 / four.ms_per_token)
    assert four.prefill_tokens_per_second == pytest.approx(4 * 8 / four.prefill_s)
    assert DecodeSpeed(3).tokens_per_second is DecodeSpeed(3).prefill_tokens_per_second is None


def test_several_rows_are_stopped_by_the_time_of_one() -> None:
    """However fast the contexts before were; and where one was stopped."""
    alone = [DecodeSpeed(4, prefill_s=3.0), DecodeSpeed(8, prefill_s=6.0)]
    models, options = [tiny_model("retention")], {"tokens": 2, "rounds": 1}

    def stopped(contexts, alone, **limit) -> list[bool]:
        (found,) = decode_speed(models, contexts, of_one_row=[alone], **limit, **options)
        return [one.stopped for one in found]

    assert stopped((4, 8), alone, rows=2, limit_s=12) == [False, False]
    assert stopped((4, 8), alone, rows=2, limit_s=11) == [False, True]
    assert stopped((4, 8), [alone[0], DecodeSpeed(8, stopped=True)], limit_s=99) == [False, True]
    assert stopped((4, 8), [DecodeSpeed(4), DecodeSpeed(8)], limit_s=1e9) == [False, False]
    assert stopped((4, 8), alone, rows=2) == [False, False], "no limit"


def test_a_model_is_stopped_where_it_would_take_too_long_or_not_fit(monkeypatch) -> None:
    """By the time of the context before, as if it grew with the square; then for good."""
    clock, reads = [0.0], []

    def slow(model, ids, cache):
        reads.append(ids.shape[1])
        clock[0] += ids.shape[1] if model is slow_model else 0
        return read_prompt(model, ids, cache)

    slow_model, other = tiny_model("attention"), tiny_model("retention")
    read_prompt = speed.read_prompt
    monkeypatch.setattr(speed, "read_prompt", slow)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    options = {"tokens": 2, "rounds": 2}
    found, all_of_it = decode_speed([slow_model, other], (4, 8, 32, 64), limit_s=100, **options)
    assert [one.stopped for one in found] == [False, False, True, True], "8 s become 128 s at 32"
    assert [one.prefill_s for one in found] == [4, 8, None, None]
    assert not any(one.stopped for one in all_of_it) and all(one.cache_bytes for one in all_of_it)
    assert reads == [4, 4, 4, 4, 8, 8, 32, 64]  # the first two warm up

    monkeypatch.setattr("retnet.generation.checks.memory_of", lambda device: 200_000)
    found, all_of_it = decode_speed([slow_model, other], (8, 600), limit_s=1e9, **options)
    assert [one.stopped for one in found] == [False, True]
    assert not any(one.stopped for one in all_of_it)
