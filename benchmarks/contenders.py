"""The models that are measured beside each other, behind one interface.

Ours, a RetNet in each form and the Transformer, and transformers' Llama are always there; other
people's RetNets are in ``benchmarks.others``. All are built with the same width, depth, heads and
vocabulary, tied embeddings, and feed-forward networks of the width that makes a layer's matrices
hold 12 d^2 parameters.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from retnet import RetNetConfig, RetNetForCausalLM, TransformerConfig, TransformerForCausalLM
from retnet.generation import Step, make_step, prefill
from retnet.model.causal_lm import DecoderForCausalLM

PAIRS_LIMIT = 2048  # tokens of a row above which forms of all pairs of tokens are not trained
LOOP_LIMIT = 128  # the same for the recurrent form, whose graph has every token's state

Prepare = Callable[[], Callable[[], object]]  # what ``interleaved`` takes


@dataclass(frozen=True)
class Size:
    """What all contenders have in common."""

    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_heads: int = 4
    vocab_size: int = 4096

    def __str__(self) -> str:
        return (
            f"width {self.hidden_size}, {self.num_hidden_layers} layers, {self.num_heads} heads, "
            f"vocabulary {self.vocab_size}"
        )


class Contender:
    """A language model that can be trained, fed and decoded.

    Attributes:
        name: For the tables.
        model: Whose parameters are counted.
        longest: Tokens of a row above which it is not trained; None without a limit.
    """

    def __init__(self, name: str, model: nn.Module, longest: int | None = None) -> None:
        self.name = name
        self.model: Any = model
        self.longest = longest

    @property
    def num_parameters(self) -> int:
        return sum(weight.numel() for weight in self.model.parameters())

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy of [B, T] tokens and their (already shifted) targets."""
        raise NotImplementedError

    def train(self, ids: Tensor, targets: Tensor) -> None:
        """Forward and backward pass."""
        self.loss(ids, targets).backward()

    def read(self, ids: Tensor, room: int = 0) -> object:
        """Read a prompt [B, T] up to the logits of its last token.

        Returns:
            What decoding starts from, with room for so many tokens more.
        """
        raise NotImplementedError

    def remember(self, ids: Tensor, room: int) -> object:
        """What decoding starts from, by whatever way there is."""
        return self.read(ids, room)

    def decode(self, memory: Any, token: Tensor) -> Tensor:
        """Feed tokens [B], updating the memory; returns the logits [B, vocab]."""
        raise NotImplementedError

    def training_step(self, ids: Tensor, targets: Tensor) -> Prepare:
        """``train``; the old gradients are dropped outside the measured time."""

        def prepare() -> Callable[[], object]:
            self.model.train().zero_grad(set_to_none=True)
            return lambda: self.train(ids, targets)

        return prepare

    def reading(self, ids: Tensor) -> Prepare:
        """Prefill of [B, T] tokens."""

        @torch.inference_mode()
        def work() -> None:
            self.read(ids)

        def prepare() -> Callable[[], object]:
            self.model.eval()
            return work

        return prepare

    def decoding(self, context: Tensor, tokens: int) -> Prepare:
        """Greedy decoding of ``tokens`` tokens a row, each time from a copy of the same memory."""
        self.model.eval()
        with torch.inference_mode():
            memory = self.remember(context, tokens)

        @torch.inference_mode()
        def decode(own: object) -> None:
            token = context[:, -1]
            for _ in range(tokens):
                token = self.decode(own, token).argmax(dim=-1)

        def prepare() -> Callable[[], object]:
            own = copy.deepcopy(memory)
            return lambda: decode(own)

        return prepare


