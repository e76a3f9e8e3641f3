"""Low-rank adaptation in training (LoRA, arXiv 2106.09685), by PEFT's layers: W + s B A, W at rest.

A checkpoint of such a run holds the sums under their plain names: whatever reads a checkpoint reads
this one, and nothing needs the base or PEFT but going on, for which the factors lie beside them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retnet.checkpoints.adapter import import_peft
from retnet.checkpoints.match import check_finite, check_same_model
from retnet.errors import UserError

FACTOR, BASE = ".lora_", ".base_layer."  # how PEFT names A and B, and W


def add_lora(model: nn.Module, rank: int) -> None:
    """Put factors beside all linear layers but the output's, and leave nothing else to train."""
    peft = import_peft(f"train.lora_rank ({rank})")
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    peft.inject_adapter_in_model(config, model)


def factors(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A and B among the weights of a model; none without LoRA."""
    return {name: weight for name, weight in weights.items() if FACTOR in name}


@torch.no_grad()
def merged(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a model with the sums in place of what they are of, by their plain names."""
    found = {}
    for name, weight in weights.items():
        owner, is_base, rest = name.rpartition(BASE)
        if is_base:
            layer: Any = model.get_submodule(owner)
            weight = weight + layer.get_delta_weight("default").to(weight.device)
        if FACTOR not in name:
            found[f"{owner}.{rest}" if is_base else name] = weight
    return found


def whole(
    own: Mapping[str, Tensor], plain: Mapping[str, Tensor], stored: Mapping[str, Tensor], file: Path
) -> dict[str, Tensor]:
    """To go on with: W of the model's ``own``, A and B ``stored``, of all else ``plain``."""
    check_same_model(factors(own), stored, f"{file}", "set train.lora_rank to that of its run")
    check_finite(stored, f"{file}")
    return {name: stored.get(name, plain.get(name, weight)) for name, weight in own.items()}


def check_base(model: nn.Module, plain: Mapping[str, Tensor], folder: Path) -> None:
    """Raise a ``UserError`` where the sums are not the checkpoint's: W is of another base."""
    for name, weight in merged(model, model.state_dict()).items():
        if not torch.allclose(weight.cpu(), plain[name], rtol=1e-4, atol=1e-5):
            raise UserError(
                f"model.init_from is not the base that checkpoint ({folder}) was trained on: "
                f"{name} differs; restore it, or take the checkpoint's weights as model.init_from"
            )
