"""Whose checkpoint a folder holds, where it is not ours: told by config.json and by the weights.

Only the heads of safetensors files are read. A format that can be made ours names its converter,
another one says what keeps it from that.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from retnet.checkpoints.format import CONFIG
from retnet.checkpoints.weights import file_heads
from retnet.errors import UserError
from retnet.files import read_json

CONVERT = "python -m retnet.checkpoints.convert"


@dataclass(frozen=True)
class Format:
    """A format of checkpoints that others write."""

    name: str
    converter: str | None  # a command of ``CONVERT``
    differs: str = ""  # why there is none

    def advice(self, place: Path) -> str:
        """What to do with a checkpoint of it, for a message."""
        if self.converter is None:
            return f"{self.differs}, so no converter can make it ours: name another checkpoint"
        return f"make it ours by {CONVERT} {self.converter} {place} TARGET"


FLA = Format("flash-linear-attention's format", "from-fla")
TORCHSCALE = Format("torchscale's format (the official RetNet code)", "from-torchscale")
SYNCDOTH = Format("the format of syncdoth/RetNet", "from-torchscale")
RWKV = Format("RWKV-4's format", "from-rwkv")
BIASED = Format(
    "torchscale's format of before September 2023",
    None,
    "its layers have biases, which ours do not have",
)
YET_ANOTHER = Format(
    "yet-another-retnet's format",
    None,
    "its keys are conjugated after their rotation, its layers have biases and no norm follows the "
    "last block",
)
JAMIE = Format(
    "the format of Jamie-Stirling/RetNet",
    None,
    "its positions are xPos with a scale, its head norm has weights of each head's own and its "
    "feed-forward networks have biases",
)
# a pattern for each that some name matches, the more special one first
BY_NAMES = {
    r"(model\.)?layers\.\d+\.attn\.g_norm(_swish_gate)?\.weight|model\.embeddings\.weight": FLA,
    r"(\w+\.)?layers\.\d+\.(retention\.\w+|ffn\.fc\d)\.bias": BIASED,
    r"(\w+\.)?layers\.\d+\.linear[12]\.(weight|bias)": YET_ANOTHER,
    r"(\w+\.)*retentions\.\d+\.retentions\.\d+\.W_[QKV]": JAMIE,
    r"model\.layers\.\d+\.retention_layer_norm\.weight": SYNCDOTH,
    r"(decoder\.)?layers\.\d+\.retention_layer_norm\.weight": TORCHSCALE,
    r"(rwkv\.)?blocks\.\d+\.att(ention)?\.time_decay": RWKV,
}


def recognise(folder: Path, stored: Mapping[str, Any] | None = None) -> Format | None:
    """The format of a folder's checkpoint; None where it is ours, or of nobody known.

    ``stored``: what its config.json holds, if that was read.
    """
    names: set[str] = set()
    for file in sorted(filter(Path.is_file, folder.glob("*.safetensors"))):  # no pipe
        try:
            names |= file_heads(file).keys()
        except (SafetensorError, UserError, OSError):
            continue  # whoever loads it says what is wrong
    if stored is None and (folder / CONFIG).is_file():
        try:
            stored = read_json(folder / CONFIG, "")
        except UserError:
            stored = None
    return by_names(names) or _by_configuration(stored or {})


def by_names(names: Collection[str]) -> Format | None:
    """The format of weights with such names."""
    for pattern, found in BY_NAMES.items():
        compiled = re.compile(pattern)
        if any(compiled.fullmatch(name) for name in names):
            return found
    return None


def _by_configuration(stored: Mapping[str, Any]) -> Format | None:
    kind = stored.get("model_type")
    if kind == "rwkv":
        return RWKV
    if kind == "retnet":  # two projects' name of theirs
        return SYNCDOTH if "decoder_embed_dim" in stored else FLA
    inner = stored.get("kwargs")
    told = inner if isinstance(inner, dict) else stored
    return TORCHSCALE if kind is None and "decoder_retention_heads" in told else None
