"""train.carry_state: a window begins with the state that its row's window before ended with.

The state is detached, so gradients stay within a window while memory reaches beyond it. There is
one cache for each micro-step, because each has rows (lanes) of its own.
"""

import copy
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor

from retnet.checkpoints.format import CARRIED, COPY_AGAIN
from retnet.checkpoints.match import check_finite
from retnet.checkpoints.weights import read_file
from retnet.errors import UserError
from retnet.model.cache import DecoderCache
from retnet.model.causal_lm import DecoderForCausalLM


class CarriedState:
    """The states of this process's rows after the last completed optimizer step."""

    def __init__(self, model: DecoderForCausalLM, micro_steps: int) -> None:
        self._model = model
        self._caches = [model.new_cache() for _ in range(micro_steps)]
        self._next: list[DecoderCache] = []

    def begin(self, micro_step: int) -> DecoderCache:
        """The memory to run a micro-step with; a copy, as the step may be abandoned."""
        if micro_step == 0:
            self._next = []
        return copy.deepcopy(self._caches[micro_step])

    def end(self, cache: DecoderCache) -> None:
        """Take the memory back after the micro-step."""
        cache.detach()
        self._next.append(cache)

    def commit(self) -> None:
        """The optimizer step is complete."""
        self._caches = self._next

    def gather(self, accelerator: Accelerator) -> dict[str, Tensor]:
        """The states of all rows of the global batch, to be saved; every process must call this."""
        tensors: dict[str, Tensor] = {"length": torch.tensor([self._caches[0].length])}
        held = [cache.tensors() for cache in self._caches]
        for name in held[0]:
            parts = [accelerator.gather(own[name].contiguous()) for own in held]
            tensors[name] = torch.cat(parts).cpu().contiguous()
        return tensors

    def load(self, folder: Path, accelerator: Accelerator, global_batch: int) -> None:
        """Take this process's rows of what a checkpoint holds for all rows of a step.

        A ``UserError`` where it holds no such states of this model.
        """
        file = folder / CARRIED
        if not file.is_file():
            raise UserError(
                f"checkpoint ({folder}) has no {CARRIED}, it was made without train.carry_state: "
                "set it to false, or use the weights alone with model.init_from"
            )
        try:
            stored = {_name_now(name): rows for name, rows in read_file(file).items()}
        except SafetensorError as error:
            raise UserError(f"{file} can't be read: {error}; {COPY_AGAIN}") from error
        expected = self._expected(global_batch)
        for name in sorted(expected.keys() | stored.keys()):
            if name not in expected and not name.startswith("layers."):
                continue  # what mixers keep by row is their own affair
            here, there = _form(expected.get(name)), _form(stored.get(name))
            if here != there:
                raise UserError(f"{file}: {name} is {there}, where {here} is needed: {COPY_AGAIN}")
        check_finite(stored, str(file))
        length = int(stored.pop("length"))
        world_size, rank = accelerator.num_processes, accelerator.process_index
        for micro_step, cache in enumerate(self._caches):
            cache.length = length
            part = micro_step * world_size + rank
            for name, rows in stored.items():
                own = rows.chunk(len(self._caches) * world_size)[part]
                cache.put(name, own.to(accelerator.device, copy=True))

    def _expected(self, rows: int) -> dict[str, Tensor]:
        """What a checkpoint holds of so many rows, without values."""
        cache, meta = self._model.new_cache(), torch.device("meta")
        cache.rows = {"record": torch.empty(rows, 3, dtype=torch.int64, device=meta)}
        for layer, own in zip(self._model.model.layers, cache.layers, strict=True):
            own.mixer = layer.mixer.init_state(rows, meta, torch.float32)
            own.ffn = layer.ffn.init_state(rows, meta, torch.float32)
        length = torch.empty(1, dtype=torch.int64, device=meta)
        return {"length": length, **cache.tensors()}


def _name_now(name: str) -> str:
    """Runs of before mixers named their tensors have "layers.0"."""
    return f"{name}.mixer.state" if name.removeprefix("layers.").isdigit() else name


def _form(x: Tensor | None) -> str:
    if x is None:
        return "absent"
    return f"{tuple(x.shape)} of {'floats' if x.is_floating_point() else x.dtype}"
