"""Other people's RetNets, as contenders: torchscale, the official code, and yet-another-retnet.

Both come from PyPI, see benchmarks/requirements.txt, and may be absent.

torchscale imports one function of timm, drop_path, whose package needs a torchvision that has no
build for CPUs. Drop path is off in all our cases, so where timm is missing that import gets a
stand-in, which refuses to be called.
"""

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contenders import PAIRS_LIMIT, Contender, Field, Size

CHUNK_SIZE = 128  # of both implementations' chunkwise forms
TORCHSCALE, YET_ANOTHER = "torchscale", "yet-another-retnet"
TIMM_NOTE = "torchscale runs with a stand-in for timm's drop_path, which is off here"


class Torchscale(Contender):
    """The official RetNetDecoder, in its parallel or its chunkwise form.

    Neither hands a state over to the recurrent one: ``read`` keeps nothing, and a context to decode
    from is read token by token.
    """

    def __init__(self, name: str, model: nn.Module, longest: int | None, *, chunkwise: bool):
        super().__init__(name, model, longest)
        self.chunkwise = chunkwise

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        self.model.chunkwise_recurrent = self.chunkwise
        return _cross_entropy(self.model(ids)[0], targets)

    def read(self, ids: Tensor, room: int = 0) -> object:
        self.model.chunkwise_recurrent = self.chunkwise
        hidden, _ = self.model(ids, features_only=True)
        return self.model.output_layer(hidden[:, -1:])

    def remember(self, ids: Tensor, room: int) -> object:
        memory: list[Any] = [ids[:, :0], {}]
        for token in ids.unbind(1):
            self.decode(memory, token)
        return memory

    def decode(self, memory: Any, token: Tensor) -> Tensor:
        self.model.chunkwise_recurrent = False  # it would fill the token up to a chunk
        memory[0] = torch.cat((memory[0], token[:, None]), dim=1)  # it counts positions by them
        logits: Tensor = self.model(memory[0], incremental_state=memory[1])[0][:, -1]
        return logits


class YetAnother(Contender):
    """yet-another-retnet, in its parallel form or chunk by chunk."""

    def __init__(self, name: str, model: nn.Module, longest: int | None, *, chunkwise: bool):
        super().__init__(name, model, longest)
        self.chunkwise = chunkwise

    def _chunks(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        outputs: list[Tensor] = []
        states: list[Tensor] = []
        for start in range(0, ids.shape[1], CHUNK_SIZE):
            piece = ids[:, start : start + CHUNK_SIZE]
            out, states = self.model.forward_chunkwise(piece, start, states)
            outputs.append(out)
        return torch.cat(outputs, dim=1), states

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        logits = self._chunks(ids)[0] if self.chunkwise else self.model.forward_parallel(ids)
        return _cross_entropy(logits, targets)

    def read(self, ids: Tensor, room: int = 0) -> object:
        return [ids.shape[1], self._chunks(ids)[1]]

    def decode(self, memory: Any, token: Tensor) -> Tensor:
        position, states = memory
        logits, states = self.model.forward_recurrent(token, position, states)
        memory[:] = position + 1, states
        return logits


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def add_others(field: Field, size: Size, *, forms: bool) -> None:
    """Add those that are installed.

    Args:
        field: Added to; what is missing is noted there with the reason.
        size: Of the models.
        forms: Whether the parallel and the chunkwise form are two contenders, as in training.
            Otherwise there is one, under the plain name: it reads in chunks and decodes token by
            token.
    """
    chunkwise = " chunkwise" if forms else ""
    try:
        official = make_torchscale(size)
        if forms:
            name = f"{TORCHSCALE} parallel"
            field.add(Torchscale(name, official, PAIRS_LIMIT, chunkwise=False))
        field.add(Torchscale(TORCHSCALE + chunkwise, official, None, chunkwise=True))
    except ImportError as error:
        field.absent[TORCHSCALE] = str(error)
    try:
        other = make_yet_another(size)
        if forms:
            name = f"{YET_ANOTHER} parallel"
            field.add(YetAnother(name, other, PAIRS_LIMIT, chunkwise=False))
        field.add(YetAnother(YET_ANOTHER + chunkwise, other, None, chunkwise=True))
    except ImportError as error:
        field.absent[YET_ANOTHER] = str(error)


def make_torchscale(size: Size) -> nn.Module:
    """The official RetNet: rmsnorm, gated feed-forward network with swish.

    Raises:
        ImportError: It is not installed.
    """
    importlib.import_module("torchscale")
    if importlib.util.find_spec("timm") is None:
        _stand_in_for_timm()
    architecture = importlib.import_module("torchscale.architecture.retnet")
    config = importlib.import_module("torchscale.architecture.config").RetNetConfig(
        decoder_embed_dim=size.hidden_size,
        decoder_value_embed_dim=2 * size.hidden_size,
        decoder_retention_heads=size.num_heads,
        decoder_ffn_embed_dim=round(4 * size.hidden_size / 3),  # 8 d^2 retention + 3 d f
        decoder_layers=size.num_hidden_layers,
        activation_fn="swish",
        vocab_size=size.vocab_size,
        share_decoder_input_output_embed=True,
        recurrent_chunk_size=CHUNK_SIZE,
    )
    embedding = nn.Embedding(size.vocab_size, size.hidden_size)
    nn.init.normal_(embedding.weight, std=size.hidden_size**-0.5)
    model: nn.Module = architecture.RetNetDecoder(config, embed_tokens=embedding)
    return model


def _stand_in_for_timm() -> None:
    def drop_path(*_: object) -> None:
        raise NotImplementedError("drop path is off in the benchmarks")

    names = ("timm", "timm.models", "timm.models.layers")
    modules = {name: ModuleType(name) for name in names}
    modules[names[-1]].__dict__["drop_path"] = drop_path
    sys.modules.update(modules)
    try:
        importlib.import_module("torchscale.component.droppath")
    finally:
        for name in names:  # nobody else shall take it for timm
            del sys.modules[name]


def make_yet_another(size: Size) -> nn.Module:
    """yet-another-retnet: values as wide as keys, so a wider feed-forward network.

    Raises:
        ImportError: It is not installed.
    """
    model: nn.Module = importlib.import_module("yet_another_retnet.retnet").RetNet(
        size.vocab_size,
        d_model=size.hidden_size,
        nhead=size.num_heads,
        num_layers=size.num_hidden_layers,
        dropout=0.0,
        dim_feedforward=round(3.5 * size.hidden_size),  # 5 d^2 retention + 2 d f
    )
    model.out.weight = model.embedding.weight  # type: ignore[union-attr]
    return model
