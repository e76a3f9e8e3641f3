"""Linear layers whose weights are stored in fewer bits than they are computed with.

Activations, states, norms, decays and the embedding stay as they are; a product takes the weight
that the stored numbers stand for.

    bf16    bfloat16
    int8    w = scale * value, value from -127 to 127; a scale for each output
    int4    w = scale * (value - 8) + zero, value from 0 to 15; both for each group of 32 inputs

Scales and zeros are bfloat16, which torch's operators want. Inputs are filled up with zeros to a
multiple of 32 as stored: those operators read beyond the end of others.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration import QUANT_METHOD, QUANTISED

FORMATS = ("bf16", "int8", "int4")
GROUP = 32  # inputs with one scale and zero in int4
PIECE = 2**20  # weights that are worked on at once: what lies in the processor's cache
TRIALS = (1.0, 0.9, 0.8)  # of a group's range that the first values of int4 span
ROUNDS = 2  # of fitting a group's scale and zero to its values, and choosing these anew

Stored = dict[str, Tensor]  # by the name of the buffer


def stored_parts(weights: str, outputs: int, inputs: int) -> dict[str, tuple[Any, torch.dtype]]:
    """The tensors of a layer [outputs, inputs] in a format: by name, shape and type."""
    whole = -(-inputs // GROUP) * GROUP
    if weights == "bf16":
        return {"values": ((outputs, inputs), torch.bfloat16)}
    if weights == "int8":
        return {
            "values": ((outputs, whole), torch.int8),
            "scale": ((outputs,), torch.bfloat16),
        }
    groups = (outputs, whole // GROUP)
    return {
        "values": ((outputs, whole // 2), torch.uint8),  # two in a byte, the first one below
        "scale": (groups, torch.bfloat16),
        "zero": (groups, torch.bfloat16),
    }


def quantise(weight: Tensor, weights: str) -> Stored:
    """A weight [out, in] in a format; a ``ValueError`` where it has numbers that are not finite."""
    if not weight.isfinite().all():
        raise ValueError("it has numbers that are not finite")
    if weights == "bf16":
        return {"values": weight.to(torch.bfloat16)}
    work = {"int8": _to_int8, "int4": _to_int4}[weights]
    whole = F.pad(weight.float(), (0, -weight.shape[1] % GROUP))
    pieces = [work(piece) for piece in whole.split(max(1, PIECE // whole.shape[1]))]
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def _to_int8(weight: Tensor) -> Stored:
    scale = (weight.abs().amax(dim=1) / 127).to(torch.bfloat16)
    values = (weight / _divisor(scale)[:, None]).round().clamp(-127, 127)
    return {"values": values.to(torch.int8), "scale": scale}


def _to_int4(weight: Tensor) -> Stored:
    """The values and the line through them that are nearest to each group's weights.

    From ranges of several widths on: the values, the best line for them (least squares), the values
    for that line, and so on; the best of all that were met is taken.
    """
    groups = weight.unflatten(1, (-1, GROUP))  # [out, groups, 32]
    low, high = groups.amin(dim=2, keepdim=True), groups.amax(dim=2, keepdim=True)
    middle, mean = (low + high) / 2, groups.mean(dim=2, keepdim=True)
    best: tuple[Tensor, ...] = ()
    for share in TRIALS:
        scale = share * (high - low) / 15
        zero = middle + scale / 2  # of value 8, where the middle is 7.5
        for i in range(ROUNDS + 1):
            scale, zero = (x.to(torch.bfloat16).float() for x in (scale, zero))
            values = ((groups - zero) / _divisor(scale)).round_().clamp_(-8, 7)
            error = (groups - zero - scale * values).square_().sum(dim=2, keepdim=True)
            now = error, scale, zero, values
            if not best:
                best = now
            else:
                better = error < best[0]
                best = tuple(torch.where(better, x, y) for x, y in zip(now, best, strict=True))
            if i < ROUNDS:
                around = values - values.mean(dim=2, keepdim=True)
                spread = around.square().sum(dim=2, keepdim=True)
                scale = (around * groups).sum(dim=2, keepdim=True) / _divisor(spread)
                zero = mean - scale * values.mean(dim=2, keepdim=True)
    _, scale, zero, values = best
    codes = (values + 8).to(torch.uint8).flatten(1)
    return {
        "values": codes[:, ::2] | codes[:, 1::2] << 4,
        "scale": scale[..., 0].to(torch.bfloat16),
        "zero": zero[..., 0].to(torch.bfloat16),
    }


def _divisor(x: Tensor) -> Tensor:
    """The same numbers in float32, 1 for 0: of a group or row that is all the same."""
    return torch.where(x == 0, 1.0, x.float())


def int4_values(values: Tensor) -> Tensor:
    """uint8 [out, in / 2] -> uint8 [out, in], each from 0 to 15."""
    return torch.stack((values & 15, values >> 4), dim=2).flatten(1)


def dequantise(weights: str, stored: Stored, inputs: int, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] that a format's tensors stand for, computed in ``dtype``."""
    values = stored["values"]
    if weights == "bf16":
        return values.to(dtype)
    scale = stored["scale"].to(dtype)
    if weights == "int8":
        return (values.to(dtype) * scale[:, None])[:, :inputs]
    groups = int4_values(values).to(dtype).sub_(8).unflatten(1, (-1, GROUP))
    zero = stored["zero"].to(dtype)
    return groups.mul_(scale[..., None]).add_(zero[..., None]).flatten(1)[:, :inputs]


