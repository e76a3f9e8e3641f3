"""The texts that requests ask for, made one after the other by this package's own loop.

transformers' handlers speak HTTP and JSON, and leave the making of a text to a manager of this form
(``transformers.cli.serving.utils``). That of transformers calls ``model.generate``; this one takes
the loop of generate.py, which ends exactly before a stop string, hands out whole characters, draws
by a seed of the request's own and knows how much room there is.
"""

import asyncio
import json
import logging
import threading
from collections.abc import Callable
from concurrent.futures import wait
from typing import Any

from torch import Tensor
from transformers import BatchEncoding
from transformers.cli.serving.utils import GenerateManager, GenerationState, Modality, _StreamError

from retnet.checkpoints import Checkpoint
from retnet.errors import UserError, is_out_of_memory
from retnet.generation import Usage, check_text_fits, encode_prompt, fit_length, generate
from retnet.generation.stream import PRIMING_TOKENS, TextStream, last_tokens
from retnet.serve.requests import RequestError, Wanted

logger = logging.getLogger(__name__)

Deliver = Callable[[Any], object]
LAST_TOKEN_S = 10.0  # to wait for the token that is being made when the server ends


class Prompts:
    """What stands in the tokenizer's place, as generate.py reads a prompt.

    Of a text ``<bos>`` and its tokens, in which special tokens are ordinary text; of a conversation
    what its template makes.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def __call__(self, text: str, **_: Any) -> BatchEncoding:
        return BatchEncoding({"input_ids": encode_prompt(self._checkpoint.tokenizer, text)})

    def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> BatchEncoding:
        tokenizer = self._checkpoint.tokenizer
        if not tokenizer.chat_template:
            raise RequestError(
                "this model has no chat template, so it cannot answer messages: ask for a "
                "completion of a prompt (/v1/completions), or serve a model that was trained on "
                "chats",
                param="messages", code="no_chat_template",
            )  # fmt: skip
        try:
            encoded: Any = tokenizer.apply_chat_template(messages, **options)
        except Exception as error:  # templates are programs: each fails in its own way
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RequestError(
                f"the model's chat template refuses these messages ({reason}): send others",
                param="messages",
            ) from error
        if not encoded["input_ids"].shape[1]:
            raise RequestError(
                "the model's chat template makes no text of these messages: send others",
                param="messages",
            )
        return BatchEncoding({"input_ids": encoded["input_ids"].long()})


class Answer:
    """One text, from its request to its end; what handlers call a streamer.

    ``deliver`` gets pieces of text as they are made, and None at the end. ``error`` is what went
    wrong on the way. When the length ended the text, ``wanted.max_new_tokens`` is the number of its
    tokens, else None: by that the handlers tell "length" from "stop".

    Raises:
        UserError: At once; the model has no room for the text, or the machine none for the model's
            memory of it.
    """

    def __init__(
        self, checkpoint: Checkpoint, input_ids: Tensor, wanted: Wanted, deliver: Deliver
    ) -> None:
        model, tokenizer = checkpoint.model, checkpoint.tokenizer
        self._model, self._input_ids, self._wanted = model, input_ids, wanted
        self._deliver, self._cancelled = deliver, threading.Event()
        self.tokens: list[int] = []
        self.error: Exception | None = None
        length = input_ids.shape[1]
        option = "max_tokens" if wanted.by_hand else None
        self._most = fit_length(model, length, wanted.max_new_tokens or 1, option)
        most = length + self._most
        check_text_fits(model, most, 1, f"a text of {most:,} tokens (prompt and max_tokens) needs")
        try:
            self._last = last_tokens(tokenizer, wanted.stop)
        except UserError as error:
            raise RequestError(str(error).replace("--stop", "stop"), param="stop") from error
        ends = model.generation_config.eos_token_id  # a chat's may end with more than <eos>
        self._last |= {ends} if isinstance(ends, int) else {*(ends or ())}
        self._text = TextStream(tokenizer, input_ids[0, -PRIMING_TOKENS:].tolist(), wanted.stop)

    @property
    def total_tokens(self) -> int:
        """New tokens so far, with the one that ended the text."""
        return len(self.tokens)

    def cancel(self) -> None:
        """End the text with the token that is being made."""
        self._cancelled.set()

    def run(self) -> None:
        """Make the text, in the thread in which the model works."""
        usage = Usage()
        try:
            if not self._cancelled.is_set():
                self._make(usage)
        except Exception as error:
            if is_out_of_memory(error):
                reason = " ".join(str(error).split()) or "an allocation failed"
                error = RequestError(f"out of memory ({reason}): send a shorter text", status=503)
            self.error = error
            # the handlers put it into JSON as it is
            self._deliver(_StreamError(json.dumps(str(error))[1:-1]))
        finally:
            left = " | given up" if self._cancelled.is_set() else ""
            logger.info(f"{usage.summary()}{left}")
            self._deliver(None)

    def _make(self, usage: Usage) -> None:
        stopped = False

        def ends(row: int, token: int) -> bool:
            nonlocal stopped
            stopped = token in self._last or self._text.stopped
            return stopped or self._cancelled.is_set()

        made = generate(
            self._model,
            self._input_ids.to(self._model.device),
            max_new_tokens=self._most,
            sampling=self._wanted.sampling,
            ends=ends,
            usage=usage,
        )
        for (token,) in made:
            self.tokens.append(token)
            self._send("" if token in self._last else self._text.push(token))
        self._send(self._text.finish())
        self._wanted.max_new_tokens = None if stopped else len(self.tokens)

    def _send(self, piece: str) -> None:
        if piece:
            self._deliver(piece)


class Answers(GenerateManager):
    """Makes texts of a checkpoint in one thread, in the order in which they were asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self._checkpoint, self._open = checkpoint, set[Answer]()

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: Any,
        gen_config: Any,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue, Any]:
        """Begin a text: a queue of its pieces and None, and the ``Answer``."""
        queue: asyncio.Queue = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(piece: Any) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, piece)

        return queue, self._begin(inputs, gen_config, deliver)

    def _begin(self, inputs: Any, wanted: Wanted, deliver: Deliver) -> Answer:
        answer = Answer(self._checkpoint, inputs["input_ids"], wanted, deliver)
        self._open.add(answer)

        def make() -> None:
            try:
                answer.run()
            finally:
                self._open.discard(answer)

        self.submit(make)
        return answer

    async def generate_non_streaming(  # type: ignore[override]
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, list[int]]:
        """A whole text: what it says, the prompt's tokens and its own."""
        pieces: list[str] = []
        loop, ended = asyncio.get_running_loop(), asyncio.Event()

        def deliver(piece: Any) -> None:  # without waking the loop, which would slow the model
            if piece is None:
                loop.call_soon_threadsafe(ended.set)
            else:
                pieces.append(piece)

        answer = self._begin(inputs, gen_config, deliver)
        try:
            await ended.wait()
        finally:
            answer.cancel()  # whoever asked is gone, or all is there
        if answer.error is not None:
            raise answer.error
        return "".join(pieces), inputs["input_ids"].shape[1], answer.tokens

    def stop(self) -> None:
        """End all texts, and wait until the model is still."""
        for answer in [*self._open]:
            answer.cancel()
        wait([self.submit(lambda: None)], timeout=LAST_TOKEN_S)


class State(GenerationState):
    """Which manager makes a text: always the same one."""

    def __init__(self, answers: Answers) -> None:
        super().__init__()
        self._answers = answers

    def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
        return self._answers


class OneModel:
    """In the place of transformers' ``ModelManager``: one checkpoint, loaded by this package.

    transformers' own loads whatever a request names, from the Hub too, and looks a model's class up
    in the module transformers, where those of others are not.
    """

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self._checkpoint, self.force_model = checkpoint, name
        self._prompts = Prompts(checkpoint)

    def process_model_name(self, name: str) -> str:
        return name

    def load_model_and_processor(self, name: str, **_: Any) -> tuple[Any, Prompts]:
        return self._checkpoint.model, self._prompts

    def get_model_modality(self, model: Any, processor: Any = None) -> Any:
        return Modality.LLM

    def list_models(self) -> list[dict[str, Any]]:
        """As /v1/models shows them."""
        created = int(self._checkpoint.path.stat().st_mtime)
        return [
            {"id": self.force_model, "object": "model", "created": created, "owned_by": "local"}
        ]
