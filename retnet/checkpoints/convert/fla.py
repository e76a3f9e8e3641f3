"""flash-linear-attention's RetNet (``model_type: retnet``), from its names to ours and back.

What it computes is what ours computes with the keys of ``FIXED``. A source's config.json is kept
beside our files (``KEPT``): it says things that mean nothing here, and is written again by
``to_fla``, with what has changed since. Checkpoints of before February 2025 have the two branches
of a feed-forward network in one matrix, the activated one first; they are written in two.
"""

import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from retnet.checkpoints.configuration import check_values, read_config
from retnet.checkpoints.convert.sources import safetensors_errors
from retnet.checkpoints.convert.target import Converted, check_weights, new_folder, write_weights
from retnet.checkpoints.export import TOKENIZER_FILES
from retnet.checkpoints.find import find_checkpoint
from retnet.checkpoints.format import CONFIG, COPY_AGAIN
from retnet.checkpoints.quantised import refuse_quantised
from retnet.checkpoints.verify import check_weights_unchanged
from retnet.checkpoints.weights import stored_shapes, stored_tensors, weight_files
from retnet.errors import UserError
from retnet.files import read_json, write_json
from retnet.model.models import RetNetConfig
from retnet.paths import kind_of

KEPT = "fla_config.json"
GENERATION = "generation_config.json"
# Our keys of all its models.
FIXED: dict[str, Any] = {
    "norm": "rmsnorm", "ffn": "swiglu", "head_norm": "rmsnorm", "decay": "paper",
    "positions": "rotary", "rotary_layout": "half", "rotary_frequencies": "standard",
    "rotary_base": 10000.0, "embedding_norm": False, "scale_embedding": False,
    "attention_layers": None,
}  # fmt: skip
# Its keys of what ours does not compute, with the values at which it does.
REFUSED: dict[str, tuple[Any, ...]] = {
    "use_short_conv": (False, None), "feature_map": (None,), "attn": (None,),
    "attnres_block_size": (None,), "hidden_act": ("swish",), "expand_k": (1, 1.0),
}  # fmt: skip
# Its defaults, for keys that a config.json leaves out.
DEFAULTS: dict[str, Any] = {
    "attn": None, "attn_mode": "chunk", "bos_token_id": 1, "conv_size": 4,
    "elementwise_affine": True, "eos_token_id": 2, "expand_k": 1.0, "expand_v": 2.0,
    "feature_map": None, "fuse_cross_entropy": True, "fuse_norm": True, "fuse_swiglu": True,
    "hidden_act": "swish", "hidden_ratio": 2, "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": None, "max_position_embeddings": 2048, "norm_eps": 1e-6, "num_heads": 8,
    "num_hidden_layers": 24, "num_kv_heads": None, "pad_token_id": None,
    "tie_word_embeddings": False, "use_cache": True, "use_output_gate": True,
    "use_short_conv": False, "vocab_size": 32000,
}  # fmt: skip
SAME = (  # keys of both
    "bos_token_id", "eos_token_id", "hidden_size", "max_position_embeddings", "norm_eps",
    "num_heads", "num_hidden_layers", "num_kv_heads", "pad_token_id", "tie_word_embeddings",
    "use_cache", "vocab_size",
)  # fmt: skip
OUTSIDE = {
    "model.embeddings.weight": "model.embed_tokens.weight",
    "model.norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
BLOCK = {
    "attn_norm.weight": "mixer_norm.weight",
    **{f"attn.{name}_proj.weight": f"mixer.{name}_proj.weight" for name in "qkvgo"},
    "mlp_norm.weight": "ffn_norm.weight",
    **{f"mlp.{name}_proj.weight": f"ffn.{name}_proj.weight" for name in ("gate", "up", "down")},
}
HEAD_NORMS = {True: "attn.g_norm_swish_gate.weight", False: "attn.g_norm.weight"}  # fused, or not
HEAD_NORM = "mixer.head_norm_weight"
PLACE = re.compile(r"(model\.layers\.(?:0|[1-9]\d{0,4})\.)(.+)")


def from_fla(source: Path) -> Converted:
    """A checkpoint of flash-linear-attention's RetNet, a folder with safetensors.

    Raises:
        UserError: It can't be read, or is of a model that ours can't be; names the key.
    """
    kind = kind_of(source, "source")
    if kind != "folder":
        what = "does not exist" if kind is None else "is no folder"
        raise UserError(f"source ({source}) {what}: name the folder with its {CONFIG}")
    file = source / CONFIG
    if kind_of(file, "source") is None:
        raise UserError(
            f"source ({source}) has no {CONFIG}, which says what its weights are of: {COPY_AGAIN}"
        )
    stored = read_json(file, COPY_AGAIN)
    check_values(file, stored)
    config = _read(file, stored)
    with safetensors_errors(source):
        shapes = stored_shapes(source)
        size = sum((source / name).stat().st_size for name in weight_files(source))
    own: dict[str, tuple[int, ...]] = {}
    theirs: dict[str, str] = {}
    for name, shape in shapes.items():
        parts = _names(name, shapes)
        rows = shape[0] // len(parts) if shape else 0
        own |= {part: (rows, *shape[1:]) for part in parts}
        theirs |= dict.fromkeys(parts, name)
    check_weights(source, config, own, theirs, "flash-linear-attention's RetNet as published")
    return Converted(config, _weights(source, shapes), size, {KEPT: stored})


def _weights(source: Path, shapes: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    with safetensors_errors(source):
        for name, x in stored_tensors(source):
            parts = _names(name, shapes)
            yield from zip(parts, x.chunk(len(parts)), strict=True)


def _names(name: str, shapes: Mapping[str, Any]) -> list[str]:
    """Our names of a weight of theirs: two of a matrix that has both branches."""
    place = PLACE.fullmatch(name)
    if place is None:
        return [OUTSIDE.get(name, name)]
    block, inner = place[1], place[2]
    if inner in HEAD_NORMS.values():
        return [block + HEAD_NORM]
    own = block + BLOCK.get(inner, inner)
    both = inner == "mlp.gate_proj.weight" and f"{block}mlp.up_proj.weight" not in shapes
    return [own, f"{block}ffn.up_proj.weight"] if both else [own]


def _read(file: Path, stored: Mapping[str, Any]) -> RetNetConfig:
    """Our configuration of theirs."""
    kind = stored.get("model_type")
    if kind != "retnet" or "decoder_embed_dim" in stored:
        raise UserError(
            f"{file}: model_type ({kind}) is not flash-linear-attention's retnet: look at it with "
            "python -m retnet.checkpoints.convert inspect"
        )
    told = DEFAULTS | dict(stored)
    for key, values in REFUSED.items():
        if told.get(key) not in values:
            raise UserError(
                f"{file}: {key} ({told[key]}) is of a model that ours does not compute, only one "
                f"with {key} {values[0]} can be converted"
            )
    try:
        width, expand = told["hidden_size"], told["expand_v"]
        return RetNetConfig(
            **{key: told[key] for key in SAME},
            **FIXED,
            head_norm_eps=told["norm_eps"],
            head_norm_affine=bool(told["elementwise_affine"]),
            gate=told["use_output_gate"],
            value_size=round(width * expand),
            intermediate_size=told["intermediate_size"] or _default_width(told),
        )
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{file}: {error}: correct it, or {COPY_AGAIN}") from error


def _default_width(told: Mapping[str, Any]) -> int:
    """Of the feed-forward network: 2/3 of ratio x width, up to a multiple of 256."""
    ratio = 4 if told["hidden_ratio"] is None else told["hidden_ratio"]
    return 256 * -(-int(told["hidden_size"] * ratio * 2 / 3) // 256)


def _written(config: RetNetConfig) -> dict[str, Any]:
    """Their keys of our configuration."""
    return {key: getattr(config, key) for key in SAME} | {
        "elementwise_affine": config.head_norm_affine,
        "expand_v": config.value_size / config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "use_output_gate": config.gate,
    }


def to_fla(source: str, target: Path) -> Path:
    """Write a folder that flash-linear-attention loads; returns the source's.

    Raises:
        UserError: There is no such checkpoint, or its model is none of theirs; names the keys.
    """
    folder = find_checkpoint(source)
    config = read_config(folder, trust_remote_code=False)
    refuse_quantised(folder, f"source ({folder})", "which flash-linear-attention can't load")
    _check_expressible(folder, config)
    check_weights_unchanged(folder)
    kept = folder / KEPT
    base = read_json(kept, COPY_AGAIN) if kept.is_file() else DEFAULTS | {
        "architectures": ["RetNetForCausalLM"], "model_type": "retnet", "dtype": None,
    }  # fmt: skip
    before = _written(_read(kept, base)) if kept.is_file() else {}
    changed = {k: v for k, v in _written(config).items() if k not in before or before[k] != v}
    stored = base | changed
    fused = bool(stored.get("fuse_norm", True)) and config.gate
    with safetensors_errors(folder):
        stored_shapes(folder)
        size = sum((folder / name).stat().st_size for name in weight_files(folder))
    with new_folder(target) as new:
        dtypes = write_weights(new, _back(folder, fused, config.tie_word_embeddings), size)
        key = "torch_dtype" if "torch_dtype" in stored else "dtype"
        dtype = str(dtypes["model.embeddings.weight"]).removeprefix("torch.")
        write_json(new / CONFIG, stored | ({key: dtype} if key in stored else {}))
        for name in (*TOKENIZER_FILES, GENERATION):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, new / name)
    return folder


def _back(folder: Path, fused: bool, tied: bool) -> Iterator[tuple[str, Tensor]]:
    outside = {own: name for name, own in OUTSIDE.items()}
    block = {own: name for name, own in BLOCK.items()} | {HEAD_NORM: HEAD_NORMS[fused]}
    with safetensors_errors(folder):
        for name, x in stored_tensors(folder):
            place = PLACE.fullmatch(name)
            if place is not None:
                yield place[1] + block[place[2]], x
            elif not (tied and name == "lm_head.weight"):
                yield outside[name], x


def _check_expressible(folder: Path, config: Any) -> None:
    """Raise a ``UserError`` where flash-linear-attention has no such RetNet."""
    file = folder / CONFIG
    if type(config) is not RetNetConfig:
        raise UserError(
            f"{file}: model_type ({config.model_type}) is no RetNet: only {RetNetConfig.model_type}"
            " can be converted to flash-linear-attention's"
        )
    wanted = FIXED | {"head_norm_eps": config.norm_eps}
    other = [key for key, value in wanted.items() if getattr(config, key) != value]
    if other:
        found = ", ".join(f"{key} ({getattr(config, key)})" for key in other)
        keys = ", ".join(f"{key} {wanted[key]}" for key in other)
        raise UserError(
            f"{file}: flash-linear-attention's RetNet has no {found}: only a model trained with "
            f"{keys} can be converted"
        )
