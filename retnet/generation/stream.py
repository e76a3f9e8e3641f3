"""Text as it is made: whole characters only, and nothing from a stop string on."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from transformers import PreTrainedTokenizerFast

from retnet.data.tokenizer import naming
from retnet.errors import UserError
from retnet.generation.checks import check_length, fit_length
from retnet.generation.decode import ENDED, NotFiniteError, Usage, generate
from retnet.generation.prompt import encode_prompt
from retnet.generation.sampling import Sampling
from retnet.machine import set_up_compiler
from retnet.model.causal_lm import DecoderForCausalLM

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what tokenizers decode an incomplete character to
WAITING_TOKENS = 16  # undecodable ones that wait for more before their text is looked into
PRIMING_TOKENS = 8  # context for the first new token; more than a character or a space needs


class TextStream:
    """Turns the tokens of one sample into text, a piece at a time.

    The pieces together are the decoded text up to the first stop string. Text that may be the
    beginning of a stop string waits until it is known not to be one; so does an incomplete
    character, which the last piece holds as a replacement character. Only the last tokens are kept,
    however long the text becomes. Those of the prompt are there because some tokenizers decode a
    first token differently. ``stopped`` says that a stop string was found.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        prompt_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
    ) -> None:
        self._tokenizer, self._backend = tokenizer, tokenizer.backend_tokenizer
        added = self._backend.get_added_tokens_decoder()
        self._silent = {token for token, entry in added.items() if entry.special}
        self._stop = tuple(stop)
        before = [token for token in prompt_ids[-PRIMING_TOKENS:] if self._has_text(token)]
        if self._decode(before).endswith(REPLACEMENT):
            before = []  # the decoder would take it for an unfinished character of its own
        self._ids = before  # those whose text is out already, as context, and those that wait
        self._context = len(before)
        self._decoded = len(self._decode(before))  # characters of the text of _ids that are out
        self._waiting = ""
        self.stopped = False

    def _has_text(self, token: int) -> bool:
        return token not in self._silent and self._backend.id_to_token(token) is not None

    def _decode(self, ids: list[int]) -> str:
        with naming(self._tokenizer):
            text: str = self._backend.decode(ids, skip_special_tokens=True)
        return text

    def push(self, token: int) -> str:
        """Take one token and return the text that is certain now, often an empty string."""
        if self.stopped or not self._has_text(token):
            return ""
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith(REPLACEMENT):  # perhaps an incomplete character
            new = self._settled(text)
        elif len(text) <= self._decoded:
            return ""
        else:
            new = text[self._decoded :]
            self._ids = self._ids[self._context :]
            self._context, self._decoded = len(self._ids), len(self._decode(self._ids))
        return self._release(new)

    def _settled(self, text: str) -> str:
        """Of a long run of bytes that are no characters, what no later token can change.

        A cut between two replacement characters changes neither side, and one inside a character
        would show as more of them; what may still be completed is in the last 3 tokens.
        """
        last = len(self._ids) - 3
        if last - self._context < WAITING_TOKENS:
            return ""
        for cut in range(last, last - 4, -1):
            head = self._decode(self._ids[:cut])
            if head + self._decode(self._ids[cut:]) == text:
                new = head[self._decoded :]
                self._ids, self._context, self._decoded = self._ids[cut:], 0, 0
                return new
        return ""

    def finish(self) -> str:
        """Return what was held back; to be called once, after the last token."""
        if self.stopped:
            return ""
        text = self._release(self._decode(self._ids)[self._decoded :]) + self._waiting
        self._waiting, self.stopped = "", True
        return text

    def _release(self, text: str) -> str:
        text = self._waiting + text
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self._waiting, self.stopped = "", True
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._waiting = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that begins ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def last_tokens(tokenizer: PreTrainedTokenizerFast, stop: Sequence[str]) -> set[int]:
    """Tokens without text that end a sample: <eos>, and those whose name has a stop string in it.

    A ``UserError`` where a stop string is empty, or none of them can occur.
    """
    if "" in stop:
        raise UserError("--stop ('') is empty: give the text to stop at, or leave it out")
    if stop and not any(_can_occur(tokenizer, text) for text in stop):
        raise UserError(
            f"--stop ({', '.join(map(repr, stop))}) has no token in the model's vocabulary: "
            "use other text"
        )
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    silent = {token: entry.content for token, entry in added.items() if entry.special}
    named = {token for token, name in silent.items() if any(text in name for text in stop)}
    return {tokenizer.eos_token_id, *named}