class Ours(Contender):
    """One of our two models.

    Args:
        name, model, longest: As in ``Contender``.
        mode: The RetNet's form in training; what the model itself chooses when None.
        compiled: Whether torch.compile makes the training and decode steps.
    """

    def __init__(
        self,
        name: str,
        model: DecoderForCausalLM,
        longest: int | None = None,
        *,
        mode: str | None = None,
        compiled: bool = False,
    ) -> None:
        super().__init__(name, model, longest)
        self.mode = mode
        self.compiled = compiled
        self.call: Any = torch.compile(model) if compiled else model
        self.step: Step | None = None

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        options = {"use_cache": False, "mode": self.mode, "return_logits": False}
        loss: Tensor = self.call(ids, shift_labels=targets, **options).loss
        return loss

    def read(self, ids: Tensor, room: int = 0) -> object:
        cache = self.model.new_cache(max_length=ids.shape[1] + room)
        prefill(self.model, ids, cache)
        return cache

    def decode(self, memory: Any, token: Tensor) -> Tensor:
        assert self.step is not None
        return self.step(token, memory)

    def decoding(self, context: Tensor, tokens: int) -> Prepare:
        self.model.eval()
        self.step = make_step(self.model, compile=self.compiled)
        return super().decoding(context, tokens)


class Llama(Contender):
    """transformers' LlamaForCausalLM with its DynamicCache."""

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = self.model(ids, labels=targets, shift_labels=targets, use_cache=False).loss
        return loss

    def read(self, ids: Tensor, room: int = 0) -> object:
        cache = DynamicCache(config=self.model.config)
        self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    def decode(self, memory: Any, token: Tensor) -> Tensor:
        output = self.model(token[:, None], past_key_values=memory, use_cache=True)
        logits: Tensor = output.logits[:, -1]
        return logits


@dataclass
class Field:
    """The contenders of a benchmark, and why others are missing.

    Attributes:
        device, dtype: Where and as what the models are measured.
        contenders: In the order of the tables.
        absent: Name -> reason.
    """

    device: torch.device
    dtype: torch.dtype
    contenders: list[Contender] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)

    def add(self, contender: Contender) -> None:
        contender.model.to(self.device, self.dtype)
        self.contenders.append(contender)


def add_ours(field: Field, size: Size) -> None:
    """Our RetNet as it chooses its form, in each form, and our Transformer."""
    retnet = make_retnet(size)
    field.add(Ours("RetNet", retnet))
    field.add(Ours("RetNet chunkwise", retnet, mode="chunkwise"))
    field.add(Ours("RetNet parallel", retnet, PAIRS_LIMIT, mode="parallel"))
    field.add(Ours("RetNet recurrent", retnet, LOOP_LIMIT, mode="recurrent"))
    field.add(Ours("Transformer", make_transformer(size)))


def make_retnet(size: Size) -> RetNetForCausalLM:
    """Our RetNet with its defaults."""
    return RetNetForCausalLM(RetNetConfig(**vars(size), tie_word_embeddings=True))


def make_transformer(size: Size) -> TransformerForCausalLM:
    """Our Transformer with its defaults."""
    return TransformerForCausalLM(TransformerConfig(**vars(size), tie_word_embeddings=True))


def make_llama(size: Size, multiple: int = 1) -> LlamaForCausalLM:
    """transformers' Llama of the same size, with SDPA; its inner width a multiple of a number."""
    inner = 8 * size.hidden_size / 3  # 4 d^2 attention + 3 d f
    config = LlamaConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=multiple * round(inner / multiple),
        num_hidden_layers=size.num_hidden_layers,
        num_attention_heads=size.num_heads,
        max_position_embeddings=2**20,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


COMPILED = " compiled"


def with_compiled(contenders: list[Contender], wanted: bool = True) -> list[Contender]:
    """Each of ours also compiled, from a compiler that remembers nothing.

    The models share their code, of which torch compiles so many variants only.
    """
    if not wanted:
        return contenders
    torch._dynamo.reset()
    both: list[Contender] = []
    for one in contenders:
        both.append(one)
        if isinstance(one, Ours) and one.mode is None:
            both.append(Ours(one.name + COMPILED, one.model, one.longest, compiled=True))
    return both


def compile_problem(wanted: bool) -> str | None:
    """Why there are no compiled contenders on this machine; None where there are."""
    if not wanted:
        return "--no-compile was given"
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8))
    except Exception as error:  # whatever a missing compiler makes torch raise
        return f"torch.compile fails: {next(iter(str(error).splitlines()), error)}"
    return None
