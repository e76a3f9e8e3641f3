"""The configuration of a run: three sections, defaults < YAML file < key=value arguments."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from retnet.data import DataSpec
from retnet.data.spec import BPE
from retnet.errors import UserError
from retnet.model.mixers import MIXERS
from retnet.paths import kind_of
from retnet.training.limits import beyond_bounds
from retnet.training.model_spec import model_section, settled


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainSpec:
    """The ``train`` section."""

    max_steps: int = _option(1000, "optimizer steps")
    batch_size: int = _option(8, "rows in a micro-batch of one process")
    gradient_accumulation_steps: int = _option(1, "micro-batches in an optimizer step")
    learning_rate: float = _option(2e-3, "peak learning rate")
    schedule: Literal["cosine", "linear", "constant"] = _option(
        "cosine", "course of the learning rate after the warm-up"
    )
    warmup_steps: int = _option(100, "steps in which the learning rate rises linearly")
    final_learning_rate: float = _option(
        0.1, "learning rate at the end as a share of the peak (cosine, linear)"
    )
    weight_decay: float = _option(0.05, "of AdamW, on matrices only")
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
        "auto", "of matrix products; auto: bf16 on GPUs that have it, else fp32"
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
    log_every: int = _option(10, "steps between progress lines when not on a terminal")
    sample_prompt: str = _option("", "prompt of the sample text at each evaluation")
    sample_tokens: int = _option(64, "length of that sample; 0: none")
    trackers: list[str] = field(
        default_factory=list,
        metadata={"help": "beside console and metrics.jsonl: any of wandb, tensorboard"},
    )


@dataclass(frozen=True)
class Config:
    """A whole run: ``model`` is an instance of ``model_section``."""

    model: Any = field(default_factory=lambda: model_section()())
    data: DataSpec = field(default_factory=DataSpec)
    train: TrainSpec = field(default_factory=TrainSpec)


def config_schema() -> type[Config]:
    """``Config`` with the keys of the mixers that there are now."""
    return _schema_of(cast(Any, model_section()))


@functools.cache
def _schema_of(section: type[Any]) -> type[Config]:
    model = ("model", section, field(default_factory=section))
    made = dataclasses.make_dataclass("Config", [model], bases=(Config,), frozen=True)
    return cast(type[Config], made)


MAX_SEED = 2**32  # of NumPy's legacy generator, which libraries may use
TRACKERS = ("wandb", "tensorboard")
# keys that may differ when a run goes on: they do not change what was computed so far
RESUMABLE_KEYS = (
    "train.max_steps", "train.resume", "train.eval_every", "train.eval_max_tokens",
    "train.save_every", "train.keep", "train.log_every", "train.sample_prompt",
    "train.sample_tokens", "train.trackers", "train.out_dir", "train.device", "train.compile",
    "train.batch_size", "train.gradient_accumulation_steps", "train.gradient_checkpointing",
    "data.cache_dir", "model.chunk_size",
)  # fmt: skip


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read and check a configuration.

    Args:
        path: A YAML file with the sections model, data and train; None for the defaults.
        overrides: ``section.key=value``, the last word.

    Raises:
        UserError: Names the key or file, its value and the fix.
    """
    layers = [OmegaConf.structured(config_schema())]
    if path is not None:
        layers.append(_read_yaml(Path(path)))
    for override in overrides:
        layers.append(_read_override(override))
    merged = layers[0]
    for layer in layers[1:]:
        try:
            _check_nothing_missing(layer)
            merged = OmegaConf.merge(merged, layer)
        except OmegaConfBaseException as error:
            raise UserError(_explain(error)) from error
        except TypeError as error:  # a mapping for the one key that is a list
            raise UserError("train.trackers must be a list, as train.trackers=[wandb]") from error
    try:
        config = cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise UserError(_explain(error)) from error
    given = {text.partition("=")[0] for text in overrides}
    config = dataclasses.replace(config, model=settled(config.model))
    tokenizer_keys = {"data.tokenizer", "data.vocab_size"}
    if given & tokenizer_keys == {"data.tokenizer"} and config.data.tokenizer != BPE:
        # the size in the file is for the tokenizer in the file
        data = dataclasses.replace(config.data, vocab_size=DataSpec.vocab_size)
        config = dataclasses.replace(config, data=data)
    config.data.validate()
    problems = [*_train_problems(config.train), *_contradictions(config), *beyond_bounds(config)]
    if problems:
        raise UserError("; ".join(problems))
    if config.train.out_dir is None:
        name = "default" if path is None else Path(path).stem
        out_dir = f"runs/{name}-{config.model.mixer}"
        train = dataclasses.replace(config.train, out_dir=out_dir)
        config = dataclasses.replace(config, train=train)
    return config


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def command_to_go_on(train: TrainSpec) -> str:
    """How to call the command that goes on from a run's newest checkpoint."""
    return "the same command" + ("" if train.resume == "auto" else " with train.resume=auto")


def flatten(config: Config) -> dict[str, Any]:
    """``section.key`` -> value."""
    return {
        f"{section}.{key}": value
        for section, values in dataclasses.asdict(config).items()
        for key, value in values.items()
    }