class QuantisedLinear(nn.Module):
    """x W^T with a weight in one of ``FORMATS``, for inference; it has no parameters.

    ``weight`` is what it stands for, in float32, made anew at each use. ``dtype`` is that of its
    model, as a plain layer's weight has it: it changes with ``to``, and what is stored does not.
    """

    dtype = torch.float32

    def __init__(self, in_features: int, out_features: int, weights: str) -> None:
        super().__init__()
        self.in_features, self.out_features, self.weights = in_features, out_features, weights
        for name, (shape, dtype) in stored_parts(weights, out_features, in_features).items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype))

    @property
    def stored(self) -> Stored:
        """Its tensors by name."""
        return dict(self.named_buffers())

    @property
    def weight(self) -> Tensor:
        """float32 [out, in]."""
        return dequantise(self.weights, self.stored, self.in_features, torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = dequantise(self.weights, self.stored, self.in_features, wide)
        return F.linear(x, weight.to(x.dtype))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.weights}"

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """What ``to``, ``half`` and the like do to all tensors; these keep their types."""

        def move(x: Tensor) -> Tensor:
            y: Tensor = fn(x)
            return y if y.dtype == x.dtype else x.to(y.device)

        self.dtype = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        return super()._apply(move, recurse)


def type_and_device(linear: Any) -> tuple[torch.dtype, torch.device]:
    """What a plain or quantised layer's products are of and where; nothing is computed."""
    if isinstance(linear, QuantisedLinear):
        return linear.dtype, linear.stored["values"].device
    return linear.weight.dtype, linear.weight.device


def quantised_format(model: nn.Module) -> str | None:
    """The format of a model's weights; None where they are plain."""
    found = (x.weights for x in model.modules() if isinstance(x, QuantisedLinear))
    return next(found, None)


def replace_linears(model: Any, weights: str | None, *, fill: bool = True) -> None:
    """Put a layer of the format in the place of each linear layer, or a plain one of each of those.

    The configuration says so, which transformers refuses: it would fill such layers at random.
    An output layer that was the embedding too becomes one of its own. Layers that a part names in
    ``exact`` stay; without ``fill`` the new ones hold nothing, as on the meta device.

    Raises:
        ValueError: A weight is not finite, or a layer has a bias; the message names it.
    """
    for place, module in list(model.named_modules()):
        for name, layer in list(module.named_children()):
            if weights is None and isinstance(layer, QuantisedLinear):
                new: Any = nn.Linear(layer.in_features, layer.out_features, False, device="meta")
                new.weight = nn.Parameter(layer.weight.to(layer.dtype))
            elif weights and type(layer) is nn.Linear and name not in getattr(module, "exact", ()):
                new = _quantised(layer, weights, f"{place}.{name}".lstrip("."), fill)
            else:
                continue
            setattr(module, name, new)
    vars(model.config).pop(QUANTISED, None)
    if weights:
        setattr(model.config, QUANTISED, {"quant_method": QUANT_METHOD, "weights": weights})
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}


def _quantised(layer: nn.Linear, weights: str, name: str, fill: bool) -> QuantisedLinear:
    if layer.bias is not None:
        raise ValueError(f"{name} has a bias, which no layer of quantised weights has")
    with torch.device(layer.weight.device):
        new = QuantisedLinear(layer.in_features, layer.out_features, weights)
    new.dtype = layer.weight.dtype
    if fill:
        try:
            stored = quantise(layer.weight.detach(), weights)
        except ValueError as error:
            raise ValueError(f"{name}.weight can't be quantised: {error}") from error
        for own, tensor in stored.items():
            new.register_buffer(own, tensor)
    return new
