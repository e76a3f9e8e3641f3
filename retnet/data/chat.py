"""Conversations as tokens, by the chat template that a tokenizer has.

A message's text is text, whatever it spells: only the template writes control tokens ("markers").
The template is rendered with a stand-in for each message, and what stands between two of its
markers is encoded as one text, so that the ids are those of ``tokenizer.apply_chat_template`` for
messages that spell no marker. An answer is what the assistant says and the marker after it.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from retnet.data.messages import ASSISTANT, Conversation
from retnet.data.tokenizer import (
    BATCH_CHARACTERS,
    Piece,
    encode_in_pieces,
    in_groups,
    naming,
    plain_backend,
)
from retnet.errors import UserError

MARKERS = ["<|im_start|>", "<|im_end|>"]
# ChatML. White space at the ends of a message is left out: a line break after the role could become
# one token with it. {% generation %} tells others' libraries what the assistant says.
CHATML = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}
            {{- (message['content'] | trim) + '<|im_end|>' -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- (message['content'] | trim) + '<|im_end|>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
STAND_IN = re.compile("\ue000([0-9]+)\ue001")  # of private use: no template has them
TRIED = [
    {"role": "user", "content": "Hello"},
    {"role": ASSISTANT, "content": "Hi there"},
    {"role": "user", "content": "Bye"},
    {"role": ASSISTANT, "content": "So long"},
]

Messages = Sequence[dict[str, str]]
Parts = list[str | int]  # of a rendered conversation: text of the template, numbers of messages


class Segment(NamedTuple):
    """What stands before a marker, as one text."""

    text: str
    answer: int | None  # the character at which an answer begins in it
    marker: int | None  # the id of the marker after it; None at the end


def prepare_for_chat(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Give a tokenizer without a chat template ChatML and its markers; whether that was needed.

    A ``UserError`` where it has a template that training can't follow.
    """
    added = not tokenizer.chat_template
    if added:
        tokenizer.add_special_tokens({"additional_special_tokens": MARKERS})
        tokenizer.chat_template = CHATML
    # else a rendered conversation's markers would be cut into letters
    tokenizer.split_special_tokens = False
    tokenizer.init_kwargs["split_special_tokens"] = False
    ChatFormat(tokenizer).check()
    return added