def _read_yaml(path: Path) -> Any:
    if kind_of(path, "configuration") != "file":
        near = sorted(str(p) for p in Path("configs").glob("*.yaml"))
        hint = f"; there are {', '.join(near)}" if near else ""
        raise UserError(f"configuration ({path}) is not a file: give the path of a YAML file{hint}")
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
        content = OmegaConf.load(path)
    except OSError as error:
        raise UserError(
            f"configuration ({path}) cannot be read ({error.strerror}): check its permissions"
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError, OmegaConfBaseException) as error:
        raise UserError(f"configuration ({path}) is not valid YAML: {error}") from error
    if loaded is None:
        return OmegaConf.create({})
    if not isinstance(loaded, dict):
        raise UserError(
            f"configuration ({path}) must have the sections model, data and train: it holds a "
            f"{type(loaded).__name__}"
        )
    return content


def _read_override(text: str) -> Any:
    key, equals, _ = text.partition("=")
    if text.startswith("-"):
        plain = text.lstrip("-")
        raise UserError(
            f"argument ({text}) is not known: keys are written without dashes, as in "
            f"{plain if equals else plain + '=VALUE'}"
        )
    if not equals or not key:
        raise UserError(f"argument ({text}) must be section.key=value, as train.max_steps=100")
    try:
        return OmegaConf.from_dotlist([text])
    except UnicodeEncodeError as error:
        raise UserError(f"argument ({text!r}) is not UTF-8: write it in UTF-8") from error
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"argument ({text}) can't be read: {reason}; quote the value") from error


def _check_nothing_missing(layer: Any) -> None:
    """Raise a ``UserError`` for OmegaConf's ``???``, which a merge passes over."""
    missing = sorted(OmegaConf.missing_keys(layer))
    if missing:
        raise UserError(
            f"configuration key ({missing[0]}): ??? is no value: set it, or leave it out"
        )


def _explain(error: OmegaConfBaseException) -> str:
    message = str(error).splitlines()[0]
    key = getattr(error, "full_key", None)
    return f"configuration key ({key or 'sections'}): {message}; python train.py --help lists all"


def _train_problems(train: TrainSpec) -> list[str]:
    """Values out of range, each with key, value and fix."""
    problems = []
    at_least_one = ("max_steps", "batch_size", "gradient_accumulation_steps", "eval_every",
                    "save_every", "keep", "log_every")  # fmt: skip
    for key in at_least_one:
        if getattr(train, key) < 1:
            problems.append(f"train.{key} ({getattr(train, key)}) must be at least 1")
    for key in ("warmup_steps", "sample_tokens", "seed", "weight_decay"):
        if not getattr(train, key) >= 0:
            problems.append(f"train.{key} ({getattr(train, key)}) must be at least 0")
    if train.seed >= MAX_SEED:
        problems.append(f"train.seed ({train.seed}) must be below 2^32 ({MAX_SEED})")
    if train.eval_max_tokens is not None and train.eval_max_tokens < 2:
        problems.append(  # a document's first token is no target
            f"train.eval_max_tokens ({train.eval_max_tokens}) must be at least 2, or null for all"
        )
    if not 0 < train.learning_rate < 10:
        problems.append(
            f"train.learning_rate ({train.learning_rate}) must be above 0 and below 10: "
            "1e-3 is usual"
        )
    if not 0 <= train.final_learning_rate <= 1:
        problems.append(
            f"train.final_learning_rate ({train.final_learning_rate}) is a share of the peak: it "
            "must be between 0 and 1"
        )
    if train.weight_decay * train.learning_rate > 1:
        problems.append(
            f"train.weight_decay ({train.weight_decay}) times train.learning_rate "
            f"({train.learning_rate}) is what a step takes off each weight: it must be at most 1"
        )
    for key in ("beta1", "beta2"):
        if not 0 <= getattr(train, key) < 1:
            problems.append(f"train.{key} ({getattr(train, key)}) must be at least 0 and below 1")
    if train.grad_clip is not None and not train.grad_clip > 0:
        problems.append(f"train.grad_clip ({train.grad_clip}) must be above 0, or null for none")
    if train.warmup_steps > train.max_steps:
        problems.append(
            f"train.warmup_steps ({train.warmup_steps}) must be at most train.max_steps "
            f"({train.max_steps})"
        )
    for tracker in train.trackers:
        if tracker not in TRACKERS:
            problems.append(
                f"train.trackers ({tracker}) must be any of {', '.join(TRACKERS)}, "
                "as in train.trackers=[wandb]"
            )
    return problems


def _contradictions(config: Config) -> Iterator[str]:
    """Values that are right on their own and not together."""
    if not config.train.carry_state:
        return
    name = "train.carry_state (true)"
    if MIXERS[config.model.mixer].growing(config.model):
        constant = (mixer for mixer, kind in MIXERS.items() if not kind.growing(config.model))
        yield f"{name} needs a state to carry: set model.mixer={' or '.join(constant)}"
    if not config.data.reset_state_at_documents:
        yield f"{name} keeps documents apart: set data.reset_state_at_documents=true"
    if config.train.gradient_checkpointing:
        yield f"{name} can't be had with train.gradient_checkpointing: set it to false"
