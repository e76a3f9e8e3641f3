"""A conversation with a model, whose state goes on: no token of it is read twice."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedTokenizerFast

from retnet.data.chat import ChatFormat, Parts
from retnet.data.messages import ASSISTANT
from retnet.errors import UserError
from retnet.generation.checks import check_text_fits, fit_length
from retnet.generation.decode import Memory, NotFiniteError, Usage, generate, make_step
from retnet.generation.sampling import MAX_SEED, Sampling
from retnet.generation.stream import (
    PRIMING_TOKENS,
    TextStream,
    evaluation_mode,
    last_tokens,
    whole_text,
)
from retnet.model.causal_lm import DecoderForCausalLM

logger = logging.getLogger(__name__)


class Chat:
    """A conversation: what was said, and the state after it.

    A ``UserError`` where the tokenizer has no chat template, or a stop string cannot occur.

    Attributes:
        memory: The state, and the tokens that were read into it, each once.
        usage: Of all answers so far.
        cut: Whether the last answer was ended by its length.
    """

    def __init__(
        self,
        model: DecoderForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        *,
        system: str | None = None,
        sampling: Sampling | None = None,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        compile: bool = False,
    ) -> None:
        self.format, self._model, self._tokenizer = ChatFormat(tokenizer), model, tokenizer
        self._end = self.format.end
        self._last_tokens = last_tokens(tokenizer, stop) | {*self.format.markers.values()}
        self._sampling, self._longest, self._stop = sampling or Sampling(), max_new_tokens, stop
        self.memory = Memory(model.new_cache(), make_step(model, compile=compile), [])
        self.usage, self.cut = Usage(), False
        self._messages = [] if system is None else [{"role": "system", "content": system}]
        self._parts: Parts = []  # of the conversation up to where its last answer begins
        self._made: list[int] = []  # that answer's tokens, the last of which is not read yet
        self._warned = False

    def answer(self, message: str, stopped: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Answer a message, a piece of text at a time; asked after each token whether to stop.

        All pieces have to be taken. A ``UserError`` comes before the first: the template fails, or
        the conversation has become too long for the model or the machine.
        """
        ids = self._ids_of(message)
        total, model = len(self.memory.ids) + len(ids), self._model
        longest = fit_length(
            model, total, self._longest, prompt="the conversation", fix="start a new one"
        )
        self._check_length(total, longest)
        stream = TextStream(self._tokenizer, ids[-PRIMING_TOKENS:], self._stop)
        self._made, text, usage = [], "", Usage()
        seed = (self._sampling.seed + self.usage.answers) % MAX_SEED  # each draws anew
        made = generate(
            model,
            torch.tensor([ids], device=model.device),
            max_new_tokens=longest,
            sampling=replace(self._sampling, seed=seed),
            ends=lambda _, token: token in self._last_tokens or stream.stopped or stopped(),
            usage=usage,
            memory=self.memory,
        )
        problem = None
        try:
            for (token,) in made:
                self._made.append(token)
                text += (piece := stream.push(token))
                yield piece
        except NotFiniteError as error:
            problem = error
        text += (piece := stream.finish())
        yield piece
        self.cut = len(self._made) == longest and self._made[-1] not in self._last_tokens
        self._messages += [{"role": ASSISTANT, "content": text}]
        self.usage.add(usage)
        if problem is not None:
            raise problem

    def _ids_of(self, message: str) -> list[int]:
        """What is to be read next: what is left of the last answer, its end, and the message."""
        messages = [*self._messages, {"role": "user", "content": message}]
        parts, texts = self.format.parts(messages, prompt=True)
        read = len(self._parts)
        if parts[:read] != self._parts:
            raise UserError(
                f"tokenizer ({self.format.name}): its chat template changes what was said before, "
                "and a state that goes on can't: use one that only adds to a conversation"
            )
        ids: list[int] = []
        if read:  # then the answer, as it was made
            ids = self._made[-1:] if self._made[-1] not in self._last_tokens else []
            read += 1
        new = self.format.encode_prompt(parts[read:], texts)
        if self._made and self._made[-1] == self._end:
            new = new[new.index(self._end) :]
        self._messages, self._parts = messages, parts
        return ids + new

    def _check_length(self, read: int, new: int) -> None:
        model, window, most = self._model, self._model.config.max_position_embeddings, read + new
        check_text_fits(model, most, 1, f"a conversation of {most:,} tokens needs")
        if model.grows and most > window and not self._warned:
            self._warned = True
            logger.warning(
                f"the conversation has {read:,} tokens, its answer up to {new:,}, and this model "
                f"was trained on texts of {window:,}: expect poor answers beyond"
            )


def sample_answer(
    model: DecoderForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    message: str,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
) -> str:
    """The answer to one message; leaves the model's training mode alone.

    It ends with a note where the logits are no numbers any more.
    """
    with evaluation_mode(model):
        chat = Chat(model, tokenizer, sampling=sampling, max_new_tokens=max_new_tokens)
        return whole_text(chat.answer(message))
