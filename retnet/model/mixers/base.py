"""The contract of a mixer: everything that the rest of the code asks of one.

A mixer is one file in this folder: a class of ``DecoderConfig`` with its keys, and a ``Mixer``.
Feed-forward networks are ``Part`` too, so that they may have a memory as well.

The state of a part is a dictionary of tensors with one entry per row, empty for one that remembers
nothing. It is handed in and returned, never kept on the module. With gradients off a part may write
into the tensors that it was given and return them, so that a key-value cache never copies itself;
with gradients on it never does.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ..cache import State
from ..configuration import DecoderConfig
from ..documents import TokenInfo
from ..ops.batched import batched_product
from ..ops.precision import for_products, wide_dtype
from ..ops.rotary import Rotation, rotary_angles, rotary_theta, rotation
from ..quantised import type_and_device

# Standard deviation of a fresh model's logits: small, so that training begins at a loss of
# ln(vocab_size). (The official RetNet has 1 here, which begins half a nat above.)
LOGIT_STD = 0.3


class Part(nn.Module):
    """A mixer or a feed-forward network: half of a block.

    Attributes:
        joint: Names of the linear layers that read the part's input, in the order in which ``step``
            takes their products, side by side.
        output: Name of the linear layer that ends it.
        step: A faster way for one token, without gradients, padding or a document boundary: a
            class whose instances are made of the part, see ``Step``; or None.
        no_matrices: Names of parameters with two dimensions or more that are no matrices for an
            optimizer: embeddings over positions, say. They are not decayed.
        exact: Names of linear layers whose weights are never quantised: what they give is read by
            exponential functions, say.
        wide: Names of its own parameters and buffers that are never below float32, whatever the
            model is cast to.
    """

    joint: ClassVar[tuple[str, ...]] = ()
    output: ClassVar[str] = "o_proj"
    step: ClassVar[Any] = None  # a subclass of Step
    no_matrices: ClassVar[tuple[str, ...]] = ()
    exact: ClassVar[tuple[str, ...]] = ()
    wide: ClassVar[tuple[str, ...]] = ()
    config: Any

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """What ``to``, ``half`` and the like do to all tensors; ``wide`` ones keep their digits."""
        own = [getattr(self, name) for name in self.wide]
        kept = [x for parameter in own for x in (parameter, parameter.grad) if x is not None]

        def apply(x: Tensor) -> Tensor:
            y: Tensor = fn(x)
            if any(x is other for other in kept) and y.dtype != wide_dtype(y.dtype):
                return x.to(y.device, wide_dtype(y.dtype))
            return y

        return super()._apply(apply if kept else fn, recurse)

    def init_state(
        self, rows: int, device: torch.device, dtype: torch.dtype, capacity: int | None = None
    ) -> State:
        """What it remembers before the first token, to which a document boundary returns.

        Sums are float32 or wider whatever the dtype; one that grows reserves ``capacity`` tokens.
        """
        return {}

    def shared(self, tokens: TokenInfo, memory: State) -> tuple[Any, State]:
        """What all parts of this class share in one pass, asked of the first of them.

        It returns what ``forward`` gets, and the new memory by row (only the entries of this
        class), which the next pass hands in; it is empty at first.
        """
        return tokens, {}

    def forward(
        self, hidden: Tensor, shared: Any, state: State | None = None, mode: str | None = None
    ) -> tuple[Tensor, State]:
        """Mix the tokens of each row: [B, T, d] -> [B, T, d] and the state after the last token.

        Args:
            shared: What the method of this name returned.
            state: After the earlier calls; None when there were none and none follow.
            mode: One of the mixer's forms, or None for the fastest right one.
        """
        raise NotImplementedError

    def after_step(self, step: int, seed: int) -> None:
        """What training changes besides the weights after optimizer step 1, 2, ...

        seed: Of the run. Only what follows from the arguments is the same in every process, and in
        a run that goes on.
        """


class Step:
    """One token per row through a part, between its linear layers.

    Instances are made of the part and keep what does not change from token to token.
    """

    def inputs(self, x: Tensor, state: State) -> Sequence[Tensor] | None:
        """What each ``joint`` layer reads of the part's input x [B, d], if not all of them x."""
        return None

    def gate(self, joined: Tensor) -> Tensor | None:
        """What the output layer's result [B, d] is multiplied by."""
        return None

    def shared(self, positions: Tensor, length: int) -> Any:
        """What all steps of this class share at one token.

        positions int64 [B]: of the token in each row; length: columns seen before it.
        """
        return None

    def __call__(self, joined: Tensor, shared: Any, state: State) -> Tensor:
        """The input of the output layer [B, in]; the state is changed in place.

        joined [B, sum of out]: products of the ``joint`` layers with the part's input.
        """
        raise NotImplementedError


