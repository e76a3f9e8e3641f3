"""RWKV-4: from the names of RWKV-LM and ChatRWKV, or those of transformers, to ours.

What transformers calls ``rwkv.blocks.0.attention.time_mix_key`` is ``blocks.0.att.time_mix_k``
there; shapes [1, 1, d] are [d] here. In a folder of transformers' config.json says what weights
don't; for a file LayerNorm's eps is 1e-5 and the output layer is no embedding, as in RWKV-LM.
"""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from retnet.checkpoints.convert.sources import read_tensors
from retnet.checkpoints.convert.target import Converted, check_weights
from retnet.checkpoints.format import CONFIG
from retnet.errors import UserError
from retnet.files import read_json
from retnet.model.models import RWKVConfig
from retnet.model.ops.precision import wide_dtype

MODEL_TYPE = "rwkv"  # transformers'
TRANSFORMERS = {  # in this order, to RWKV-LM's names
    r"^rwkv\.": "", r"^embeddings\.": "emb.", r"\.pre_ln\.": ".ln0.",
    r"\.attention\.": ".att.", r"\.feed_forward\.": ".ffn.",
    r"\.time_mix_key$": ".time_mix_k", r"\.time_mix_value$": ".time_mix_v",
    r"\.time_mix_receptance$": ".time_mix_r",
}  # fmt: skip
OUTSIDE = {
    "emb.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    **{f"ln_out.{kind}": f"model.norm.{kind}" for kind in ("weight", "bias")},
    **{f"blocks.0.ln0.{kind}": f"model.embed_norm.{kind}" for kind in ("weight", "bias")},
}
BLOCK = {
    **{f"ln1.{kind}": f"mixer_norm.{kind}" for kind in ("weight", "bias")},
    **{f"ln2.{kind}": f"ffn_norm.{kind}" for kind in ("weight", "bias")},
    "att.time_decay": "mixer.time_decay",
    "att.time_first": "mixer.time_first",
    **{f"att.time_mix_{name}": f"mixer.mix_{name}" for name in "rkv"},
    "att.receptance.weight": "mixer.r_proj.weight",
    "att.key.weight": "mixer.k_proj.weight",
    "att.value.weight": "mixer.v_proj.weight",
    "att.output.weight": "mixer.o_proj.weight",
    **{f"ffn.time_mix_{name}": f"ffn.mix_{name}" for name in "rk"},
    "ffn.receptance.weight": "ffn.r_proj.weight",
    "ffn.key.weight": "ffn.up_proj.weight",
    "ffn.value.weight": "ffn.down_proj.weight",
}
PLACE = re.compile(r"blocks\.(0|[1-9]\d{0,4})\.(.+)")


def from_rwkv(source: Path) -> Converted:
    """An RWKV-4 in a folder or file; numbers have the type of its embedding.

    Those that are never narrow have at least float32. Errors as of ``renamed``.
    """
    model, weights = renamed(source)
    dtype, wide = weights["model.embed_tokens.weight"].dtype, model.wide_names()
    typed = (
        (name, x.to(wide_dtype(dtype) if name in wide else dtype)) for name, x in weights.items()
    )
    return Converted(model.config, typed, sum(x.nbytes for x in weights.values()))


def renamed(source: Path) -> tuple[Any, dict[str, Tensor]]:
    """The model, without memory, and the weights by our names.

    Raises:
        UserError: It can't be read, or is of another model.
    """
    told = _told(source)
    tensors = read_tensors(source)
    weights: dict[str, Tensor] = {}
    theirs: dict[str, str] = {}
    layers = 0
    for name, tensor in tensors.items():
        common = name
        for pattern, new in TRANSFORMERS.items():
            common = re.sub(pattern, new, common)
        own, place = OUTSIDE.get(common), PLACE.fullmatch(common)
        if own is None and place is not None and place[2] in BLOCK:
            own, layers = (
                f"model.layers.{place[1]}.{BLOCK[place[2]]}",
                max(layers, int(place[1]) + 1),
            )
        if own is None or own in weights:
            problem = "twice" if own else "which RWKV-4 does not have"
            raise UserError(
                f"source ({source}) has {name} {problem}: name the weights of an RWKV-4 alone"
            )
        one_row = tensor.shape[:-1].numel() == 1 if tensor.dim() > 1 else False
        weights[own] = tensor.flatten() if one_row and own.split(".")[-1] != "weight" else tensor
        theirs[own] = name
    config = _config(source, weights, layers, told)
    shapes = {name: tuple(x.shape) for name, x in weights.items()}
    model = check_weights(source, config, shapes, theirs, "RWKV-4 with all widths alike")
    return model, weights


def _told(source: Path) -> dict[str, Any]:
    """What transformers' configuration says, if there is one."""
    if not (source / CONFIG).is_file():
        return {}
    stored = read_json(source / CONFIG, "copy it again")
    kind = stored.get("model_type", MODEL_TYPE)
    if kind != MODEL_TYPE:
        raise UserError(
            f"{source / CONFIG}: model_type ({kind}) is not {MODEL_TYPE}: name an RWKV-4, as "
            "transformers or RWKV-LM store it"
        )
    return stored if "model_type" in stored else {}


def _config(
    source: Path, weights: dict[str, Tensor], layers: int, told: dict[str, Any]
) -> RWKVConfig:
    """Sizes are those of the weights."""
    embedding = weights.get("model.embed_tokens.weight")
    inner = weights.get("model.layers.0.ffn.up_proj.weight")
    for name, x in (("embedding", embedding), ("blocks.0.ffn.key.weight", inner)):
        if x is None or x.dim() != 2:
            raise UserError(f"source ({source}) has no {name}: name the weights of an RWKV-4")
    assert embedding is not None and inner is not None
    keys = {
        "norm_eps": told.get("layer_norm_epsilon", 1e-5),
        "tie_word_embeddings": bool(told.get("tie_word_embeddings", False)),
    }
    if "context_length" in told:
        keys["max_position_embeddings"] = told["context_length"]
    for key in ("bos_token_id", "eos_token_id"):
        if isinstance(told.get(key), int) and told[key] < embedding.shape[0]:
            keys[key] = told[key]
    try:
        return RWKVConfig(
            vocab_size=embedding.shape[0],
            hidden_size=embedding.shape[1],
            num_hidden_layers=layers,
            intermediate_size=inner.shape[0],
            **keys,
        )
    except ValueError as error:
        raise UserError(f"source ({source}): {error}") from error
