"""Random cases for the parity matrix: a small model in one precision and what it is given."""

import random
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retnet.model import MIXERS
from retnet.model.cache import DecoderCache
from retnet.model.causal_lm import DecoderForCausalLM
from retnet.model.mixers.base import Mixer
from retnet.model.models import model_class

VOCAB, PAD = 64, 0
LONGEST = 64  # tokens of a text, where positions are weights: no case has more
HYBRID = "hybrid"
KINDS: dict[str, type[Mixer]] = MIXERS | {HYBRID: MIXERS["retention"]}
PRECISIONS = ("float64", "float32", "bfloat16 weights", "bfloat16 autocast")
# what is drawn for each kind beside what they share
DRAWN: dict[str, dict[str, Sequence[Any]]] = {
    "retention": {
        "head_norm": ("groupnorm", "rmsnorm"),
        "decay": ("paper", "log_linear", 0.9),
        "gate": (True, True, True, False),
        "chunk_size": range(1, 10),
    },
    "linear": {"chunk_size": range(1, 10), "positions": ("rotary", "learned")},
    "performer": {"num_features": (8, 16, None), "positions": ("rotary", "learned")},
    "aft": {
        "aft_variant": ("local", "simple", "full"),
        "aft_window": (1, 4, 9),
        "aft_rank": (2, 4),
    },
    "rwkv": {"ffn": ("rwkv", "rwkv", "gelu"), "chunk_size": range(2, 10)},
    "gated_retention": {
        "head_norm": ("groupnorm", "rmsnorm"),
        "gate": (True, True, True, False),
        "chunk_size": range(1, 10),
    },
    HYBRID: {
        "attention_layers": ([0], [1]),
        "attention_window": (None, 3, 8),
        "chunk_size": range(1, 10),
    },
}


def make_model(kind: str, draw: random.Random) -> DecoderForCausalLM:
    """A two-layer model of a random variant; its weights are exact in every precision."""
    mixer = KINDS[kind]
    heads = draw.choice((1, 2, 4))
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 16 * heads,
        "num_hidden_layers": 2,
        "num_heads": heads,
        "norm": draw.choice(("layernorm", "rmsnorm")),
        "ffn": draw.choice(("gelu", "swiglu")),
        "rotary_layout": draw.choice(("interleaved", "half")),
        "tie_word_embeddings": draw.random() < 0.5,
        "max_position_embeddings": LONGEST,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": PAD,
    }
    torch.manual_seed(draw.randrange(2**32))
    values |= {key: draw.choice(own) for key, own in DRAWN.get(kind, {}).items()}
    known = mixer.options.__dataclass_fields__.keys() - {*mixer.unused}
    if values.get("positions") == "learned":
        known -= {"rotary_layout"}
    if values.get("aft_variant", "local") != "local":
        known -= {"aft_window"}
    model_type: Any = model_class(mixer.name)
    values = {key: value for key, value in values.items() if key in known}
    model: DecoderForCausalLM = model_type(model_type.config_class(**values))
    with torch.no_grad():
        for weight in model.parameters():
            wider = 1.0 if weight.dim() == 1 else 2.0  # fresh weights hide differences
            if weight.dim() > 1 and weight.std() < 1e-3:  # RWKV's begin at 0 and would hide all
                weight.normal_(std=0.2)
            weight.copy_((weight * wider).bfloat16())
    return model.eval()


@dataclass(frozen=True)
class Case:
    """One random model in one precision.

    Attributes:
        wide: The model in float64.
        model: The same weights in this precision.
        precision: One of ``PRECISIONS``.
        draw: Source of the random situation; the same one in every precision.
    """

    wide: DecoderForCausalLM
    model: DecoderForCausalLM
    precision: str
    draw: random.Random

    @property
    def modes(self) -> tuple[str, ...]:
        """The forms of the model's mixer, the recurrent one last; none where there is one form."""
        modes: tuple[str, ...] = self.model.config.mixer_class.modes
        return modes

    def mode(self) -> str | None:
        return self.draw.choice(self.modes) if self.modes else None

    def autocast(self) -> AbstractContextManager[Any]:
        if self.precision != "bfloat16 autocast":
            return nullcontext()
        return torch.autocast("cpu", dtype=torch.bfloat16)

    def logits(self, ids: Tensor, **arguments: Any) -> Tensor:
        """Float64 logits without gradients."""
        with torch.no_grad(), self.autocast():
            return self.model(input_ids=ids, **arguments).logits.double()

    def ids(self, rows: int, length: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.draw.randrange(2**32))
        return torch.randint(1, VOCAB, (rows, length), generator=generator)

    def batch(self) -> dict[str, Tensor]:
        """Rows with padding on a random side (or none) and several documents (or one)."""
        rows, length = self.draw.randint(1, 3), self.draw.randint(2, 30)
        ids = self.ids(rows, length)
        mask = torch.ones_like(ids)
        side = self.draw.choice(("left", "right", "none"))
        for row in range(rows if side != "none" else 0):
            padding = self.draw.randint(0, length - 1)
            mask[row, slice(0, padding) if side == "left" else slice(length - padding, None)] = 0
        batch = {"input_ids": ids.where(mask == 1, PAD), "attention_mask": mask}
        if self.draw.random() < 0.5:
            new = [[self.draw.random() < 0.2 for _ in range(length)] for _ in range(rows)]
            batch["segment_ids"] = torch.tensor(new).cumsum(1)
        return batch

    def memory(self, rows: int) -> DecoderCache:
        """Empty, or that of an earlier text."""
        cache = self.model.new_cache()
        if self.draw.random() < 0.5:
            self.logits(self.ids(rows, self.draw.randint(1, 12)), past_key_values=cache)
        return cache

    def pieces(self, length: int) -> list[slice]:
        cuts = {self.draw.randrange(1, length) for _ in range(self.draw.randint(1, 3))}
        ends = [*sorted(cuts), length]
        return [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]