class Mixer(Part):
    """What mixes a row's tokens.

    Attributes:
        name: Of ``model.mixer``.
        options: Its configuration: the shared keys with the mixer's own defaults, and its own.
        modes: Names of its forms, for ``mode``; empty for one that has a single form.
        ffn, positions, embedding_norm: Its own value of the configuration's key of that name.
        feed_forwards: Feed-forward networks that it brings, by their value of ``ffn``: classes with
            ``squares`` and ``matrices``, how many they have of d x d and d x intermediate_size.
        rotates: Whether it has queries and keys to rotate.
        relative: Whether positions that rotate count by their differences alone.
        unused: Shared keys of a recipe that mean nothing to it.
    """

    name: ClassVar[str]
    options: ClassVar[type[DecoderConfig]]
    modes: ClassVar[tuple[str, ...]] = ()
    ffn: ClassVar[str] = "gelu"
    positions: ClassVar[str] = "none"
    embedding_norm: ClassVar[bool] = False
    feed_forwards: ClassVar[dict[str, Any]] = {}
    rotates: ClassVar[bool] = False
    relative: ClassVar[bool] = True
    unused: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any, layer_idx: int = 0) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx

    @classmethod
    def growing(cls, config: Any) -> tuple[str, ...]:
        """Names of the entries of its state that grow with the text, tokens at dimension -2.

        config may also be a ``model`` section with its keys.
        """
        return ()

    @classmethod
    def grows(cls, config: Any) -> bool:
        """Whether the state of a model with it grows, whose layers may differ (``mixer_of``).

        config as in ``growing``.
        """
        return bool(cls.growing(config))

    @classmethod
    def bounded(cls, config: Any) -> bool:
        """Whether it is undefined beyond ``max_position_embeddings`` tokens of a document."""
        return False

    @classmethod
    def carry_problems(cls, config: Any) -> list[str]:
        """Why training can't carry a state from window to window: what follows that key in a line.

        config is a ``model`` section.
        """
        return []

    @classmethod
    def matrix_parameters(cls, config: Any) -> int:
        """Parameters of one mixer, vectors left out."""
        raise NotImplementedError

    @classmethod
    def windows(cls, config: Any) -> list[float]:
        """1 / (1 - decay) of each head in tokens; none where the decays are not fixed."""
        return []

    @classmethod
    def describe(cls, config: Any) -> list[str]:
        """Lines that say at the start of a run what its heads do."""
        return []

    def token_weights(self, hidden: Tensor, shared: Any) -> Tensor | None:
        """What each token takes of every token's values, [B, T, d] -> [B, H, T, T] by output.

        Times the heads' values it is what they give, before any norm and gate; None for a mixer
        that has no such weights. ``shared`` as in ``forward``, from the first token on.
        """
        return None

    @classmethod
    @torch.no_grad()
    def initialize(cls, module: nn.Module, role: str, config: Any) -> None:
        """Fill one module's own weights; already loaded ones are left alone (transformers' flag).

        Here GPT-2's: normal 0.02, the two output layers of a block divided by sqrt(2 layers). The
        model's output layer, and an embedding tied to it, are the same for all mixers. The module
        may be outside of all mixers; its role is the last word of its name, as "o_proj".
        """
        if isinstance(module, nn.Embedding):
            std = output_std(config) if config.tie_word_embeddings else cls.embedding_std(config)
            std = 0.02 if role == "embed_positions" else std
            init.normal_(module.weight, std=std)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            init.ones_(module.weight)
            if isinstance(module, nn.LayerNorm):
                init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            if role == "lm_head":
                init.normal_(module.weight, std=output_std(config))
            else:
                cls.initialize_linear(module, role, config)

    @classmethod
    def embedding_std(cls, config: Any) -> float:
        """Standard deviation of a fresh embedding that is not tied to the output layer."""
        return 0.02

    @classmethod
    def initialize_linear(cls, linear: nn.Linear, role: str, config: Any) -> None:
        """Fill a linear layer of a block."""
        ends_block = role in ("o_proj", "down_proj")
        depth = (2 * config.num_hidden_layers) ** -0.5 if ends_block else 1.0
        init.normal_(linear.weight, std=0.02 * depth)


