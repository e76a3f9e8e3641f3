"""What the configurations of all models share; each mixer's file adds its own keys.

A layer has 12 d^2 matrix parameters whatever its mixer and feed-forward network, because
``intermediate_size: null`` is resolved to what the mixer leaves over, a layer's share of a table of
positions counted too. Switching off a part of the mixer (its gate, say) therefore makes the
feed-forward network wider; give ``intermediate_size`` to keep that fixed instead.
"""

import difflib
import logging
import math
import reprlib
from dataclasses import field
from typing import Any, ClassVar

from transformers import PretrainedConfig

from .ops.rotary import ROTARY_FREQUENCIES, ROTARY_LAYOUTS

logger = logging.getLogger(__name__)

NORMS = ("layernorm", "rmsnorm")
# and how many matrices of d x intermediate_size
FEED_FORWARDS = {"gelu": 2, "swiglu": 3, "geglu": 3, "reglu": 3}
MOST_SIZE = 1 << 40  # of a tensor's size; the bytes of larger ones are beyond 64 bits
POSITIONS = ("rotary", "learned", "none")

# Keyword arguments that transformers handles itself, beside its dataclass fields.
_TRANSFORMERS_KEYS = {
    "_attn_implementation", "_commit_hash", "_experts_implementation", "_name_or_path",
    "attn_implementation", "auto_map", "experts_implementation", "model_type", "name_or_path",
    "num_labels", "output_attentions", "per_layer_config", "quantization_config", "torch_dtype",
}  # fmt: skip


QUANTISED = "quantization_config"  # the key that transformers has for it
QUANT_METHOD = "retnet"  # of that: weights that load_checkpoint reads


def option(default: Any, text: str, *, meaning: bool = False) -> Any:
    """A key of the ``model`` section of a recipe.

    Args:
        default: None where it is resolved on construction.
        text: Its line in ``--help``.
        meaning: Whether weights are trained for its value without a shape that would show it.
    """
    return field(default=default, metadata={"help": text, "meaning": meaning})


