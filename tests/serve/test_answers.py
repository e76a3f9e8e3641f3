"""Texts as the server makes them: what was asked for, in order, and given up when nobody waits."""

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from retnet.checkpoints import Checkpoint
from retnet.errors import UserError
from retnet.generation import Sampling, generate, sample_text
from retnet.serve import answers
from retnet.serve.answers import Answers, Prompts
from retnet.serve.requests import RequestError, Wanted
from tests.generation.builders import BOS, byte_tokenizer, tiny_model

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def checkpoint(mixer: str = "retention", **changes: Any) -> Checkpoint:
    model = tiny_model(mixer)
    for name, value in changes.items():
        setattr(model.config, name, value)
    return Checkpoint(Path("tiny"), model, byte_tokenizer(), None)


def wanted(max_new_tokens: int = 20, stop: tuple[str, ...] = (), **sampling: Any) -> Wanted:
    return Wanted(max_new_tokens, True, Sampling(**{"seed": 1} | sampling), stop)


def ask(own: Checkpoint, *requests: Wanted, prompt: str = "ab") -> list[tuple[str, int, list[int]]]:
    """What all of some requests get that are made at once."""

    async def both() -> Any:
        maker, inputs = Answers(own), Prompts(own)(prompt)
        ask = maker.generate_non_streaming
        return await asyncio.gather(*(ask(None, None, inputs, one, "") for one in requests))

    return asyncio.run(both())


def test_the_texts_are_those_of_generate() -> None:
    own = checkpoint()
    first, other = wanted(seed=1), wanted(seed=2, temperature=0.5)
    found = ask(own, first, other, first)
    for one, (text, prompt_tokens, tokens) in zip((first, other, first), found, strict=True):
        expected = sample_text(
            own.model, own.tokenizer, "ab", max_new_tokens=20, sampling=one.sampling
        )
        assert text == expected and prompt_tokens == 3 and len(tokens) == 20
    assert found[0] != found[1]


def test_a_text_ends_before_a_stop_string_and_says_so() -> None:
    own = checkpoint()
    plain = wanted(greedy=True)
    ((text, _, tokens),) = ask(own, plain)
    assert plain.max_new_tokens == len(tokens) == 20  # by which the handlers say "length"
    stop = text[5:7]
    stopped = wanted(greedy=True, stop=(stop,))
    ((short, _, fewer),) = ask(own, stopped)
    assert short == text[: text.index(stop)] and len(fewer) < 20
    assert stopped.max_new_tokens is None  # "stop"


def test_eos_and_the_ends_of_the_models_own_end_a_text() -> None:
    own = checkpoint()
    ((text, _, tokens),) = ask(own, wanted(greedy=True))
    own.model.generation_config.eos_token_id = [257, tokens[4]]
    one = wanted(greedy=True)
    ((short, _, fewer),) = ask(own, one)
    first = tokens.index(tokens[4])
    assert fewer == tokens[: first + 1] and one.max_new_tokens is None
    assert text.startswith(short)


@pytest.mark.parametrize("mixer", ["retention", "attention", "aft"])
def test_a_prompt_without_room_is_refused_before_anything_is_made(mixer: str) -> None:
    own = checkpoint(mixer)
    long = "x" * 40
    if own.model.config.longest is None:
        ((_, prompt_tokens, tokens),) = ask(own, wanted(3), prompt=long)
        assert (prompt_tokens, len(tokens)) == (41, 3)
        return
    with pytest.raises(UserError, match=r"the prompt has 41 tokens .* give it a shorter one"):
        ask(own, wanted(3), prompt=long)
    with pytest.raises(UserError, match=r"max_tokens \(20\) after a prompt of 3 tokens"):
        ask(own, wanted(20))
    unnamed = Wanted(20, False, Sampling(), ())
    ((_, _, tokens),) = ask(own, unnamed)
    assert len(tokens) == 13 == unnamed.max_new_tokens  # ended by its length


