"""torchscale, the official RetNet, from September 2023 on, and syncdoth/RetNet, its port.

The port has the same names after ``model.``, fairseq's checkpoints after ``decoder.``. Theirs
normalise scores, which the head norm takes out again but for its eps; ours do not, so the two agree
to rounding only as the eps goes to 0 (docs/checkpoints.md has figures).

Weights tell the sizes and, by a buffer of theirs, heads and decays. Activation, scale of the
embedding and eps are told by a saved configuration (config.json of the folder, or --config) or by
options: torchscale's class and fairseq's script have other defaults, so none is guessed.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retnet.checkpoints.convert.recognise import SYNCDOTH, TORCHSCALE, by_names
from retnet.checkpoints.convert.sources import read_tensors
from retnet.checkpoints.convert.target import Converted, check_weights
from retnet.checkpoints.format import CONFIG
from retnet.errors import UserError
from retnet.files import read_json
from retnet.model.models import RetNetConfig
from retnet.model.ops.decay import DECAY_SCHEDULES, head_log_decay
from retnet.model.ops.rotary import rotary_theta

ACTIVATIONS = {"swish": "swiglu", "gelu": "geglu", "relu": "reglu"}
VALUES = {"activation": "|".join(ACTIVATIONS), "scale-embedding": "yes|no", "norm-eps": "NUMBER",
          "num-heads": "N"}  # fmt: skip
FIXED: dict[str, Any] = {
    "norm": "rmsnorm", "head_norm": "rmsnorm", "rotary_layout": "interleaved",
    "rotary_frequencies": "linspace",
}  # fmt: skip
# Keys of what ours does not compute, with the value at which it does.
REFUSED: dict[str, Any] = {
    "decoder_normalize_before": True, "deepnorm": False, "layernorm_embedding": False,
    "moe_freq": 0, "multiway": False, "no_output_layer": False, "use_glu": True,
}  # fmt: skip
OUTSIDE = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "layer_norm.weight": "model.norm.weight",
    "output_projection.weight": "lm_head.weight",
    "lm_head.weight": "lm_head.weight",
}
BLOCK = {
    "retention_layer_norm.weight": "mixer_norm.weight",
    **{f"retention.{x}_proj.weight": f"mixer.{x}_proj.weight" for x in "qkvg"},
    "retention.out_proj.weight": "mixer.o_proj.weight",
    "final_layer_norm.weight": "ffn_norm.weight",
    "ffn.fc1.weight": "ffn.gate_proj.weight",  # the activated branch
    "ffn.gate.weight": "ffn.up_proj.weight",
    "ffn.fc2.weight": "ffn.down_proj.weight",
}
PREFIX = re.compile(r"^(decoder|model)\.")
PLACE = re.compile(r"layers\.(0|[1-9]\d{0,4})\.(.+)")
ANGLE, DECAY, VERSION = "retnet_rel_pos.angle", "retnet_rel_pos.decay", "version"
NOT_OURS = {
    r"\.moe_layer\.": "of a mixture of experts (moe_freq)",
    r"\.[AB]\.(weight|bias)$": "of a multiway network (multiway)",
    r"layernorm_embedding": "a norm after the embedding (layernorm_embedding)",
}


@dataclass(frozen=True)
class Told:
    """What the user says of weights; None where that is left to a configuration."""

    config: Path | None = None
    num_heads: int | None = None
    activation: str | None = None
    scale_embedding: bool | None = None
    norm_eps: float | None = None


def from_torchscale(source: Path, told: Told) -> Converted:
    """A checkpoint of torchscale's RetNet or syncdoth's: a folder or file of weights.

    Raises:
        UserError: It can't be read, is of a model that ours can't be, or something is not told.
    """
    stored = _configuration(source, told.config)
    tensors = {PREFIX.sub("", name): (name, x) for name, x in read_tensors(source).items()}
    _check_names(source, [name for name, _ in tensors.values()])
    weights: dict[str, Tensor] = {}
    theirs: dict[str, str] = {}
    for common, (name, x) in tensors.items():
        place = PLACE.fullmatch(common)
        own = OUTSIDE.get(common)
        if place is not None and place[2] in BLOCK:
            own = f"model.layers.{place[1]}.{BLOCK[place[2]]}"
        if own is not None:
            weights[own], theirs[own] = x, name
        elif common not in (ANGLE, DECAY, VERSION):
            raise UserError(
                f"source ({source}) has {name}, which torchscale's RetNet does not have: name the "
                "weights of one alone"
            )
    decay = tensors.get(DECAY)
    config = _config(source, weights, stored, told, None if decay is None else decay[1])
    shapes = {name: tuple(x.shape) for name, x in weights.items()}
    check_weights(source, config, shapes, theirs, "torchscale's RetNet")
    if ANGLE in tensors:
        _check_angles(source, config, *tensors[ANGLE])
    return Converted(config, weights.items(), sum(x.nbytes for x in weights.values()))


def _configuration(source: Path, named: Path | None) -> Mapping[str, Any]:
    """What a saved configuration says: that of --config, else of the folder; {} where none is."""
    file = source / CONFIG if named is None else named
    if named is None and not file.is_file():
        return {}
    stored = read_json(file, "write the configuration's values as JSON, or copy it again")
    inner = stored.get("kwargs")
    stored = inner if isinstance(inner, dict) else stored
    for key, value in REFUSED.items():
        if stored.get(key, value) != value:
            raise UserError(
                f"{file}: {key} ({stored[key]}) is of a model that ours does not compute, only one "
                f"with {key} {value} can be converted"
            )
    return stored


def _check_names(source: Path, names: list[str]) -> None:
    """Raise a ``UserError`` that says what differs where the weights are of another model."""
    for pattern, what in NOT_OURS.items():
        if odd := next((name for name in names if re.search(pattern, name)), None):
            raise UserError(
                f"source ({source}) has {odd}, {what}, which ours does not compute: name a plain "
                "RetNet"
            )
    found = by_names(names)
    if found is None:
        raise UserError(f"source ({source}) has no weights of a RetNet: name torchscale's")
    if found not in (TORCHSCALE, SYNCDOTH):
        biased = next((f" ({name})" for name in names if name.endswith(".bias")), "")
        raise UserError(f"source ({source}) is {found.name}{biased}: {found.advice(source)}")


def _config(
    source: Path,
    weights: Mapping[str, Tensor],
    stored: Mapping[str, Any],
    told: Told,
    decay: Tensor | None,
) -> RetNetConfig:
    """Our configuration; sizes are those of the weights."""
    needed = {
        "model.embed_tokens.weight": "embed_tokens.weight",
        "model.layers.0.mixer.v_proj.weight": "layers.0.retention.v_proj.weight",
        "model.layers.0.ffn.gate_proj.weight": "layers.0.ffn.fc1.weight",
    }
    for own, name in needed.items():
        if own not in weights or weights[own].dim() != 2:
            raise UserError(f"source ({source}) has no {name}: name the weights of a RetNet")
    (vocab, width), value, inner = (weights[own].shape for own in needed)
    found = _found(source, stored, told, decay)
    head, embedding = weights.get("lm_head.weight"), weights["model.embed_tokens.weight"]
    layers = {name.split(".")[2] for name in weights if name.startswith("model.layers.")}
    try:
        return RetNetConfig(
            **FIXED,
            vocab_size=vocab,
            hidden_size=width,
            num_hidden_layers=len(layers),
            num_heads=found["num-heads"],
            intermediate_size=inner[0],
            value_size=value[0],
            ffn=ACTIVATIONS[found["activation"]],
            decay=_decay(source, found["num-heads"], decay, stored),
            scale_embedding=found["scale-embedding"],
            norm_eps=found["norm-eps"],
            head_norm_eps=found["norm-eps"],
            tie_word_embeddings=head is None or torch.equal(head, embedding),
            max_position_embeddings=stored.get("max_target_positions", 2048),
        )
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"source ({source}): {error}") from error


def _found(
    source: Path, stored: Mapping[str, Any], told: Told, decay: Tensor | None
) -> dict[str, Any]:
    """What weights don't tell, by the names of the options, which come before a configuration."""
    scaled, heads = stored.get("no_scale_embedding"), stored.get("decoder_retention_heads")
    if decay is not None and heads is None:
        heads = decay.numel()
    found: dict[str, Any] = {
        "activation": stored.get("activation_fn"),
        "scale-embedding": not scaled if isinstance(scaled, bool) else None,
        "norm-eps": stored.get("layernorm_eps"),
        "num-heads": heads,
    }
    for name in found:
        own = getattr(told, name.replace("-", "_"))
        found[name] = found[name] if own is None else own
    if lacking := [f"--{name} {VALUES[name]}" for name, value in found.items() if value is None]:
        raise UserError(
            f"source ({source}) does not say all of its model: add {' and '.join(lacking)}, or "
            "--config with the JSON of its configuration"
        )
    if found["activation"] not in [*ACTIVATIONS]:  # it may be a list, of which there is no hash
        raise UserError(
            f"source ({source}): activation_fn ({found['activation']}) must be one of "
            f"{', '.join(ACTIVATIONS)}: only those can be converted"
        )
    if type(found["num-heads"]) is not int or found["num-heads"] < 1:
        raise UserError(
            f"source ({source}): decoder_retention_heads ({found['num-heads']}) must be a whole "
            "number of at least 1: correct it"
        )
    return found