class ProjectedMixer(Mixer):
    """A mixer of queries, keys and values, all of them and its output as wide as the model."""

    joint = ("q_proj", "k_proj", "v_proj")

    def __init__(self, config: Any, layer_idx: int = 0) -> None:
        super().__init__(config, layer_idx)
        hidden = config.hidden_size
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, hidden, bias=False)
        self.v_proj = nn.Linear(hidden, hidden, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    @classmethod
    def matrix_parameters(cls, config: Any) -> int:
        count: int = 4 * config.hidden_size**2
        return count

    def project(self, hidden: Tensor) -> list[Tensor]:
        """Queries, keys and values [B, H, T, K] of [B, T, d]."""
        x, layers = for_products(hidden), (self.q_proj, self.k_proj, self.v_proj)
        return [split_heads(layer(x), self.config.num_heads) for layer in layers]


def output_std(config: Any) -> float:
    """Standard deviation of a fresh output layer."""
    return min(0.02, LOGIT_STD * config.hidden_size**-0.5)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, T, H * D] -> [B, H, T, D]."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def one_token_each(x: Tensor) -> Tensor:
    """Values of which each token has one to itself, for the x [B, H, T, D]: [B, H, T, T]."""
    batch, heads, length, _ = x.shape
    tokens = torch.eye(length, dtype=x.dtype, device=x.device)
    return tokens.expand(batch, heads, length, length)


def make_rotation(config: Any, tokens: TokenInfo) -> Rotation:
    """The rotation of a pass's positions, in at least float32; by nothing where none is wanted."""
    turned = config.positions == "rotary"
    angles = rotary_angles(
        tokens.positions if turned else tokens.positions.new_zeros(1, 1),
        config.head_dim,
        frequencies=config.rotary_frequencies,
        base=config.rotary_base,
    )
    cos, sin = rotation(angles, wide_dtype(tokens.dtype), tokens.device)
    return Rotation(cos, sin, config.rotary_layout)


class RotaryStep(Step):
    """A step that rotates queries and keys together, [B, 2H, 1, K]."""

    def __init__(self, mixer: Any) -> None:
        config = mixer.config
        dtype, device = type_and_device(mixer.o_proj)
        self.layout, self.num_heads = config.rotary_layout, config.num_heads
        self.dtype = wide_dtype(dtype)  # of what is summed
        self.theta = rotary_theta(
            config.head_dim,
            frequencies=config.rotary_frequencies,
            base=config.rotary_base,
            device=device,
        )
        if config.positions != "rotary":
            self.theta = torch.zeros_like(self.theta)

    def shared(self, positions: Tensor, length: int) -> Any:
        angles = positions[:, None, None] * self.theta  # float64 [B, 1, K/2]
        return Rotation(*rotation(angles, self.dtype, positions.device), self.layout)


def read_state(q: Tensor, state: Tensor) -> Tensor:
    """q S for a step: [B, H, 1, K], [B, H, K, V] -> [B, H, 1, V]."""
    rows, heads, _, width = q.shape
    # strides as of a matrix of one row, also where compilers think them irrelevant
    q = q.contiguous().as_strided((rows * heads, 1, width), (width, width, 1))
    return batched_product(q, state.flatten(0, 1)).view(rows, heads, 1, -1)