def test_a_memory_that_cannot_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"a text of .* tokens \(prompt and max_tokens\) needs"):
        ask(checkpoint("attention"), wanted(10**15))


def test_a_stop_that_cannot_occur_is_refused(monkeypatch) -> None:
    with pytest.raises(RequestError, match=r"^stop \(''\) is empty"):
        ask(checkpoint(), wanted(stop=("",)))


def test_a_text_that_nobody_waits_for_ends(monkeypatch) -> None:
    own, made = checkpoint(), []

    def counted(*args: Any, **options: Any) -> Any:
        for token in generate(*args, **options):
            made.append(token)
            yield token

    monkeypatch.setattr(answers, "generate", counted)

    async def leave() -> None:
        maker, inputs = Answers(own), Prompts(own)("ab")
        long = maker.generate_non_streaming(None, None, inputs, wanted(10**6), "")
        task = asyncio.create_task(long)
        while not made:
            await asyncio.sleep(0.01)
        task.cancel()
        ((text, _, _),) = await asyncio.gather(
            maker.generate_non_streaming(None, None, inputs, wanted(3), "")
        )
        assert text  # the next one's turn has come
        queue, answer = maker.generate_streaming(None, None, inputs, wanted(10**6), "")
        assert await queue.get()
        await asyncio.to_thread(maker.stop)  # as when the server ends
        while await queue.get() is not None:
            pass
        assert answer.total_tokens < 10**6

    asyncio.run(asyncio.wait_for(leave(), timeout=60))


def test_what_goes_wrong_on_the_way_is_told(monkeypatch) -> None:
    own = checkpoint()
    with torch.no_grad():
        own.model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite after 0 new tokens"):
        ask(own, wanted())

    def full(*_: Any, **__: Any) -> Any:
        raise MemoryError('no "memory"')
        yield

    monkeypatch.setattr(answers, "generate", full)
    words = r'out of memory \(no "memory"\): send a shorter text'
    with pytest.raises(RequestError, match=words) as caught:
        ask(own, wanted())
    assert caught.value.status == 503


def test_special_tokens_of_a_prompt_are_ordinary_text() -> None:
    ids = Prompts(checkpoint())("<eos>é")["input_ids"]
    assert ids.tolist() == [[BOS, *"<eos>é".encode()]]


def test_a_conversation_goes_through_the_template() -> None:
    own = checkpoint()
    prompts, said = Prompts(own), [{"role": "user", "content": "hi"}]
    options = {"return_tensors": "pt", "return_dict": True, "tokenize": True}
    with pytest.raises(RequestError, match="this model has no chat template") as caught:
        prompts.apply_chat_template(said, **options)
    assert caught.value.code == "no_chat_template"
    own.tokenizer.chat_template = TEMPLATE
    ids = prompts.apply_chat_template(said, **options)["input_ids"]
    assert ids.tolist() == [[*b"user: hi\n"]]
    own.tokenizer.chat_template = "{{ raise_exception('only two roles') }}"
    with pytest.raises(RequestError, match=r"refuses these messages \(only two roles\)"):
        prompts.apply_chat_template(said, **options)
    own.tokenizer.chat_template = "{% if"
    with pytest.raises(RequestError, match="refuses these messages"):
        prompts.apply_chat_template(said, **options)


def test_the_log_says_what_a_text_took(caplog, monkeypatch) -> None:
    monkeypatch.setattr(logging.getLogger("retnet"), "propagate", True)
    caplog.set_level("INFO", logger="retnet")
    ask(checkpoint(), wanted(5))
    assert "new: 5 tokens" in caplog.text and "| fast step" in caplog.text
    assert "given up" not in caplog.text
    hooked = checkpoint()
    hooked.model.lm_head.register_forward_hook(lambda *_: None)
    ask(hooked, wanted(5))
    assert caplog.text.endswith("| plain step: lm_head has hooks\n")
