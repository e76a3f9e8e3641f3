"""The sections of a configuration: the keys that there are, with defaults and help texts.

The ``model`` section is made when it is asked for, of the configurations' own fields, so a mixer
that is registered later has its keys too.
"""

import dataclasses
import functools
import json
import logging
from collections.abc import Collection, Iterator
from dataclasses import Field, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from retnet.data import DataSpec
from retnet.errors import UserError
from retnet.model.mixers import MIXERS
from retnet.paths import expand

logger = logging.getLogger(__name__)

NOT_OF_THE_MODEL = ("mixer", "init_from")
# keys that may differ when a run goes on: they do not change what was computed so far
RESUMABLE_KEYS = (
    "train.max_steps", "train.resume", "train.eval_every", "train.eval_max_tokens",
    "train.save_every", "train.keep", "train.export_code", "train.log_every", "train.sample_prompt",
    "train.sample_tokens", "train.trackers", "train.out_dir", "train.device", "train.compile",
    "train.batch_size", "train.gradient_accumulation_steps", "train.gradient_checkpointing",
    "data.cache_dir", "model.chunk_size",
)  # fmt: skip


# trackers.py says what each needs
TRACKERS = ("wandb", "tensorboard", "trackio", "mlflow", "aim")


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


def mixer_keys(mixer: str) -> dict[str, Field]:
    """The keys that mean something to a mixer, with the defaults that it gives them."""
    fields, unused = dataclasses.fields(MIXERS[mixer].options), MIXERS[mixer].unused
    named = {option.name: option for option in fields if "help" in option.metadata}
    return {name: option for name, option in named.items() if name not in unused}


def _merged(owners: dict[str, Field]) -> tuple[Any, Any]:
    """Type and field of a key that these mixers have."""
    first, *others = owners.values()
    text = first.metadata["help"]
    if len(owners) < len(MIXERS):
        text = f"{', '.join(owners)}: {text}"
    elif all(other.default == first.default for other in others) and first.default is not None:
        return first.type, _option(first.default, text)
    else:
        defaults = {mixer: option.default for mixer, option in owners.items() if option.default}
        each = ", ".join(f"{default} for {mixer}" for mixer, default in defaults.items())
        text += f"; null: the mixer's own ({each})" if each else ""
    kind: Any = first.type
    return kind | None, _option(None, text)


def settled(section: Any, by_hand: Collection[str] = ()) -> Any:
    """The section with the mixer's own defaults, and nothing for keys of other mixers.

    One that was set to something is named in a warning; a ``UserError`` where it is among
    ``by_hand``, the keys of the command line.
    """
    mixer, own, values = MIXERS[section.mixer], mixer_keys(section.mixer), dict(vars(section))
    for key, value in vars(section).items():
        if key in own and value is None:
            # some are class attributes of the mixer, see ``DecoderConfig.resolve``
            default = own[key].default
            values[key] = getattr(mixer, key, None) if default is None else default
        if key in (*own, *NOT_OF_THE_MODEL) or value is None:
            continue
        if f"model.{key}" in by_hand:
            raise UserError(
                f"model.{key} ({value}) has no meaning with model.mixer={section.mixer}: leave it "
                "out"
            )
        owners = (mixer_keys(mixer) for mixer in MIXERS)
        if all(value != keys[key].default for keys in owners if key in keys):
            logger.warning(f"model.{key}: no effect with model.mixer={section.mixer}")
        values[key] = None
    return type(section)(**values)


def is_bounded(section: Any) -> bool:
    """Whether the section's model is undefined beyond a number of tokens of a document."""
    return bool(section.positions == "learned" or MIXERS[section.mixer].bounded(section))


RATES = {"adamw": 2e-3, "muon": 2e-2}  # learning rate where none is given
ADAMW_SHARE = 0.2  # of Muon's, beside it


def _of_rate(own: tuple[str, float]) -> str:
    return f"{own[1]} of {own[0]}"


