"""The loop equals an uncached loop and transformers' generate, for one row and for many."""

import pytest
import torch

from retnet.errors import UserError
from retnet.generation import Sampler, Sampling, Usage, decode_one, generate, prefill
from retnet.generation.decode import ENDED, NotFiniteError
from tests.generation.builders import MIXERS, tiny_model

pytestmark = pytest.mark.parametrize("mixer", MIXERS)
DRAWN = Sampling(temperature=0.9, top_k=50, top_p=0.9, repetition_penalty=1.1, seed=3)
GREEDY = Sampling(greedy=True)


def prompts(rows: int, length: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (rows, length), generator=generator)


def collect(model, input_ids, steps, sampling=GREEDY, **kwargs) -> torch.Tensor:
    """New tokens, [B, n]."""
    made = generate(model, input_ids, max_new_tokens=steps, sampling=sampling, **kwargs)
    return torch.tensor(list(made)).T


@torch.no_grad()
def uncached(model, input_ids, steps, sampling) -> torch.Tensor:
    sampler, ids = Sampler(sampling, input_ids), input_ids
    for _ in range(steps):
        logits = model(ids, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, sampler(logits)[:, None]], dim=1)
    return ids[:, input_ids.shape[1] :]


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_cached_equals_uncached(mixer: str, sampling: Sampling) -> None:
    model = tiny_model(mixer)
    cached = collect(model, prompts(2), 20, sampling)
    assert cached.equal(uncached(model, prompts(2), 20, sampling))
    assert len(set(cached.flatten().tolist())) > 3, "a model that repeats itself proves nothing"


def test_greedy_equals_transformers_generate(mixer: str) -> None:
    model = tiny_model(mixer)
    expected = model.generate(
        prompts(2), do_sample=False, max_new_tokens=20, eos_token_id=None, pad_token_id=0
    )
    assert collect(model, prompts(2), 20).equal(expected[:, 7:])


def test_a_batch_equals_its_rows(mixer: str) -> None:
    model, batch = tiny_model(mixer), prompts(3)
    rows = [collect(model, row[None], 12) for row in batch]
    assert collect(model, batch, 12).equal(torch.cat(rows))


def test_samples_of_one_prompt_are_those_of_single_runs(mixer: str) -> None:
    model = tiny_model(mixer)
    singles = [
        collect(model, prompts(1), 12, Sampling(temperature=2.0, seed=seed)) for seed in (4, 5, 6)
    ]
    batch = collect(model, prompts(1), 12, Sampling(temperature=2.0, seed=4), num_samples=3)
    assert batch.equal(torch.cat(singles))
    assert not batch[0].equal(batch[1])


def test_prefill_does_not_depend_on_the_pieces(mixer: str) -> None:
    model, ids = tiny_model(mixer), prompts(2, 13)
    whole = model(ids, use_cache=False).logits[:, -1]
    for chunk_size in (1, 3, 13, 50):
        cache = model.new_cache()
        torch.testing.assert_close(prefill(model, ids, cache, chunk_size=chunk_size), whole)
        assert cache.get_seq_length() == 13


def test_prefill_asks_for_the_last_logits_only(mixer: str, monkeypatch) -> None:
    """All logits of a 100k-token prompt and a 50k vocabulary would take 20 GB."""
    model, shapes = tiny_model(mixer), []
    model.lm_head.register_forward_hook(lambda _, inputs, output: shapes.append(output.shape[1]))
    prefill(model, prompts(1, 9), model.new_cache(), chunk_size=4)
    assert shapes == [1, 1, 1]


def test_decode_one_continues_and_returns_float32_at_least(mixer: str) -> None:
    ids = prompts(2, 9)
    for dtype in (torch.bfloat16, torch.float64):
        model = tiny_model(mixer, dtype=dtype)
        cache = model.new_cache()
        first = prefill(model, ids[:, :8], cache)
        logits = decode_one(model, ids[:, 8], cache)
        assert first.dtype == logits.dtype == torch.promote_types(dtype, torch.float32)
        if dtype == torch.float64:
            torch.testing.assert_close(logits, model(ids, use_cache=False).logits[:, -1])


