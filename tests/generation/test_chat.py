"""A conversation reads each of its tokens once, however answers end."""

import os
import signal

import pytest
import torch

from retnet.errors import UserError
from retnet.generation import Chat, Sampling, decode
from retnet.generation.console import converse
from retnet.generation.sampling import Sampler
from retnet.interrupts import ctrl_c_noticed
from retnet.model.causal_lm import DecoderForCausalLM
from retnet.model.fast_decode.step import DecodeStep
from retnet.model.models import model_class
from tests.conversations import END, SPELLED, START, chat_tokenizer, turns
from tests.generation.builders import BOS, EOS, MIXERS, PAD, tiny_model

TOKENIZER = chat_tokenizer()
SPECIAL = {BOS, EOS, PAD, START, END}


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch):
    """Have every sixth token of an answer be this one; None: nothing ends it."""

    def set_end(token: int | None) -> None:
        class Ending(Sampler):
            made = 0

            def __call__(self, logits):
                self.made += 1
                logits[:, list(SPECIAL)] = -torch.inf
                tokens = super().__call__(logits)
                return tokens if token is None or self.made % 6 else torch.full_like(tokens, token)

        monkeypatch.setattr(decode, "Sampler", Ending)

    return set_end


def chat_model(mixer: str = "retention") -> DecoderForCausalLM:
    return tiny_model(mixer, vocab_size=END + 1)