class ChatFormat:
    """How a tokenizer's chat template makes tokens of conversations.

    A ``UserError`` where it has none, or is not a fast one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.name = tokenizer.name_or_path or type(tokenizer).__name__
        if not isinstance(tokenizer, PreTrainedTokenizerFast) or not tokenizer.chat_template:
            raise UserError(f"tokenizer ({self.name}) has no chat template (chat_template.jinja)")
        self.tokenizer = tokenizer
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
        self.markers = {entry.content: token for token, entry in added.items() if entry.special}
        longest_first = sorted(self.markers, key=len, reverse=True)
        self._marker = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

    def check(self) -> None:
        """Raise a ``UserError`` where ids are not the template's own, or answers have no end."""
        _ = self.end
        ((ids, *_),) = self._encoded([TRIED])
        with naming(self.tokenizer):
            rendered = self.tokenizer.apply_chat_template(
                TRIED, return_dict=False, tokenizer_kwargs={"split_special_tokens": False}
            )
        if ids.tolist() != rendered:
            raise UserError(
                f"{self._template} makes tokens that can't be told apart from text: use one that "
                "writes its control tokens without changing the text around them"
            )

    @cached_property
    def end(self) -> int:
        """The marker that ends an answer."""
        segments = self._segments(*self.parts(TRIED), TRIED)
        ends = {segment.marker for segment in segments if segment.answer is not None}
        found = ends.pop() if len(ends) == 1 else None
        if found is None:
            raise UserError(
                f"{self._template} does not end each answer with the same special token, by which "
                "a model's answer could be known to end: use one that does"
            )
        return found

    def parts(self, messages: Messages, *, prompt: bool = False) -> tuple[Parts, list[str]]:
        """A rendered conversation, and what each message says in it.

        With ``prompt`` it ends where the next answer begins. A ``UserError`` where the template
        fails, or changes what messages say.
        """
        held = [{**own, "content": f"\ue000{number}\ue001"} for number, own in enumerate(messages)]
        pieces = STAND_IN.split(self._render(held, prompt))
        parts: Parts = [int(one) if i % 2 else one for i, one in enumerate(pieces)]
        rendered = self._render(messages, prompt)
        given = [own["content"] for own in messages]
        for texts in (given, [text.strip() for text in given]):  # many leave out white space
            if rendered == "".join(texts[x] if isinstance(x, int) else x for x in parts):
                return parts, texts
        raise UserError(
            f"{self._template} changes what messages say, and which tokens are an answer's is not "
            "known then: use a tokenizer with a plainer one, ChatML for instance"
        )

    def encode_prompt(self, parts: Parts, texts: Sequence[str]) -> list[int]:
        """The ids of parts that no answer is among."""
        ids, _ = self._joined(self._segments(parts, texts, ()))
        return ids

    def encode(self, documents: Iterable[Conversation]) -> Iterator[tuple[Conversation, Piece]]:
        """Each conversation in order, with its tokens; the bytes are those of its answers."""
        for group in in_groups(documents, BATCH_CHARACTERS):
            pieces = self._encoded([own.messages for own in group])
            yield from zip(group, pieces, strict=True)

    @property
    def _template(self) -> str:
        return f"tokenizer ({self.name}): its chat template"

    def _render(self, messages: Messages, prompt: bool) -> str:
        try:
            rendered = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=prompt
            )
        except MemoryError:
            raise
        except Exception as error:  # a template raises what it likes
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            roles = ", ".join(one["role"] for one in messages[:9])
            raise UserError(
                f"{self._template} fails on messages of {roles} ({reason}): change the "
                "conversation, or repair chat_template.jinja"
            ) from error
        return str(rendered)

    def _segments(self, parts: Parts, texts: Sequence[str], messages: Messages) -> list[Segment]:
        """The parts cut at the template's markers; answers are of ``messages``, where given."""
        segments, text, answer = [], "", None
        for part in parts:
            if isinstance(part, int):
                if messages and messages[part]["role"] == ASSISTANT:
                    answer = len(text) if answer is None else answer
                text += texts[part]
                continue
            before, *rest = self._marker.split(part)
            text += before
            for marker, after in zip(rest[::2], rest[1::2], strict=True):
                segments.append(Segment(text, answer, self.markers[marker]))
                text, answer = after, None
        return [*segments, Segment(text, answer, None)]

    def _encoded(self, conversations: Sequence[Messages]) -> Iterator[Piece]:
        segments = [self._segments(*self.parts(own), own) for own in conversations]
        encodings = iter(self._tokenized([one.text for own in segments for one in own]))
        for own, messages in zip(segments, conversations, strict=True):
            ids, bounds = self._joined(own, encodings)
            said = (one["content"] for one in messages if one["role"] == ASSISTANT)
            num_bytes = sum(len(text.encode()) for text in said)
            yield Piece(np.array(ids, np.uint32), num_bytes, np.array(bounds, np.int64))

    def _tokenized(self, texts: list[str]) -> list[Any]:
        with naming(self.tokenizer):
            encodings: list[Any] = plain_backend(self.tokenizer).encode_batch(
                texts, add_special_tokens=False
            )
        return encodings

    def _joined(
        self, segments: Sequence[Segment], encodings: Iterator[Any] | None = None
    ) -> tuple[list[int], list[int]]:
        """All ids, and where answers begin and end in them."""
        if encodings is None:
            encodings = iter(self._tokenized([one.text for one in segments]))
        ids: list[int] = []
        bounds: list[int] = []
        for segment in segments:
            encoding = next(encodings)
            if segment.answer is not None:
                bounds += [
                    len(ids) + _token_at(encoding, segment.answer, len(segment.text)),
                    len(ids) + len(encoding.ids) + (segment.marker is not None),
                ]
            ids += encoding.ids
            if segment.marker is not None:
                ids.append(segment.marker)
        return ids, bounds


def _token_at(encoding: Any, first: int, end: int) -> int:
    """The first token that has a character from ``first`` on; the number of all where none has."""
    found = (encoding.char_to_token(place) for place in range(first, end))
    token = next((token for token in found if token is not None), None)
    return len(encoding.ids) if token is None else token


def pieces_of(
    tokenizer: PreTrainedTokenizerFast, documents: Iterable[str]
) -> Iterator[tuple[str, Iterable[Piece]]]:
    """``encode_in_pieces`` of texts; of conversations the same, each in one piece."""
    documents = iter(documents)
    first = next(documents, None)
    if first is None:
        return
    again = chain([first], documents)
    if not isinstance(first, Conversation):
        yield from encode_in_pieces(tokenizer, again)
        return
    for document, piece in ChatFormat(tokenizer).encode(again):  # type: ignore[arg-type]
        yield document, [piece]