def _decay(source: Path, heads: int, buffer: Tensor | None, stored: Mapping[str, Any]) -> str:
    """The schedule whose numbers the buffer has, in its own precision."""
    if buffer is None:
        return "log_linear" if stored.get("use_lm_decay") else "paper"
    rounded = 4 * torch.finfo(buffer.dtype).eps
    for name in DECAY_SCHEDULES:
        # they took the logarithm of 1 - x in float32, where that is nearly 1
        if buffer.shape == (heads,) and torch.allclose(
            buffer.double(), head_log_decay(name, heads), rtol=rounded, atol=2e-7
        ):
            return name
    raise UserError(
        f"source ({source}): {DECAY} is of {buffer.numel()} heads with other decays than 1 - "
        f"2^(-5-h) or the log-linear ones of {heads}: only those can be converted"
    )


def _check_angles(source: Path, config: RetNetConfig, name: str, angle: Tensor) -> None:
    """Raise a ``UserError`` where a model's angles are not those of its head's width."""
    theta = rotary_theta(config.head_dim, frequencies="linspace", base=config.rotary_base)
    expected, rounded = theta.repeat_interleave(2), 8 * torch.finfo(angle.dtype).eps
    if angle.shape != expected.shape or not torch.allclose(angle.double(), expected, rtol=rounded):
        raise UserError(
            f"source ({source}): {name} has other angles than {config.num_heads} heads of width "
            f"{config.head_dim} turn by: correct --num-heads, or convert another one"
        )