class Reading:
    """All tokens that a model is given, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ids: list[int] = []
        prefill, fast = decode.prefill, DecodeStep.__call__
        one = decode.decode_one

        def read(model, input_ids, cache, **options):
            self.ids += input_ids[0].tolist()
            return prefill(model, input_ids, cache, **options)

        def decoded(model, tokens, cache):
            self.ids += tokens.tolist()
            return one(model, tokens, cache)

        def stepped(step, tokens, cache):
            self.ids += tokens.tolist()
            return fast(step, tokens, cache)

        monkeypatch.setattr(decode, "prefill", read)
        monkeypatch.setattr(decode, "decode_one", decoded)
        monkeypatch.setattr(DecodeStep, "__call__", stepped)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("ends", [END, EOS, None], ids=["marker", "eos", "length"])
def test_each_token_is_read_once(mixer: str, ends: int | None, ending, monkeypatch) -> None:
    """The state after three messages is that of the conversation, read as a whole."""
    ending(ends)
    model, reading = chat_model(mixer), Reading(monkeypatch)
    chat = Chat(model, TOKENIZER, system="be brief", max_new_tokens=9)
    said: list[str] = []
    for message in ("hello", SPELLED, "é"):
        said += [message, "".join(chat.answer(message))]
        assert chat.cut is (ends is None)
    assert reading.ids == chat.memory.ids and chat.memory.cache.length == len(reading.ids)
    assert reading.ids.count(END) == 6  # system, three messages, and two answers' ends
    rendered = TOKENIZER.decode(reading.ids).split("<|im_start|>assistant\n")
    expected = TOKENIZER.apply_chat_template(turns(*said, system="be brief"), tokenize=False)
    for own, other in zip(rendered, expected.split("<|im_start|>assistant\n"), strict=True):
        assert own.partition("<|im_end|>")[2] == other.partition("<|im_end|>")[2] or own in other
    assert chat.usage.path == "fast step"
    at_once, more = model.new_cache(), torch.tensor([END])
    decode.prefill(model, torch.tensor([reading.ids]), at_once)
    caches = (chat.memory.cache, at_once)
    one, other = (decode.decode_one(model, more, cache) for cache in caches)
    assert torch.allclose(one, other)


def test_an_answer_that_is_interrupted_is_gone_on_from(ending, monkeypatch) -> None:
    ending(None)
    chat, reading = Chat(chat_model(), TOKENIZER, max_new_tokens=50), Reading(monkeypatch)
    pieces = []
    for piece in chat.answer("hello", lambda: len(pieces) >= 5):
        pieces.append(piece)
    assert chat.usage.new_tokens == 5 and not chat.cut
    made = list(chat._made)
    "".join(chat.answer("more", lambda: True))
    prompt = TOKENIZER.apply_chat_template(
        turns("hello"), add_generation_prompt=True, return_dict=False
    )
    after = TOKENIZER.apply_chat_template(
        turns("hello", "", "more"), add_generation_prompt=True, return_dict=False
    )[len(prompt) :]
    assert reading.ids == prompt + made + after
    assert chat.usage.prompt_tokens == len(prompt) + 1 + len(after)  # the last one made waited


def test_ctrl_c_ends_an_answer_and_not_the_conversation(ending, capsys, monkeypatch) -> None:
    ending(None)
    chat = Chat(chat_model(), TOKENIZER, max_new_tokens=40)
    real = chat.answer

    def answer(message, stopped):
        for piece in real(message, stopped):
            if message == "stop":
                os.kill(os.getpid(), signal.SIGINT)
            yield piece

    monkeypatch.setattr(chat, "answer", answer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signal, "default_int_handler", lambda *_: None)  # of a burst
        signal.signal(signal.SIGINT, signal.default_int_handler)
        converse(chat, ["stop", "go on"])
    assert chat.usage.answers == 2 and chat.usage.new_tokens == 41
    assert capsys.readouterr().err == "(the answer ends at --max-new-tokens)\n"


def test_a_second_ctrl_c_is_as_ever() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), ctrl_c_noticed() as noticed:
        assert not noticed()
        os.kill(os.getpid(), signal.SIGINT)
        assert noticed()
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_sampling_goes_on_from_answer_to_answer(ending) -> None:
    ending(None)

    def said(**options) -> list[str]:
        sampling = Sampling(**options)
        chat = Chat(chat_model(), TOKENIZER, sampling=sampling, max_new_tokens=5)
        return ["".join(chat.answer("a")) for _ in range(2)]

    assert said(seed=1) == said(seed=1) != said(seed=2)
    assert said(temperature=3.0) != said(temperature=0.1)
    assert said(greedy=True) != said(greedy=True, repetition_penalty=9.0)


def test_a_model_of_limited_length_says_where_it_ends(ending, caplog) -> None:
    ending(None)
    kind = model_class("aft")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 40}
    model = kind(kind.config_class(vocab_size=END + 1, aft_rank=4, **sizes)).eval()
    chat = Chat(model, TOKENIZER, max_new_tokens=99)
    with caplog.at_level("INFO", "retnet"):
        list(chat.answer("hello"))
    assert "the text ends at 40 tokens, for which this aft model is defined" in caplog.text
    assert chat.cut and len(chat.memory.ids) == 39  # and the last one, which is not read
    words = r"the conversation has \d+ tokens .* and leaves no room, .*: start a new one"
    with pytest.raises(UserError, match=words):
        list(chat.answer("hello"))


def test_a_conversation_beyond_what_a_growing_model_saw_is_warned_of_once(ending, caplog) -> None:
    ending(None)
    prompt = TOKENIZER.apply_chat_template(
        turns("hello"), add_generation_prompt=True, return_dict=False
    )
    for mixer in MIXERS:
        model = chat_model(mixer)
        model.config.max_position_embeddings = len(prompt) + 5
        chat, warned = Chat(model, TOKENIZER, max_new_tokens=5), []
        for _ in range(3):
            caplog.clear()
            list(chat.answer("hello"))
            warned.append("expect poor answers beyond" in caplog.text)
        assert warned == [False, model.grows, False]


def test_a_conversation_that_memory_does_not_take() -> None:
    chat = Chat(chat_model("attention"), TOKENIZER, max_new_tokens=10**15)
    with pytest.raises(UserError, match=r"a conversation of 1,000,000,000,000,0\d\d tokens needs"):
        list(chat.answer("hello"))


@pytest.mark.parametrize("ends", [END, None])
def test_what_a_template_writes_before_the_end_of_an_answer(ends, ending, monkeypatch) -> None:
    """An answer that has ended by itself is not gone on with."""
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }} .<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    ending(ends)
    chat, reading = Chat(chat_model(), tokenizer, max_new_tokens=9), Reading(monkeypatch)
    for message in ("a", "b"):
        list(chat.answer(message))
    before_an_end = [reading.ids[i - 2 : i] for i, x in enumerate(reading.ids) if x == END]
    assert [x == [*b" ."] for x in before_an_end] == [True, ends is None, True]


def test_a_template_that_changes_what_was_said() -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    chat = Chat(chat_model(), tokenizer, max_new_tokens=3)
    list(chat.answer("a"))
    with pytest.raises(UserError, match="its chat template changes what was said before"):
        list(chat.answer("b"))


def test_without_a_template() -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        Chat(chat_model(), tokenizer, max_new_tokens=3)