def _can_occur(tokenizer: PreTrainedTokenizerFast, text: str) -> bool:
    """Whether a text may be made: each of its letters is in some token's text.

    Whether it has tokens of its own says nothing: a tokenizer may know "。" at the end of words
    only, and one that changes letters to small ones makes tokens of what it never writes.
    """
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which is in no text
        return False
    ids = [[token] for token in tokenizer.get_vocab().values()]
    with naming(tokenizer):
        texts = tokenizer.backend_tokenizer.decode_batch(ids, skip_special_tokens=False)
    letters = set("".join(texts))  # with the replacement character where a token is a part of one
    return REPLACEMENT in letters or set("".join(text.split())) <= letters


def stream_text(
    model: DecoderForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    num_samples: int = 1,
    stop: Sequence[str] = (),
    usage: Usage | None = None,
    compile: bool = False,
    by_hand: bool = True,
) -> Iterator[list[str]]:
    """Continue a prompt and hand out the text as it is made; the options are as of ``generate``.

    Where a model has no room for so many tokens, the text ends at its last position, or it is an
    error if the number was given ``by_hand``. An empty prompt starts from ``<bos>``. A sample ends
    before the first ``stop`` in its new text.

    Yields the new text of each sample, ``num_samples`` strings, after every token and at the end. A
    ``UserError`` comes at once, before anything is made: a stop string cannot occur, there is no
    compiler, or so many tokens cannot fit. A ``NotFiniteError`` comes after the text made so far.
    """
    last = last_tokens(tokenizer, stop)
    if compile:
        set_up_compiler(model.device, "--compile")
    input_ids = encode_prompt(tokenizer, prompt)
    option = "--max-new-tokens" if by_hand else None
    max_new_tokens = fit_length(model, input_ids.shape[1], max_new_tokens, option)
    check_length(model, input_ids.shape[1], max_new_tokens, num_samples)
    prompt_ids = input_ids[0, -PRIMING_TOKENS:].tolist()
    streams = [TextStream(tokenizer, prompt_ids, stop) for _ in range(num_samples)]
    made = generate(
        model,
        input_ids.to(model.device),
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        num_samples=num_samples,
        ends=lambda row, token: token in last or streams[row].stopped,
        usage=usage,
        compile=compile,
    )
    return _as_text(made, streams)


def _as_text(made: Iterator[list[int]], streams: list[TextStream]) -> Iterator[list[str]]:
    problem = None
    try:
        for tokens in made:
            yield [
                "" if token == ENDED else stream.push(token)
                for stream, token in zip(streams, tokens, strict=True)
            ]
    except NotFiniteError as error:
        problem = error
    yield [stream.finish() for stream in streams]
    if problem is not None:
        raise problem


def sample_text(
    model: DecoderForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
) -> str:
    """The whole text of ``stream_text``, one sample; leaves the model's training mode alone.

    It ends with a note where the logits are no numbers any more.
    """
    with evaluation_mode(model):
        pieces = stream_text(
            model, tokenizer, prompt, max_new_tokens=max_new_tokens, sampling=sampling
        )
        return whole_text(piece for (piece,) in pieces)


def whole_text(pieces: Iterable[str]) -> str:
    """All pieces as one text, with a note at its end where the logits are no numbers any more."""
    text: list[str] = []
    try:
        text += pieces
    except NotFiniteError as error:
        text.append(f" [{error}]")
    return "".join(text)


@contextmanager
def evaluation_mode(model: DecoderForCausalLM) -> Iterator[None]:
    """Evaluation mode inside the block; the mode of before after it."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