class DecoderConfig(PretrainedConfig):
    """What all models have in common; each key's help text says what it is.

    ``num_heads`` is also readable as ``num_attention_heads``; ``max_position_embeddings`` is the
    window that evaluation tools use and limits nothing; ``use_cache`` is about passes in eval mode.
    The class attribute ``mixer_class`` makes it the configuration of a RetNet, a Transformer, ...

    Raises:
        ValueError: Values that make no model; all problems in one message.
    """

    mixer_class: ClassVar[Any]

    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]
    attribute_map: ClassVar[dict[str, str]] = {"num_attention_heads": "num_heads"}
    auto_map: ClassVar[dict[str, str]] = {}  # TRL reads it of every configuration

    vocab_size: int = 4096
    hidden_size: int = option(256, "width d of the residual stream")
    num_hidden_layers: int = option(4, "number of blocks")
    num_heads: int = option(4, "heads of the mixer", meaning=True)
    intermediate_size: int = option(
        None, "width of the feed-forward network; null: 12 d^2 matrix parameters in a layer"
    )
    norm: str = option("layernorm", "layernorm or rmsnorm")
    norm_eps: float = option(1e-6, "added to what these norms divide by", meaning=True)
    ffn: str = option(
        None,
        "gelu, swiglu, geglu, reglu, or one that the mixer brings; null: the mixer's own",
        meaning=True,
    )
    positions: str = option(None, "rotary, learned or none; null: the mixer's own", meaning=True)
    embedding_norm: bool = option(None, "a norm after the embedding; null: the mixer's own")
    scale_embedding: bool = option(False, "the embedding times sqrt(hidden_size)", meaning=True)
    dropout: float = option(0.0, "after embedding, mixers, feed-forward networks")
    rotary_layout: str = option("interleaved", "interleaved or half", meaning=True)
    rotary_frequencies: str = option("linspace", "linspace or standard", meaning=True)
    rotary_base: float = 10000.0
    tie_word_embeddings: bool = option(False, "the output layer is the embedding")
    max_position_embeddings: int = 2048
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        quantised = kwargs.get(QUANTISED)
        if isinstance(quantised, dict) and quantised.get("quant_method") == QUANT_METHOD:
            raise ValueError(
                f"{QUANTISED} ({quantised.get('weights')}) is of quantised weights, which "
                "retnet.checkpoints.load_checkpoint reads and transformers does not: load the "
                "checkpoint that they were made of"
            )
        self._warn_of_unknown(kwargs)
        self.resolve()
        problems = self.problems()
        if not problems and self.intermediate_size is None:
            problems += self.settle_intermediate_size()
        if problems:
            raise ValueError("; ".join(problems))
        if self._auto_class is None:  # this code is installed, and not the checkpoint's own
            kwargs.pop("auto_map", None)
        super().__post_init__(**kwargs)

    def mixer_of(self, layer_idx: int) -> Any:
        """The mixer's class in a layer, counted from 0."""
        return self.mixer_class

    def config_of(self, layer_idx: int) -> Any:
        """The configuration of a layer, made when asked; the same where layers do not differ."""
        return self

    def resolve(self) -> None:
        """Put the mixer's own values for what is None; called on construction, before checks."""
        if self.ffn is None:
            self.ffn = self.mixer_class.ffn
        if self.positions is None:
            self.positions = self.mixer_class.positions
        if self.embedding_norm is None:
            self.embedding_norm = self.mixer_class.embedding_norm

    @property
    def longest(self) -> int | None:
        """Tokens of the longest document that is defined: T_max of what is indexed by position."""
        bounded = self.positions == "learned" or self.mixer_class.bounded(self)
        return self.max_position_embeddings if bounded else None

    @property
    def head_dim(self) -> int:
        """K, the width of a head's queries and keys."""
        return self.hidden_size // self.num_heads

    @property
    def mixer_parameters(self) -> int:
        """Matrix parameters of one mixer."""
        count: int = self.mixer_class.matrix_parameters(self)
        return count

    @property
    def position_parameters(self) -> int:
        """Of the table of learned positions."""
        return self.max_position_embeddings * self.hidden_size * (self.positions == "learned")

    @property
    def _taken_parameters(self) -> float:
        """What a layer has besides its feed-forward network."""
        return self.mixer_parameters + self.position_parameters / self.num_hidden_layers

    def _large_keys(self) -> str:
        """For messages: the keys, with values, that those parameters grow with."""
        shared, whole, found = DecoderConfig.__dataclass_fields__, self._taken_parameters, []
        for key in self.__dataclass_fields__.keys() - shared.keys() | {"max_position_embeddings"}:
            value = getattr(self, key)
            if type(value) is int:
                setattr(self, key, 1)
                found += [f"{key} ({value})"] if self._taken_parameters < whole else []
                setattr(self, key, value)
        return ", ".join(sorted(found)) or "this mixer"

    def keys_of_size(self, size: int) -> str:
        """For messages: the keys, with values, that a tensor may have its largest size from."""
        found = [key for key in self.__dataclass_fields__ if getattr(self, key) == size]
        return ", ".join(f"{key} ({size})" for key in sorted(found)) or f"a size ({size})"

    def settle_intermediate_size(self) -> list[str]:
        """Resolve one that is null; the problem where too little is left for it, if so."""
        self.intermediate_size = self._balanced_intermediate_size()
        if self.intermediate_size >= self.hidden_size:
            return []
        return [
            f"{self._large_keys()} leaves less than hidden_size ({self.hidden_size}) of a layer's "
            "12 d^2 parameters for the feed-forward network: make it smaller, or give "
            "intermediate_size a number"
        ]

    def _balanced_intermediate_size(self) -> int:
        own = self.mixer_class.feed_forwards.get(self.ffn)
        squares, matrices = (own.squares, own.matrices) if own else (0, FEED_FORWARDS[self.ffn])
        left = (12 - squares) * self.hidden_size**2 - self._taken_parameters
        return math.floor(left / (matrices * self.hidden_size) + 0.5)

    def _warn_of_unknown(self, kwargs: dict[str, Any]) -> None:
        known = {*self.__dataclass_fields__, *self.attribute_map}
        for key in sorted(set(kwargs) - known - _TRANSFORMERS_KEYS):
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            logger.warning("%s has no field %r, it has no effect%s", type(self).__name__, key, hint)

    def problems(self) -> list[str]:
        """Everything that is wrong with the values, each with key, value and fix."""
        problems = []
        for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_heads",
                    "max_position_embeddings"):  # fmt: skip
            problems += self.check_size(key)
        if self.intermediate_size is not None:
            problems += self.check_size("intermediate_size")
        problems += self._check_ids()
        problems += self.check_choice("norm", NORMS)
        problems += self.check_choice("ffn", (*FEED_FORWARDS, *self.mixer_class.feed_forwards))
        problems += self.check_choice("positions", POSITIONS)
        if self.positions == "rotary" and not self.mixer_class.rotates:
            problems.append(
                f"positions ('rotary') has no meaning for {self.mixer_class.name}, which has no "
                "queries and keys to rotate: take learned or none"
            )
        problems += self.check_choice("rotary_layout", ROTARY_LAYOUTS)
        problems += self.check_choice("rotary_frequencies", ROTARY_FREQUENCIES)
        problems += self.check_number("norm_eps", 0, 1)
        problems += self.check_number("dropout", 0, 1)
        problems += self.check_number("rotary_base", 1, math.inf)  # below, all turn too fast
        if self.dropout == 1:
            problems.append("dropout (1) drops everything: use a value below 1")
        for key in ("tie_word_embeddings", "use_cache", "embedding_norm", "scale_embedding"):
            if not isinstance(getattr(self, key), bool):
                problems.append(f"{key} ({getattr(self, key)!r}) must be true or false")
        if "num_heads" in self.mixer_class.unused:
            return problems
        if not problems and self.hidden_size % self.num_heads:
            problems.append(
                f"hidden_size ({self.hidden_size}) must be divisible by num_heads "
                f"({self.num_heads}): take {nearest_multiple(self.hidden_size, self.num_heads)}"
            )
        elif not problems and self.head_dim % 2 and self.mixer_class.rotates:
            problems.append(
                f"hidden_size ({self.hidden_size}) / num_heads ({self.num_heads}) is "
                f"{self.head_dim}, but rotation turns pairs of channels: change one of them so "
                "that it is even"
            )
        return problems

    def _check_ids(self) -> list[str]:
        """The problems of the special tokens' ids, which other libraries compare with numbers."""
        problems = []
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, key)
            several = key == "eos_token_id"
            ids = value if several and isinstance(value, list) else [value]
            if value is not None and any(type(token) is not int for token in ids):
                rule = "a whole number, a list of them" if several else "a whole number"
                problems.append(f"{key} ({reprlib.repr(value)}) must be {rule} or null")
            elif value is not None and not self._are_ids(ids):
                problems.append(
                    f"{key} ({reprlib.repr(value)}) must be in the vocabulary, from 0 to "
                    f"vocab_size - 1 ({self.vocab_size - 1}), or null"
                )
        return problems

    def _are_ids(self, tokens: list[int]) -> bool:
        """Whether all are in the vocabulary; True where the vocabulary itself is wrong."""
        wrong = self.check_size("vocab_size")
        return bool(wrong) or all(0 <= token < self.vocab_size for token in tokens)

    def check_size(self, key: str, most: int | None = MOST_SIZE) -> list[str]:
        """The problem of a key whose value must be a count up to ``most``, if it is one."""
        value = getattr(self, key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            return [f"{key} ({value!r}) must be a whole number of at least 1"]
        if most is not None and value > most:
            return [f"{key} ({value}) must be at most {most}"]
        return []

    def check_number(self, key: str, low: float, high: float) -> list[str]:
        """The problem of a key whose value must be a number from low to high, if it is one."""
        value = getattr(self, key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return [f"{key} ({value!r}) must be a number"]
        if not low <= value <= high or value == math.inf:
            rule = f"between {low} and {high}" if high < math.inf else f"finite and at least {low}"
            return [f"{key} ({value!r}) must be {rule}"]
        return []

    def check_choice(self, key: str, choices: tuple[str, ...]) -> list[str]:
        """The problem of a key whose value must be one of these, if it is one."""
        value = getattr(self, key)
        if value in choices:
            return []
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return [f"{key} ({value!r}) must be one of {', '.join(choices)}{hint}"]


def nearest_multiple(value: int, divisor: int) -> int:
    """For messages: the positive multiple that is nearest to a value."""
    return max(1, round(value / divisor)) * divisor
