"""Which product with a linear layer's weight a decode step takes."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..quantised import QuantisedLinear
from .quantised import QuantisedProduct
from .weights import Product, joint_weights, runs

AnyProduct = Product | QuantisedProduct


def make_product(layer: nn.Module) -> AnyProduct:
    """The product with one layer's weight."""
    if isinstance(layer, QuantisedLinear):
        return QuantisedProduct([layer])
    linear: Any = layer
    return Product(linear.weight.detach())


def make_products(layers: Sequence[nn.Module]) -> list[AnyProduct]:
    """Products with the weights of layers that read the same, in order and as few as can be.

    Plain weights are one where they are stored one after the other, quantised ones of a row are.
    """
    found: list[AnyProduct] = []
    for run in runs(layers):
        if isinstance(run[0], QuantisedLinear):
            found.append(QuantisedProduct(run))
        else:
            found += map(Product, joint_weights(run))
    return found
