"""What the models remember between calls, as transformers ``Cache`` objects.

``RetentionCache`` holds one state [B, H, K, V] per layer: its size never changes. ``KVCache`` holds
every token's keys and values in buffers that double when full, so that no token copies the past.
Both keep a record per row (see ``sequence``), so the position lives in the state.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class _Layer(CacheLayerMixin):
    """The part of transformers' layer interface that both kinds of memory answer alike."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("the model writes its own cache")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1

    def tensors(self) -> list[str]:
        """Names of the attributes that hold one entry per row."""
        raise NotImplementedError


class RetentionLayer(_Layer):
    """One layer's state [B, H, K, V], float32 (or float64); None before the first token."""

    def __init__(self) -> None:
        super().__init__()
        self.state: Tensor | None = None

    def tensors(self) -> list[str]:
        return ["state"]


class KVLayer(_Layer):
    """One layer's keys and values: buffers [B, H, capacity, K] of which ``length`` is used."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.keys: Tensor
        self.values: Tensor
        self.capacity = capacity
        self.length = 0

    def tensors(self) -> list[str]:
        return ["keys", "values"]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add [B, H, T, K] of new tokens; returns all keys and values so far."""
        end = self.length + keys.shape[2]
        if torch.is_grad_enabled() and keys.requires_grad:
            # autograd needs the old values as they were: no writing in place
            if self.length:
                keys = torch.cat((self.keys[:, :, : self.length], keys), dim=2)
                values = torch.cat((self.values[:, :, : self.length], values), dim=2)
            self.keys, self.values = keys, values
        else:
            self._reserve(keys, values, end)
            self.keys[:, :, self.length : end] = keys
            self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _reserve(self, keys: Tensor, values: Tensor, end: int) -> None:
        present = 0 if self.keys is None else self.keys.shape[2]
        if end <= present and not locked(self.keys):
            return
        capacity = max(end, self.capacity, 2 * present if end > present else present)
        for name, new in (("keys", keys), ("values", values)):
            buffer = new.new_empty(*new.shape[:2], capacity, new.shape[3])
            if self.length:
                buffer[:, :, : self.length] = getattr(self, name)[:, :, : self.length]
            setattr(self, name, buffer)


def locked(x: Tensor | None) -> bool:
    """Whether x can't be written here: what inference_mode made, outside it.

    A compiled step can't ask; it runs in inference mode whenever its cache was made there.
    """
    if x is None or torch.compiler.is_compiling():
        return False
    return x.is_inference() and not torch.is_inference_mode_enabled()


class DecoderCache(Cache):
    """The rows' memory: one layer object per model layer and the rows' record.

    Attributes:
        length: Columns seen, padding included.
        record: int64 [B, 3] (see ``sequence``); None before the first call.
        last_hidden: [B, d], each row's last output, kept while calls have a mask; else None.
    """

    _row_tensors: tuple[str, ...] = ("record", "last_hidden")
    layers: list[Any]

    def __init__(self, layers: list[Any]) -> None:
        super().__init__(layers=layers)
        self.length = 0
        self.record: Tensor | None = None
        self.last_hidden: Tensor | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.length + query_length, 0

    @property
    def batch_size(self) -> int:
        return -1 if self.record is None else self.record.shape[0]

    def num_bytes(self) -> int:
        """Bytes that the memory of all rows takes: the state, or the used part of the buffers."""
        raise NotImplementedError

    def reset(self) -> None:
        self._map(lambda _: None)
        self.length = 0

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

    def _map(self, change: Callable[[Tensor], Tensor | None]) -> None:
        """Replace every tensor that has one entry per row."""
        owners = [(self, self._row_tensors), *((x, x.tensors()) for x in self.layers)]
        for owner, names in owners:
            for name in names:
                if getattr(owner, name) is not None:
                    setattr(owner, name, change(getattr(owner, name)))


class RetentionCache(DecoderCache):
    """The recurrent state of a RetNet: constant size, whatever the number of tokens."""

    def __init__(self, num_layers: int) -> None:
        super().__init__([RetentionLayer() for _ in range(num_layers)])

    def num_bytes(self) -> int:
        states = [layer.state for layer in self.layers if layer.state is not None]
        held = (*states, self.record, self.last_hidden)
        return sum(x.numel() * x.element_size() for x in held if x is not None)


class KVCache(DecoderCache):
    """Keys and values of a Transformer.

    Args:
        num_layers: Of the model.
        capacity: Columns to reserve at the first call; more are reserved by doubling.

    Attributes:
        valid: bool [B, length], False at padding; None while there was none.
        document_start: int64 [B], the column where the row's last document begins; None while every
            row is one document.
    """

    _row_tensors = ("record", "last_hidden", "valid", "document_start")

    def __init__(self, num_layers: int, capacity: int = 0) -> None:
        super().__init__([KVLayer(capacity) for _ in range(num_layers)])
        self.valid: Tensor | None = None
        self.document_start: Tensor | None = None

    def reset(self) -> None:
        super().reset()
        for layer in self.layers:
            layer.length = 0

    def num_bytes(self) -> int:
        total = 0
        for layer in self.layers:
            for x in (layer.keys, layer.values):
                if x is not None:
                    total += x[:, :, : layer.length].numel() * x.element_size()
        return total
