"""The configurations of the two models: one decoder skeleton, two mixers.

A layer has 12 d^2 matrix parameters whatever its mixer and feed-forward network, because
``intermediate_size: null`` is resolved to what the mixer leaves over. Switching off a part of the
mixer (its gate, say) therefore makes the feed-forward network wider; give ``intermediate_size`` to
keep that fixed instead.
"""

import difflib
import logging
import math
from typing import Any, ClassVar

from transformers import PretrainedConfig

from .decay import DECAY_SCHEDULES
from .rotary import ROTARY_FREQUENCIES, ROTARY_LAYOUTS

logger = logging.getLogger(__name__)

NORMS = ("layernorm", "rmsnorm")
FEED_FORWARDS = ("gelu", "swiglu")
HEAD_NORMS = ("groupnorm", "rmsnorm", "none")

# Keyword arguments that transformers handles itself, beside its dataclass fields.
_TRANSFORMERS_KEYS = {
    "_attn_implementation", "_commit_hash", "_experts_implementation", "_name_or_path",
    "attn_implementation", "auto_map", "experts_implementation", "model_type", "name_or_path",
    "num_labels", "output_attentions", "per_layer_config", "quantization_config", "torch_dtype",
}  # fmt: skip


class DecoderConfig(PretrainedConfig):
    """What both models have in common.

    Args:
        vocab_size: Number of tokens.
        hidden_size: Width d of the residual stream.
        num_hidden_layers: Number of blocks.
        num_heads: H; also readable as ``num_attention_heads``.
        intermediate_size: Width of the feed-forward network; when None, what makes the layer's
            matrices hold 12 d^2 parameters.
        norm: Of the residual stream, "layernorm" or "rmsnorm".
        norm_eps: Added to the variance in it.
        ffn: "gelu" (two matrices) or "swiglu" (three).
        dropout: After the embedding, every mixer and every feed-forward network, in training.
        rotary_layout: Which channels form a rotated pair, "interleaved" or "half".
        rotary_frequencies: "linspace" (RetNet's) or "standard" (Llama's).
        rotary_base: Base of the frequencies.
        tie_word_embeddings: Whether the output layer is the embedding.
        max_position_embeddings: The window that evaluation tools use; limits nothing.
        use_cache: Whether a forward pass in eval mode returns its state.

    Raises:
        ValueError: Values that make no model; all problems in one message.
    """

    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {"num_attention_heads": "num_heads"}

    vocab_size: int = 4096
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_heads: int = 4
    intermediate_size: int = None  # type: ignore[assignment]  # resolved on construction
    norm: str = "layernorm"
    norm_eps: float = 1e-6
    ffn: str = "gelu"
    dropout: float = 0.0
    rotary_layout: str = "interleaved"
    rotary_frequencies: str = "linspace"
    rotary_base: float = 10000.0
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._warn_of_unknown(kwargs)
        problems = self._problems()
        if not problems and self.intermediate_size is None:
            self.intermediate_size = self._balanced_intermediate_size()
            if self.intermediate_size < 1:
                problems.append(
                    "intermediate_size (None) leaves nothing for the feed-forward network beside "
                    "this mixer: give it a number"
                )
        if problems:
            raise ValueError("; ".join(problems))
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        """K, the width of a head's queries and keys."""
        return self.hidden_size // self.num_heads

    @property
    def mixer_parameters(self) -> int:
        """Matrix parameters of one mixer."""
        raise NotImplementedError

    def _balanced_intermediate_size(self) -> int:
        matrices = 3 if self.ffn == "swiglu" else 2
        left = 12 * self.hidden_size**2 - self.mixer_parameters
        return math.floor(left / (matrices * self.hidden_size) + 0.5)

    def _warn_of_unknown(self, kwargs: dict[str, Any]) -> None:
        known = {*self.__dataclass_fields__, *self.attribute_map}
        for key in sorted(set(kwargs) - known - _TRANSFORMERS_KEYS):
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            logger.warning("%s has no field %r, it has no effect%s", type(self).__name__, key, hint)

    def _problems(self) -> list[str]:
        """Everything that is wrong with the values, each with key, value and fix."""
        problems = []
        for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_heads",
                    "max_position_embeddings"):  # fmt: skip
            problems += self._check_size(key)
        if self.intermediate_size is not None:
            problems += self._check_size("intermediate_size")
        problems += self._check_choice("norm", NORMS)
        problems += self._check_choice("ffn", FEED_FORWARDS)
        problems += self._check_choice("rotary_layout", ROTARY_LAYOUTS)
        problems += self._check_choice("rotary_frequencies", ROTARY_FREQUENCIES)
        problems += self._check_number("norm_eps", 0, 1)
        problems += self._check_number("dropout", 0, 1)
        problems += self._check_number("rotary_base", 0, math.inf)
        if self.rotary_base == 0:
            problems.append("rotary_base (0) must be above 0: the usual value is 10000.0")
        if self.dropout == 1:
            problems.append("dropout (1) drops everything: use a value below 1")
        for key in ("tie_word_embeddings", "use_cache"):
            if not isinstance(getattr(self, key), bool):
                problems.append(f"{key} ({getattr(self, key)!r}) must be true or false")
        if not problems and self.hidden_size % self.num_heads:
            problems.append(
                f"hidden_size ({self.hidden_size}) must be divisible by num_heads "
                f"({self.num_heads}): take {_nearest_multiple(self.hidden_size, self.num_heads)}"
            )
        elif not problems and self.head_dim % 2:
            problems.append(
                f"hidden_size ({self.hidden_size}) / num_heads ({self.num_heads}) is "
                f"{self.head_dim}, but rotation turns pairs of channels: change one of them so "
                "that it is even"
            )
        return problems

    def _check_size(self, key: str) -> list[str]:
        value = getattr(self, key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            return [f"{key} ({value!r}) must be a whole number of at least 1"]
        return []

    def _check_number(self, key: str, low: float, high: float) -> list[str]:
        value = getattr(self, key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return [f"{key} ({value!r}) must be a number"]
        if not low <= value <= high:
            return [f"{key} ({value!r}) must be between {low} and {high}"]
        return []

    def _check_choice(self, key: str, choices: tuple[str, ...]) -> list[str]:
        value = getattr(self, key)
        if value in choices:
            return []
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return [f"{key} ({value!r}) must be one of {', '.join(choices)}{hint}"]


class RetNetConfig(DecoderConfig):
    """A RetNet: multi-scale retention as mixer (arXiv 2307.08621).

    Args, beside those of ``DecoderConfig``:
        value_size: Width of all heads' values together; 2 d when None.
        head_norm: Of each head's output at each token, without learned parameters: "groupnorm"
            (mean and variance), "rmsnorm", or "none".
        head_norm_eps: Small, because retention outputs are small at a text's first tokens.
        gate: The swish gate.
        decay: "paper" (1 - 2^(-5-h)), "log_linear" (the schedule of the paper's experiments), or
            one number in (0, 1] for all heads: single-scale, 1.0 without decay.
        chunk_size: C of the chunkwise form; no effect on the result. When None, what was measured
            to be fastest for the width of a head (benchmarks/RESULTS.md): 64, from a width of 128
            on 128.
    """

    model_type = "retnet_lm"

    value_size: int = None  # type: ignore[assignment]  # resolved on construction
    head_norm: str = "groupnorm"
    head_norm_eps: float = 1e-6
    gate: bool = True
    decay: str | float = "paper"
    chunk_size: int = None  # type: ignore[assignment]  # resolved on construction

    def __post_init__(self, **kwargs: Any) -> None:
        if self.value_size is None and isinstance(self.hidden_size, int):
            self.value_size = 2 * self.hidden_size
        super().__post_init__(**kwargs)
        if self.chunk_size is None:
            self.chunk_size = 64 if self.head_dim < 128 else 128

    @property
    def mixer_parameters(self) -> int:
        # W_Q and W_K are d x d; W_V, W_O and the gate's W_G are d x value_size
        return self.hidden_size * (2 * self.hidden_size + (2 + self.gate) * self.value_size)

    def _problems(self) -> list[str]:
        problems = super()._problems()
        if self.chunk_size is not None:
            problems += self._check_size("chunk_size")
        problems += self._check_choice("head_norm", HEAD_NORMS)
        problems += self._check_number("head_norm_eps", 0, 1)
        if isinstance(self.hidden_size, int):
            problems += self._check_size("value_size")
        if not isinstance(self.gate, bool):
            problems.append(f"gate ({self.gate!r}) must be true or false")
        if isinstance(self.decay, str):
            problems += [
                f"{problem}, or a number in (0, 1]"
                for problem in self._check_choice("decay", DECAY_SCHEDULES)
            ]
        elif isinstance(self.decay, bool) or not isinstance(self.decay, int | float):
            problems.append(f"decay ({self.decay!r}) must be a name or a number in (0, 1]")
        elif not 0 < self.decay <= 1:
            problems.append(f"decay ({self.decay!r}) must be above 0 and at most 1")
        if not problems and self.value_size % self.num_heads:
            problems.append(
                f"value_size ({self.value_size}) must be divisible by num_heads "
                f"({self.num_heads}): take {_nearest_multiple(self.value_size, self.num_heads)}"
            )
        return problems


class TransformerConfig(DecoderConfig):
    """The Transformer beside it: causal softmax attention, rotary positions as in Llama."""

    model_type = "transformer_lm"

    rotary_layout: str = "half"
    rotary_frequencies: str = "standard"

    @property
    def mixer_parameters(self) -> int:
        return 4 * self.hidden_size**2


def _nearest_multiple(value: int, divisor: int) -> int:
    return max(1, round(value / divisor)) * divisor
