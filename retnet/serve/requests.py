"""What a request may ask for: each field is obeyed or refused, none is read and forgotten.

The names and defaults are those of OpenAI's API reference; ``top_k`` and ``repetition_penalty``,
which it lacks, are as other servers have them (the client's ``extra_body``).
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from retnet.cli import MOST, shortened
from retnet.errors import UserError
from retnet.generation import Sampling

MAX_TOKENS = 16  # of a completion that names no length, as the API has it
CHAT_MAX_TOKENS = 1024  # of an answer in a chat, which ends by itself
DRAWN_SEEDS = 2**31  # how many there are for requests that name none

BOTH = {"model", "max_tokens", "temperature", "top_p", "stop", "seed", "stream", "stream_options",
        "user", "top_k", "repetition_penalty"}  # fmt: skip
FIELDS = {
    "completion": BOTH | {"prompt"},
    "chat": BOTH | {"messages", "max_completion_tokens"},
}
# Fields of the API that this server cannot obey, with the values at which they ask for nothing.
NOTHING_ASKED: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "logprobs": (False,), "suffix": ("",),
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "store": (False,),
    "tools": ([],), "tool_choice": ("none",), "response_format": ({"type": "text"},),
    "modalities": (["text"],), "service_tier": ("auto", "default"),
}  # fmt: skip
OF_A_MESSAGE = {"role", "content"}


class RequestError(UserError):
    """A request that is not answered: the status, and the API's words for what is wrong."""

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400
    ) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


@dataclass
class Wanted:
    """How a text is to be made. ``max_new_tokens`` is what transformers' handlers look at."""

    max_new_tokens: int | None
    by_hand: bool  # whether the request named that number
    sampling: Sampling
    stop: tuple[str, ...]


def check_fields(body: Mapping[str, Any], kind: str, served: str) -> None:
    """Raise a ``RequestError`` for another model, and for what is not obeyed.

    ``kind`` is a key of ``FIELDS``, ``served`` the name of the one model.
    """
    model = body.get("model")
    if model not in (None, served):
        raise RequestError(
            f"model ({shortened(model)}) is not here: this server has {served} and loads no other",
            param="model", code="model_not_found", status=404,
        )  # fmt: skip
    for name, value in body.items():
        if value is None or name in FIELDS[kind]:
            continue
        allowed = NOTHING_ASKED.get(name, ())
        if any(value == one and type(value) in (type(one), float) for one in allowed):
            continue
        but = f", or give {' or '.join(map(repr, allowed))}" if allowed else ""
        raise RequestError(
            f"{name} ({shortened(value)}) is not supported here: leave it out{but}",
            param=name, code="unsupported_parameter",
        )  # fmt: skip
    _check(body, "stream", bool, "true or false")
    _check(body, "stream_options", dict, "an object")
    for name, value in (body.get("stream_options") or {}).items():
        if name != "include_usage" or not isinstance(value, bool):
            raise RequestError(
                f"stream_options ({name}: {shortened(value)}) is not supported here: it may have "
                "include_usage, true or false",
                param="stream_options",
            )
    if kind == "chat":
        _check_messages(body.get("messages"))
    else:
        _check_text(body.get("prompt", ""), "prompt", "one string")


def wanted_of(body: Mapping[str, Any], kind: str) -> Wanted:
    """The length, choice of tokens and ends that a request asks for; a ``RequestError`` for others.

    Without a seed each request draws its own.
    """
    lengths = ("max_completion_tokens", "max_tokens")
    for name in (*lengths, "top_k", "seed"):
        value = body.get(name)
        at_least = 0 if name == "seed" else 1
        if value is not None and not (type(value) is int and at_least <= value <= MOST):
            raise RequestError(
                f"{name} ({shortened(value)}) must be a whole number of at least {at_least}",
                param=name,
            )
    given = {name: body[name] for name in ("top_k", "seed") if body.get(name) is not None}
    given.setdefault("seed", secrets.randbelow(DRAWN_SEEDS))
    for name, default in (("temperature", 1.0), ("top_p", 1.0), ("repetition_penalty", 1.0)):
        value = default if body.get(name) is None else body[name]
        if type(value) not in (int, float) or not abs(value) <= MOST:
            raise RequestError(f"{name} ({shortened(value)}) must be a number", param=name)
        given[name] = float(value)
    if given["temperature"] == 0:  # the API's way to ask for the most likely token
        given |= {"greedy": True, "temperature": 1.0}
    try:
        sampling = Sampling(**given)
    except UserError as error:
        words = str(error).replace("use --greedy", "use 0")
        raise RequestError(words, param=words.split(" ")[0]) from error
    length = next((body[name] for name in lengths if body.get(name) is not None), None)
    default = CHAT_MAX_TOKENS if kind == "chat" else MAX_TOKENS
    return Wanted(length or default, length is not None, sampling, _stops(body.get("stop")))


def _stops(stop: Any) -> tuple[str, ...]:
    texts = () if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(texts, list | tuple):
        raise RequestError(
            f"stop ({shortened(stop)}) must be a string or a list of strings", param="stop"
        )
    for text in texts:
        if not text:
            raise RequestError("stop ('') is empty: leave it out", param="stop")
        _check_text(text, "stop", "a string or a list of strings")
    return tuple(texts)


def _check(body: Mapping[str, Any], name: str, kind: type, words: str) -> None:
    if body.get(name) is not None and not isinstance(body[name], kind):
        raise RequestError(f"{name} ({shortened(body[name])}) must be {words}", param=name)


def _check_text(value: Any, name: str, words: str) -> None:
    if not isinstance(value, str):
        raise RequestError(f"{name} ({shortened(value)}) must be {words}", param=name)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{name} has half of a surrogate pair (at character {error.start}), which is no text",
            param=name,
        ) from error


def _check_messages(messages: Any) -> None:
    """Of a conversation all that its template would be given: roles and text, nothing else."""
    if not isinstance(messages, list) or not messages:
        raise RequestError(
            f"messages ({shortened(messages)}) must be a list of one or more messages",
            param="messages",
        )
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RequestError(
                f"{where} ({shortened(message)}) must be an object with role and content",
                param=where,
            )
        for name, value in message.items():
            if value not in (None, []) and name not in OF_A_MESSAGE:
                raise RequestError(
                    f"{where}.{name} ({shortened(value)}) is not supported here: leave it out",
                    param=f"{where}.{name}", code="unsupported_parameter",
                )  # fmt: skip
        content = message.get("content")
        for part in content if isinstance(content, list) else [{"type": "text", "text": content}]:
            if not isinstance(part, dict) or part.get("type") != "text":
                raise RequestError(
                    f"{where}.content ({shortened(part)}) must be text: this model reads nothing "
                    "else",
                    param=f"{where}.content",
                )
            _check_text(part.get("text"), f"{where}.content", "text")
