"""Conversations: rows with a list of messages, and the documents that they become."""

import json
from typing import Any

from retnet.errors import UserError

FIELD = "messages"
ASSISTANT = "assistant"
ROLES = ("system", "user", ASSISTANT)
# What else an assistant may say, which a text of its content alone would leave out without a word.
BESIDE = ("tool_calls", "function_call", "reasoning_content", "thinking")
EXAMPLE = 'write [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'


class Conversation(str):
    """A document that is a conversation: its messages as JSON, always written alike.

    So it is hashed, split and kept like any text; what encodes it asks for its ``messages``.
    """

    __slots__ = ()

    @property
    def messages(self) -> list[dict[str, str]]:
        """Each with ``role`` and ``content``."""
        messages: list[dict[str, str]] = json.loads(self)
        return messages

    @property
    def answers(self) -> list[str]:
        """What the assistant says, turn by turn: what a loss is counted of."""
        return [one["content"] for one in self.messages if one["role"] == ASSISTANT]

    @classmethod
    def of(cls, value: Any, where: str) -> "Conversation":
        """The conversation in a row's field; a ``UserError`` that says what is wrong, and where."""
        if not isinstance(value, list) or not value:
            kind = "an empty list" if value == [] else type(value).__name__
            raise UserError(f"{where}: {FIELD} holds {kind}, not a list of messages: {EXAMPLE}")
        messages = [_message(one, f"{where}: message {i}") for i, one in enumerate(value, 1)]
        if not any(one["content"].strip() for one in messages if one["role"] == ASSISTANT):
            raise UserError(
                f"{where}: no message of the {ASSISTANT} has text, and there is nothing else to "
                "train on: remove the row, or add an answer"
            )
        return cls(json.dumps(messages, ensure_ascii=False, separators=(",", ":")))


def _message(value: Any, what: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise UserError(f"{what} is {type(value).__name__}, not an object: {EXAMPLE}")
    role, content = value.get("role"), value.get("content")
    if role not in ROLES:
        given = f"the role {json.dumps(role, default=str)[:40]}" if "role" in value else "no role"
        raise UserError(f"{what} has {given}: name it as one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        given = f"content that is {type(content).__name__}" if "content" in value else "no content"
        raise UserError(f"{what} has {given}, not text: {EXAMPLE}")
    if beside := next((name for name in BESIDE if value.get(name)), None):
        raise UserError(
            f"{what} has {beside}, and only content is trained on: write it into the content as "
            "text, or remove the row"
        )
    return {"role": role, "content": content}
