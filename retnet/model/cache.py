"""What a model remembers between calls, as one of transformers' ``Cache`` objects.

It is generic: a dictionary of tensors for each part of each layer (the mixers' and feed-forward
networks' own states, see ``mixers.base``) and one for the rows. Every tensor has one entry per row,
so beams, copies and saved states need to know no more than that.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

State = dict[str, Tensor]
PARTS = ("mixer", "ffn")


class LayerState(CacheLayerMixin):
    """The states of one block.

    Args:
        growing: Names of the mixer's entries that grow with the text, tokens at dimension -2.

    Attributes:
        mixer, ffn: Of the two parts; empty before the first token.
    """

    def __init__(self, growing: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.growing = growing
        self.mixer: State = {}
        self.ffn: State = {}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("the model writes its own cache")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


class DecoderCache(Cache):
    """The memory of some rows: a state for each layer, and what a model keeps of each row.

    Args:
        growing: For each layer the names of the entries that grow, see ``LayerState``.
        capacity: Tokens to reserve at once in those; more are reserved when they are full.

    Attributes:
        length: Columns seen, padding included.
        shifted: Whether a call said its tokens' positions, which then may be more than their count.
        rows: By row: ``record`` int64 [B, 3] (see ``documents``), ``last_hidden`` [B, d] (each
            row's last output, kept while calls have a mask), and what mixers keep there.
    """

    layers: list[Any]
    _is_user_defined: bool  # set by transformers

    def __init__(self, growing: list[tuple[str, ...]], capacity: int | None = None) -> None:
        super().__init__(layers=[LayerState(names) for names in growing])
        self.capacity = capacity
        self.length, self.shifted = 0, False
        self.rows: State = {}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.length + query_length, 0

    @property
    def record(self) -> Tensor | None:
        """int64 [B, 3]; None before the first call."""
        return self.rows.get("record")

    @property
    def batch_size(self) -> int:
        return -1 if self.record is None else self.record.shape[0]

    def num_bytes(self) -> int:
        """Bytes of all layers' states and of what is kept by row; of what grows, the used part."""
        total = sum(x.numel() * x.element_size() for x in self.rows.values())
        for layer in self.layers:
            for part in PARTS:
                for name, x in getattr(layer, part).items():
                    grows = part == "mixer" and name in layer.growing
                    used = x.narrow(-2, 0, self.length) if grows else x
                    total += used.numel() * used.element_size()
        return total

    def tensors(self) -> dict[str, Tensor]:
        """All that is held, by a name that says where: "record", "layers.0.mixer.state"."""
        return {name: holder[key] for name, holder, key in self._places()}

    def put(self, name: str, x: Tensor) -> None:
        """Put a tensor where ``tensors`` names it."""
        first, *rest = name.split(".")
        if first == "layers":
            index, part, key = rest
            getattr(self.layers[int(index)], part)[key] = x
        else:
            self.rows[name] = x

    def reset(self) -> None:
        self.rows = {}
        for layer in self.layers:
            layer.mixer, layer.ffn = {}, {}
        self.length, self.shifted = 0, False

    def __deepcopy__(self, memo: dict[int, Any]) -> "DecoderCache":
        """A memory of its own, whatever made this one; with gradients on, in the same graph."""
        new = type(self)([layer.growing for layer in self.layers], self.capacity)
        new.length, new.shifted = self.length, self.shifted
        for name, x in self.tensors().items():
            new.put(name, x.clone())
        return new

    def detach(self) -> None:
        """Cut the memory from the graph that made it, to carry it to the next training window."""
        self._map(Tensor.detach)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices.to(x.device)])

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError(
            f"a {type(self).__name__} can't go back: copy.deepcopy it where you want to return"
        )

    def _places(self) -> Iterator[tuple[str, State, str]]:
        for key in self.rows:
            yield key, self.rows, key
        for index, layer in enumerate(self.layers):
            for part in PARTS:
                holder = getattr(layer, part)
                for key in holder:
                    yield f"layers.{index}.{part}.{key}", holder, key

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor; all of them have one entry per row."""
        for _, holder, key in list(self._places()):
            holder[key] = change(holder[key])


def is_locked(x: Tensor) -> bool:
    """Whether x can't be written here: what inference_mode made, outside it.

    A compiled step can't ask; it runs in inference mode whenever its state was made there.
    """
    if torch.compiler.is_compiling():
        return False
    return x.is_inference() and not torch.is_inference_mode_enabled()