def test_a_row_ends_alone_and_the_loop_with_the_last(mixer: str) -> None:
    model = tiny_model(mixer)
    free = collect(model, prompts(2), 20)
    stop_at = int(free[0, 4])
    first = [row.tolist().index(stop_at) if stop_at in row else 99 for row in free]
    usage = Usage()
    asked = []

    def ends(row: int, token: int) -> bool:
        asked.append((row, token))
        return token == stop_at

    ended = collect(model, prompts(2), 20, ends=ends, usage=usage)
    assert ended.shape[1] == min(20, max(first) + 1)
    for row, expected, end in zip(ended, free, first, strict=True):
        length = min(end + 1, ended.shape[1])
        assert row[:length].equal(expected[:length])
        assert (row[length:] == ENDED).all()
    assert usage.new_tokens == int((ended != ENDED).sum())
    assert asked == [
        (row, token)
        for column in ended.T.tolist()
        for row, token in enumerate(column)
        if token != ENDED
    ]


def test_usage_counts_tokens_time_and_state(mixer: str) -> None:
    model, usage = tiny_model(mixer), Usage()
    collect(model, prompts(1), 5, usage=usage)
    after_5 = usage.state_bytes
    assert (usage.prompt_tokens, usage.steps, usage.new_tokens, usage.rows) == (7, 5, 5, 1)
    assert usage.prefill_seconds > 0 < usage.decode_seconds
    assert usage.prompt_tokens_per_second > 0 < usage.ms_per_token
    collect(model, prompts(1), 60, usage=usage)
    if mixer == "retention":
        assert usage.state_bytes == after_5 > 0
    else:
        assert usage.state_bytes > 4 * after_5
    assert f"state: {usage.state_bytes:,} bytes" in usage.summary()


def test_no_tokens_asked_for_gives_none(mixer: str) -> None:
    assert list(generate(tiny_model(mixer), prompts(1), max_new_tokens=0)) == []


@pytest.mark.slow
def test_compiled_equals_eager(mixer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced whole, and once: the number of tokens seen does not recompile anything."""
    traced = []

    def backend(graph: torch.fx.GraphModule, _: list) -> object:
        traced.append(graph)
        return graph.forward

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda m, **kw: real(m, backend=backend, **kw))
    monkeypatch.setattr("retnet.generation.decode.steps_folder", lambda: None)
    torch._dynamo.reset()
    model = tiny_model(mixer)
    plain = collect(model, prompts(2), 12)
    assert not traced
    assert collect(model, prompts(2), 12, compile=True).equal(plain)
    assert len(traced) == 1


def test_no_compiler(mixer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"--compile needs a C\+\+ compiler"):
        collect(tiny_model(mixer), prompts(1), 2, compile=True)


def poisoned(mixer: str, token: int):
    """A model that can't make sense of a token."""
    model = tiny_model(mixer)
    model.model.embed_tokens.weight.data[token] = torch.nan
    return model


def first_new(made: torch.Tensor, others: torch.Tensor | None = None) -> int:
    """The first place but 0 of a token not there before in [n], and not among the others."""
    tokens, taken = made.tolist(), [] if others is None else others.tolist()
    return next(i for i in range(1, len(tokens)) if tokens[i] not in tokens[:i] + taken)


@pytest.mark.parametrize(
    "sampling",
    [GREEDY, DRAWN, Sampling(top_p=1.0, temperature=1e-4), Sampling(top_p=0.5, top_k=9)],
    ids=["greedy", "drawn", "cold", "top p"],
)
def test_logits_that_are_no_numbers_end_the_text(mixer: str, sampling: Sampling) -> None:
    """Greedy choice gave token 0 for ever, a draw an IndexError."""
    (free,) = collect(tiny_model(mixer), prompts(1), 60, sampling)
    place = first_new(free)
    made = []
    with pytest.raises(NotFiniteError, match=rf"not finite after {place + 1} new tokens"):
        for tokens in generate(
            poisoned(mixer, int(free[place])), prompts(1), max_new_tokens=60, sampling=sampling
        ):
            made += tokens
    assert made == free[: place + 1].tolist()


def test_a_row_that_has_ended_may_go_wrong(mixer: str) -> None:
    free = collect(tiny_model(mixer), prompts(2), 30)
    place = first_new(*free)
    last = int(free[0, place])
    ended = collect(poisoned(mixer, last), prompts(2), 30, ends=lambda row, token: token == last)
    assert ended[1].equal(free[1])
    assert ended[0, place:].tolist() == [last] + [ENDED] * (29 - place)


def test_an_infinite_logit_is_no_choice(mixer: str) -> None:
    model = tiny_model(mixer)
    model.lm_head.weight.data[:, 0] = 0
    model.lm_head.weight.data[3] = torch.inf  # times both signs: nan, or an infinity
    for sampling in (GREEDY, DRAWN):
        with pytest.raises(NotFiniteError, match="after 0 new tokens"):
            collect(model, prompts(1), 2, sampling)
