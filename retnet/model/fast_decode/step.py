"""One token per row through a model, in as few operators as it takes.

The plain form of this is the model's own forward pass: right for every model, but made for whole
texts. For one token its cost is not arithmetic, it is the modules called, the operators started,
and the weights read at less than the memory's speed. ``DecodeStep`` computes the same (the tests
compare the two) and differs in this:

* Projections of the same input are one product, where ``lay_out_for_decoding`` has stored their
  weights one after the other.
* What does not change from token to token is computed once (``mixers.base.Step``).
* The state is updated in place; nothing that a step allocates outlives it.
* For many rows side by side the weights are packed once, where that pays.

``make_decode_step`` is the one place that decides whether a model takes it.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..block import DecoderLayer
from ..cache import DecoderCache, State, is_locked
from ..causal_lm import DecoderForCausalLM
from ..decoder import DecoderModel
from ..documents import NEXT_POSITION, SEGMENT
from ..mixers.base import Part, Step
from ..ops.sdpa import for_any_length
from ..quantised import QuantisedLinear, quantised_format
from .ahead import AheadOfTime
from .compilers import compile_often
from .products import AnyProduct, make_product, make_products
from .weights import MOST_LEFT, joint_layers, onednn_is_on, switch_onednn

LEAVES = {nn.Dropout, nn.Embedding, nn.LayerNorm, nn.Linear, nn.ModuleList, nn.RMSNorm,
          QuantisedLinear}  # fmt: skip
MOST_PACKED = 2**30  # bytes of weights that may be copied to make the steps of many rows faster


def make_decode_step(model: nn.Module) -> tuple["DecodeStep | None", str]:
    """The lean step of a model; None and the reason where only its forward pass is right.

    A language model has one that consists of its own modules and plain weights, nothing wrapped,
    hooked, compiled or in training, on a device that has float64 for the angles.
    """
    if not isinstance(model, DecoderForCausalLM):
        return None, f"{type(model).__name__} is no model of this package"
    reason = _obstacle(model)
    return (None, reason) if reason else (DecodeStep(model), "")


def _obstacle(model: DecoderForCausalLM) -> str | None:
    """Why ``DecodeStep`` may not stand for the model, if so."""
    if model.training:
        return "the model is in training mode"
    if model.device.type == "mps":
        return "the device has no float64"
    for name, weight in model.named_parameters():
        if type(weight) is not nn.Parameter:
            return f"{name} is {_named(weight)}"
    for name, module in model.named_modules():
        name = name or "the model"
        if isinstance(module, Part) and module.step is None:
            return f"{_named(module)} has no step of its own"
        if not _is_own(module):
            return f"{name} is {_named(module)}"
        if isinstance(module, nn.Linear) and module.bias is not None:
            return f"{name} has a bias"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name} has hooks"
        if module._compiled_call_impl is not None:
            return f"{name} is compiled"
        if "forward" in vars(module):
            by = ", wrapped by accelerate" if hasattr(module, "_hf_hook") else ""
            return f"{name} has another forward{by}"
    return None


def _named(thing: Any) -> str:
    """The class of a thing with its article; with its module where torch has one of that name."""
    name, kind = type(thing).__name__, type(thing)
    if name in {leaf.__name__ for leaf in LEAVES}:
        name = f"{kind.__module__}.{name}"
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def _is_own(module: nn.Module) -> bool:
    """Whether a module computes what the step takes it to compute."""
    kind = type(module)
    if isinstance(module, Part):  # a class that changes forward must bring a step of its own
        order = kind.__mro__
        forward = next(c for c in order if "forward" in vars(c))
        return order.index(next(c for c in order if "step" in vars(c))) <= order.index(forward)
    whole = (DecoderForCausalLM, DecoderModel, DecoderLayer)
    return kind in LEAVES or any(isinstance(module, c) and kind.forward is c.forward for c in whole)


class PartStep:
    """One token per row through a mixer or feed-forward network.

    ``inputs`` are the products with what reads its input, ``output`` is that with its last layer's
    weight, ``core`` what lies between.
    """

    def __init__(self, part: Part) -> None:
        assert part.step is not None
        layers = joint_layers(part)
        self.core: Step = part.step(part)
        self.same_input = type(self.core).inputs is Step.inputs
        self.inputs = make_products(layers) if self.same_input else [*map(make_product, layers)]
        self.output = make_product(getattr(part, part.output))

    def __call__(self, x: Tensor, shared: Any, state: State) -> Tensor:
        """[B, d] -> [B, d]; the state is changed in place."""
        if self.same_input and len(self.inputs) == 1:
            whole = self.inputs[0](x)
        else:
            inputs = self.core.inputs(x, state) or itertools.repeat(x)
            pairs = zip(self.inputs, inputs, strict=False)
            whole = torch.cat([product(y) for product, y in pairs], dim=1)
        out = self.output(self.core(whole, shared, state))
        gate = self.core.gate(whole)
        return out if gate is None else gate * out


class DecodeStep:
    """One token per row: tokens [B] in, the logits that follow [B, vocab] out, the cache updated.

    It holds the model's weights as they are stored when it is made, and copies none; except on a
    CPU whose kernels are faster with packed ones, for more rows than a few, up to ``MOST_PACKED``,
    and of quantised ones, whose products have layouts of their own. ``weights`` is the format of
    those, None of plain ones; ``problem`` says why the plain product takes the place of torch's for
    it. ``make_decode_step`` makes it.
    """

    def __init__(self, model: DecoderForCausalLM) -> None:
        # a function of the step, no bound method: a step that refers to itself would keep its
        # weights until the next search for cycles, beside those of the model after it
        self.faster: Callable[..., Tensor] | None = None
        self.config = model.config
        self.number = next(_numbers)
        self.packed = self.compiled = False
        self.grows, self.longest = model.grows, model.config.longest
        self.embedding = model.model.embed_tokens.weight.detach()
        self.embedding_scale = model.model.embedding_scale
        first, table = model.model.embed_norm, model.model.embed_positions
        self.positions = None if table is None else table.weight.detach()
        self.embedding_norm = None if first is None else step_norm(first)
        self.norm = step_norm(model.model.norm)
        self.output = make_product(model.lm_head)
        kinds: list[type] = []
        self.first: list[PartStep] = []  # of each class of parts: it says what they share
        self.parts: list[tuple[Callable[[Tensor], Tensor], PartStep, int]] = []
        for layer in model.model.layers:
            for norm, part in ((layer.mixer_norm, layer.mixer), (layer.ffn_norm, layer.ffn)):
                step = PartStep(part)
                if type(part) not in kinds:
                    kinds.append(type(part))
                    self.first.append(step)
                self.parts.append((step_norm(norm), step, kinds.index(type(part))))
        self.may_pack = sum(product.packed_bytes for product in self._products()) <= MOST_PACKED
        self.weights = quantised_format(model)
        self.problem = next((x.problem for x in self._products() if x.problem), "")

    def obstacle(self, cache: DecoderCache) -> str:
        """Why only the model's own pass can go on from a cache; nothing where this step may.

        The cache must hold something, nothing that needs a mask, and be writable here; and have
        room, where that is bounded: the model's own pass says what is wrong otherwise.
        """
        if cache.record is None:
            return "the cache is empty"
        if not cache.rows.keys() <= {"record", "last_hidden"}:
            return "the cache needs a mask"
        if self.longest is not None and (cache.length >= self.longest or cache.shifted):
            return f"positions may go beyond max_position_embeddings ({self.longest})"
        return "the cache was made in inference mode" if is_locked(cache.record) else ""

    def compile(self, folder: Path | None = None) -> "DecodeStep":
        """Compile the step at its first call; a growing cache compiles nothing anew.

        With a folder, steps that it may hold are compiled ahead of time and kept there.

        Only that cache's sizes are left open: with those of rows and weights, which are no
        parameters where they are joined, the compiler would be busy for minutes.
        """
        compiled = compile_often(DecodeStep._compute, dynamic=self.grows)
        torch._dynamo.mark_static(self.embedding)
        for product in self._products():
            for tensor in product.tensors:
                torch._dynamo.mark_static(tensor)

        def compute(
            step: "DecodeStep", tokens: Tensor, positions: Tensor, length: int, states: Any
        ) -> Tensor:
            if step.grows:
                torch._dynamo.mark_static(tokens)
                torch._dynamo.mark_static(positions)
            return compiled(step, tokens, positions, length, states)

        self.compiled = True
        self.faster = compute
        if folder is not None and not self.grows:
            self.faster = AheadOfTime(self, compute, folder)
        return self

    def __call__(self, tokens: Tensor, cache: DecoderCache) -> Tensor:
        """tokens int64 [B] -> logits [B, vocab]; the cache has no ``obstacle``."""
        assert cache.record is not None
        if self.may_pack and len(tokens) > MOST_LEFT:
            self.may_pack, self.packed = False, True
            for product in self._products():
                product.pack(len(tokens))
        states = [state for layer in cache.layers for state in (layer.mixer, layer.ffn or None)]
        length = cache.length if self.grows else 0  # another number would be compiled anew
        # where packed weights are multiplied the rest is faster without, unless it is compiled
        few = len(tokens) <= MOST_LEFT or (self.packed and not self.compiled)
        slow = few and onednn_is_on()
        if slow:
            switch_onednn(False)
        try:
            positions = cache.record.select(1, NEXT_POSITION)
            with for_any_length(tokens.device):
                compute = self.faster or DecodeStep._compute
                logits = compute(self, tokens, positions, length, states)
        finally:
            if slow:
                switch_onednn(True)
        cache.record.narrow(1, 0, SEGMENT).add_(1)
        cache.length += 1
        cache.rows.pop("last_hidden", None)
        return logits

    def _products(self) -> Iterator[AnyProduct]:
        yield self.output
        for _, part, _ in self.parts:
            yield from (*part.inputs, part.output)

    def _compute(
        self, tokens: Tensor, positions: Tensor, length: int, states: Sequence[Any]
    ) -> Tensor:
        assert self.number >= 0  # looked at, so that each step is compiled for itself
        hidden = F.embedding(tokens, self.embedding)
        if self.embedding_scale is not None:
            hidden = hidden * self.embedding_scale
        if self.positions is not None:
            hidden = hidden + F.embedding(positions, self.positions)
        if self.embedding_norm is not None:
            hidden = self.embedding_norm(hidden)
        shared = [part.core.shared(positions, length) for part in self.first]
        for (norm, part, kind), state in zip(self.parts, states, strict=True):
            hidden = hidden.add_(part(norm(hidden), shared[kind], state))
        return self.output(self.norm(hidden))


_numbers = itertools.count()


def step_norm(norm: Any) -> Callable[[Tensor], Tensor]:
    """The norm without its module; ``make_norm`` knows two kinds."""
    weight = norm.weight.detach()
    if isinstance(norm, nn.LayerNorm):
        shape, bias, eps = norm.normalized_shape, norm.bias.detach(), norm.eps
        return lambda x: torch.layer_norm(x, shape, weight, bias, eps)
    assert isinstance(norm, nn.RMSNorm)
    shape, rms_eps = norm.normalized_shape, norm.eps
    return lambda x: torch.rms_norm(x, shape, weight, rms_eps)