@dataclass(frozen=True)
class TrainSpec:
    """The ``train`` section."""

    max_steps: int = _option(1000, "optimizer steps")
    batch_size: int = _option(8, "rows in a micro-batch of one process")
    gradient_accumulation_steps: int = _option(1, "micro-batches in an optimizer step")
    optimizer: Literal["adamw", "muon"] = _option(
        "adamw", "muon: for the matrices inside the blocks, with adamw for all else"
    )
    learning_rate: float | None = _option(
        None, f"peak learning rate; null: {' or '.join(map(_of_rate, RATES.items()))}"
    )
    adamw_learning_rate: float | None = _option(
        None, f"of what muon leaves to adamw; null: {ADAMW_SHARE} of learning_rate"
    )
    lora_rank: int = _option(
        0,
        "above 0: train factors of so many columns for each linear layer of model.init_from (LoRA)",
    )
    schedule: Literal["cosine", "linear", "wsd", "constant"] = _option(
        "cosine", "course of the learning rate after the warm-up; wsd: level, then a linear fall"
    )
    decay_fraction: float = _option(0.2, "share of the steps in which the rate of wsd falls")
    warmup_steps: int = _option(100, "steps in which the learning rate rises linearly")
    final_learning_rate: float = _option(
        0.1, "learning rate at the end as a share of the peak (cosine, linear, wsd)"
    )
    weight_decay: float = _option(0.05, "on matrices only")
    beta1: float = _option(0.9, "of AdamW")
    beta2: float = _option(0.98, "of AdamW")
    grad_clip: float | None = _option(1.0, "largest norm of the gradient; null: not limited")
    seed: int = _option(0, "of weights, order and dropout")
    out_dir: str | None = _option(None, "run folder; null: runs/<config name>-<mixer>")
    resume: str = _option(
        "auto", "auto: go on from the run folder's newest checkpoint; never; or a checkpoint folder"
    )
    carry_state: bool = _option(
        False, "a window begins with the state that the window before in its document ended with"
    )
    device: Literal["auto", "cpu", "cuda"] = _option("auto", "auto takes a GPU when there is one")
    precision: Literal["auto", "fp32", "bf16"] = _option(
        "auto", "of matrix products; auto: bf16 on devices that compute in it, else fp32"
    )
    compile: bool = _option(
        False, "torch.compile the model: for GPUs; on a CPU it needs a C++ compiler and is slower"
    )
    gradient_checkpointing: bool = _option(False, "recompute activations: less memory, more time")
    fused_optimizer: bool = _option(True, "one kernel for the whole AdamW step")
    eval_every: int = _option(250, "steps between evaluations on the validation tokens")
    eval_max_tokens: int | None = _option(None, "validation tokens to use; null: all")
    save_every: int = _option(250, "steps between checkpoints")
    keep: int = _option(2, "newest checkpoints to keep (the best one is kept beside them)")
    export_code: Literal["final", "all", "none"] = _option(
        "final", "checkpoints with the model's code, for transformers without this package"
    )
    log_every: int = _option(10, "steps between progress lines when not on a terminal")
    sample_prompt: str = _option("", "prompt of the sample text at each evaluation")
    sample_tokens: int = _option(64, "length of that sample; 0: none")
    trackers: list[str] = field(
        default_factory=list,
        metadata={"help": f"beside console and metrics.jsonl: any of {', '.join(TRACKERS)}"},
    )

    @property
    def peak(self) -> float:
        """The highest learning rate."""
        return RATES[self.optimizer] if self.learning_rate is None else self.learning_rate

    @property
    def adamw_peak(self) -> float:
        """That of what AdamW trains."""
        if self.optimizer == "adamw" or self.adamw_learning_rate is None:
            return self.peak * (ADAMW_SHARE if self.optimizer == "muon" else 1)
        return self.adamw_learning_rate

    @property
    def run_folder(self) -> Path:
        """The folder ``out_dir``; a ``UserError`` where that is no path."""
        return expand(str(self.out_dir), "train.out_dir", for_libraries=True)

    @property
    def command_to_go_on(self) -> str:
        """How to call the command that goes on from the run's newest checkpoint."""
        return "the same command" + ("" if self.resume == "auto" else " with train.resume=auto")


@dataclass(frozen=True)
class Config:
    """A whole run; ``model`` has the keys of all mixers, see ``config_schema``."""

    model: Any = field(default_factory=lambda: config_schema()().model)
    data: DataSpec = field(default_factory=DataSpec)
    train: TrainSpec = field(default_factory=TrainSpec)


def config_schema() -> type[Config]:
    """``Config`` with the keys of the mixers that there are now.

    In the model section, a key whose default is the mixer's own is null.
    """
    return _schema_of(tuple(MIXERS.items()))


@functools.cache
def _schema_of(mixers: tuple[tuple[str, Any], ...]) -> type[Config]:
    text = "what mixes the tokens of a row; each has its own keys below"
    options: list[Any] = [("mixer", Literal[tuple(MIXERS)], _option(mixers[0][0], text))]
    keys = {mixer: mixer_keys(mixer) for mixer in MIXERS}
    for key in dict.fromkeys(key for own in keys.values() for key in own):
        owners = {mixer: own[key] for mixer, own in keys.items() if key in own}
        options.append((key, *_merged(owners)))
    text = "checkpoint or run folder to take the weights from"
    options.append(("init_from", str | None, _option(None, text)))
    section = dataclasses.make_dataclass("ModelSpec", options, frozen=True)
    model = ("model", section, field(default_factory=section))
    made: Any = dataclasses.make_dataclass("Config", [model], bases=(Config,), frozen=True)
    return made


def flatten(config: Config) -> dict[str, Any]:
    """``section.key`` -> value."""
    return {
        f"{section}.{key}": value
        for section, values in dataclasses.asdict(config).items()
        for key, value in values.items()
    }


def describe_keys() -> Iterator[str]:
    """One line for each key, as ``train.py --help`` prints it: name, type, default, meaning."""
    for section, values in vars(config_schema()()).items():
        for option in dataclasses.fields(values):
            default, kind = getattr(values, option.name), _type_name(option.type)
            shown = default if isinstance(default, str) and default else json.dumps(default)
            yield f"  {section}.{option.name}: {kind} = {shown}\n      {option.metadata['help']}"


def _type_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " | ".join(get_args(kind))
    if isinstance(kind, type) and not get_args(kind):
        return kind.__name__
    return str(kind).replace("None", "null")
