"""Each field of a request is obeyed or refused."""

import math
import typing
from typing import Any

import pytest

from retnet.generation import Sampling
from retnet.serve.requests import FIELDS, RequestError, check_fields, wanted_of

ONE = {"completion": {"prompt": "a"}, "chat": {"messages": [{"role": "user", "content": "a"}]}}


def wanted(kind: str = "completion", **fields: Any) -> Any:
    check_fields(ONE[kind] | fields, kind, "tiny")
    return wanted_of(ONE[kind] | fields, kind)


@pytest.mark.parametrize(
    ("fields", "choice"),
    [
        ({"temperature": 0.5}, {"temperature": 0.5}),
        ({"temperature": 0}, {"greedy": True}),
        ({"top_p": 0.5}, {"top_p": 0.5}),
        ({"top_k": 3}, {"top_k": 3}),
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"temperature": None, "top_k": None, "stop": None}, {}),
    ],
)
def test_the_choice_of_tokens(fields: dict, choice: dict) -> None:
    defaults = {"temperature": 1.0, "top_p": 1.0, "seed": 4}
    assert wanted(**fields, seed=4).sampling == Sampling(**defaults | choice)


def test_lengths_and_ends() -> None:
    assert wanted().max_new_tokens == 16 and not wanted().by_hand
    assert wanted(max_tokens=3).max_new_tokens == 3 and wanted(max_tokens=3).by_hand
    assert wanted("chat").max_new_tokens == 1024
    assert wanted("chat", max_completion_tokens=3, max_tokens=9).max_new_tokens == 3
    assert wanted(stop="a").stop == ("a",) and wanted(stop=["a", "b"]).stop == ("a", "b")


def test_requests_without_a_seed_differ() -> None:
    assert wanted().sampling.seed != wanted().sampling.seed


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("completion", {"model": "gpt2"}, r"model ('gpt2') is not here: this server has tiny"),
        ("completion", {"n": 2}, "n (2) is not supported here: leave it out, or give 1"),
        ("completion", {"n": True}, "n (True) is not supported"),
        ("completion", {"logprobs": 0}, "logprobs (0) is not supported"),
        ("completion", {"echo": True}, "echo (True) is not supported"),
        ("completion", {"suffix": "b"}, "suffix ('b') is not supported"),
        ("completion", {"best_of": 2}, "best_of (2)"),
        ("completion", {"presence_penalty": 0.1}, "presence_penalty (0.1)"),
        ("completion", {"frequency_penalty": 1}, "frequency_penalty (1)"),
        ("completion", {"logit_bias": {"5": 1}}, "logit_bias ({'5': 1})"),
        ("completion", {"messages": []}, "messages ([]) is not supported here: leave it out"),
        ("completion", {"generation_config": "{}"}, "generation_config ('{}')"),
        ("completion", {"prompt": ["a"]}, "prompt (['a']) must be one string"),
        ("completion", {"prompt": "\ud800"}, "prompt has half of a surrogate pair"),
        ("completion", {"stream": "yes"}, "stream ('yes') must be true or false"),
        ("completion", {"stream_options": {"x": True}}, "stream_options (x: True)"),
        ("completion", {"stream_options": {"include_usage": 1}}, "stream_options (include_usage"),
        ("completion", {"max_tokens": 0}, "max_tokens (0) must be a whole number of at least 1"),
        ("completion", {"max_tokens": 1.5}, "max_tokens (1.5)"),
        ("completion", {"max_tokens": 10**30}, "max_tokens (1000"),
        ("completion", {"seed": -1}, "seed (-1)"),
        ("completion", {"temperature": -1}, "temperature (-1.0) must be above 0: use 0 for"),
        ("completion", {"temperature": math.nan}, "temperature (nan) must be a number"),
        ("completion", {"temperature": "1"}, "temperature ('1') must be a number"),
        ("completion", {"top_p": 1.1}, "top_p (1.1)"),
        ("completion", {"top_k": 0}, "top_k (0)"),
        ("completion", {"stop": ""}, "stop ('') is empty"),
        ("completion", {"stop": 3}, "stop (3) must be a string or a list"),
        ("completion", {"stop": [3]}, "stop (3) must be a string or a list"),
        ("chat", {"prompt": "a"}, "prompt ('a') is not supported"),
        ("chat", {"logprobs": True}, "logprobs (True)"),
        ("chat", {"tools": [{}]}, "tools ([{}])"),
        ("chat", {"response_format": {"type": "json_object"}}, "response_format"),
        ("chat", {"messages": []}, "messages ([]) must be a list of one or more"),
        ("chat", {"messages": ["a"]}, "messages[0] ('a') must be an object with role and content"),
        ("chat", {"messages": [{"role": "user"}]}, "messages[0].content (None) must be text"),
        ("chat", {"messages": [{"role": "user", "content": "a", "name": "b"}]},
         "messages[0].name ('b') is not supported"),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
         "messages[0].content ({'type': 'image_url'}) must be text"),
    ],
)  # fmt: skip
def test_what_is_refused(kind: str, fields: dict, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        wanted(kind, **fields)
    assert str(caught.value).startswith(words)
    assert caught.value.param and caught.value.param.split("[")[0] in fields
    assert caught.value.status == (404 if "model" in fields else 400)


@pytest.mark.parametrize("kind", FIELDS)
def test_what_asks_for_nothing_is_accepted(kind: str) -> None:
    nothing = {"n": 1, "presence_penalty": 0.0, "frequency_penalty": 0, "logprobs": None}
    wanted(kind, model="tiny", user="me", stream_options={"include_usage": True}, **nothing)


def test_parts_of_text_are_a_message() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    answer = {"role": "assistant", "content": "c", "refusal": None, "tool_calls": []}
    wanted("chat", messages=[{"role": "user", "content": parts}, answer])


def test_every_field_of_the_api_is_obeyed_or_refused() -> None:
    """A field that a new version of the API has is refused before anybody thinks of it."""
    openai = pytest.importorskip("openai.types", reason="needs the package openai")
    for kind, parameters in (
        ("completion", openai.completion_create_params.CompletionCreateParamsNonStreaming),
        ("chat", openai.chat.completion_create_params.CompletionCreateParamsNonStreaming),
    ):
        others = set(typing.get_type_hints(parameters)) - FIELDS[kind]
        assert len(others) > 5
        for name in others:
            with pytest.raises(RequestError, match=rf"^{name} \('x'\) is not supported here"):
                wanted(kind, **{name: "x"})
