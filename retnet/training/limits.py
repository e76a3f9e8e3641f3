"""Values that can't be: out of range, in contradiction, or larger than this machine can hold."""

from collections.abc import Iterator
from typing import Any

import torch

from retnet.errors import UserError
from retnet.machine import memory_of
from retnet.model.mixers import MIXERS
from retnet.training.spec import TRACKERS, Config, TrainSpec, flatten, is_bounded, mixer_keys

MAX_SEED = 2**32  # of NumPy's legacy generator, which libraries may use
INT64 = 2**63 - 1
MOST = {"model.num_hidden_layers": 10_000, "train.gradient_accumulation_steps": 1_000_000}
LEAST_RATE = 1e-20  # a smaller one is none to float32, and ratios of rates leave its range
BYTES_IN_TRAINING = 16  # of a parameter in float32: itself, its gradient, two moments at most

NOT_EMPTY = ("model.init_from", "data.hub_config", "train.out_dir", "train.resume")
NO_PATHS = ("train.sample_prompt", "data.text_field", "data.hub_config", "data.split")
COUNTS = (
    "max_steps", "batch_size", "gradient_accumulation_steps", "eval_every", "save_every", "keep",
    "log_every",
)  # fmt: skip


def problems(config: Config) -> Iterator[str]:
    """What is wrong with the values of a run, each with key, value and fix."""
    model, data, train = config.model, config.data, config.train
    for key, holds, rule in _rules(train):
        if not holds:
            yield f"train.{key} ({getattr(train, key)}) {rule}"
    given = flatten(config)
    for key in NOT_EMPTY:
        if given[key] is not None and not given[key].strip():
            yield f"{key} ({given[key]!r}) must not be empty: set it or leave it out"
    for key in NO_PATHS:  # paths may have bytes that are no text
        if any("\ud800" <= letter <= "\udfff" for letter in given[key] or ""):
            yield f"{key} ({given[key]!r}) has half a surrogate pair: write it in UTF-8"
    if twice := {name for name in train.trackers if train.trackers.count(name) > 1}:
        yield f"train.trackers names {', '.join(sorted(twice))} twice: leave one out"
    for tracker in train.trackers:
        if tracker not in TRACKERS:
            names = ", ".join(TRACKERS)
            yield f"train.trackers ({tracker}) must be any of {names}, as in train.trackers=[wandb]"
    if train.lora_rank > 0 and not model.init_from:
        yield f"train.lora_rank ({train.lora_rank}) needs weights to adapt: set model.init_from"
    carry = "train.carry_state (true)"
    if train.carry_state and MIXERS[model.mixer].grows(model):
        fixes = [f"model.mixer={' or '.join(found)}"] if (found := _carrying(model)) else []
        fixes += ["model.attention_window"] if "attention_window" in mixer_keys(model.mixer) else []
        yield f"{carry} needs a state to carry: set {', or '.join(fixes)}"
    elif train.carry_state and is_bounded(model):
        yield (
            f"{carry} leads beyond data.seq_len ({data.seq_len}) tokens, where model.mixer="
            f"{model.mixer} with positions ({model.positions}) is not defined: set it to false, or "
            f"model.mixer={' or '.join(_carrying(model))}"
        )
    if train.carry_state:
        yield from (f"{carry} {text}" for text in MIXERS[model.mixer].carry_problems(model))
    if train.carry_state and not data.reset_state_at_documents:
        yield f"{carry} keeps documents apart: set data.reset_state_at_documents=true"
    if train.carry_state and train.gradient_checkpointing:
        yield f"{carry} can't be had with train.gradient_checkpointing: set it to false"
    for section, values in vars(config).items():
        for key, value in vars(values).items():
            most = MOST.get(f"{section}.{key}", INT64)
            if isinstance(value, int) and value > most:
                yield f"{section}.{key} ({value}) must be at most {most}"


def _carrying(model: Any) -> list[str]:
    """Mixers whose state is of constant size and goes on for ever, as they are by default."""
    return [
        mixer
        for mixer, kind in MIXERS.items()
        if not (kind.grows(model) or kind.positions == "learned" or kind.bounded(model))
    ]


def _rules(train: TrainSpec) -> Iterator[tuple[str, bool, str]]:
    """Keys, whether their values are in range (nan never is), and what they must be."""
    for key in COUNTS:
        yield key, getattr(train, key) >= 1, "must be at least 1"
    for key in ("warmup_steps", "sample_tokens", "seed", "weight_decay", "lora_rank"):
        yield key, getattr(train, key) >= 0, "must be at least 0"
    yield "seed", train.seed < MAX_SEED, f"must be below 2^32 ({MAX_SEED})"
    most = train.eval_max_tokens  # a document's first token is no target
    yield "eval_max_tokens", most is None or most >= 2, "must be at least 2, or null for all"
    for key in ("learning_rate", "adamw_learning_rate"):
        rate = getattr(train, key)
        rule = f"must be above 0, {LEAST_RATE} at least, and below 10: 1e-3 is usual"
        yield key, rate is None or LEAST_RATE <= rate < 10, rule
    rule = "is a share of the peak: it must be between 0 and 1"
    yield "final_learning_rate", 0 <= train.final_learning_rate <= 1, rule
    for key in ("learning_rate", "adamw_learning_rate"):
        rate = getattr(train, key) or 0.0
        rule = f"times train.{key} ({rate}) is what a step takes off each weight: it must be at "
        yield "weight_decay", not train.weight_decay * rate > 1, rule + "most 1"
    rule = "is a share of the steps: it must be above 0 and at most 1"
    yield "decay_fraction", 0 < train.decay_fraction <= 1, rule
    for key in ("beta1", "beta2"):
        yield key, 0 <= getattr(train, key) < 1, "must be at least 0 and below 1"
    norm = train.grad_clip
    yield "grad_clip", norm is None or norm > 0, "must be above 0, or null for none"
    rule = f"must be at most train.max_steps ({train.max_steps})"
    yield "warmup_steps", train.warmup_steps <= train.max_steps, rule


def check_run_fits(config: Config) -> None:
    """Raise a ``UserError`` when this machine has less than the least memory that the run takes."""
    model, rows, length = config.model, config.train.batch_size, config.data.seq_len
    width, inner, layers = model.hidden_size, model.intermediate_size, model.num_hidden_layers
    on_cpu = config.train.device == "cpu" or not torch.cuda.is_available()
    memory = memory_of(torch.device("cpu"))  # where every model is built
    # matrices of the blocks, not counting what depends on the mixer
    parameters = layers * (12 * width**2 if inner is None else 2 * width * (width + inner))
    weights = (BYTES_IN_TRAINING if on_cpu and not config.train.lora_rank else 4) * parameters
    if memory is not None and weights > memory:
        named = "intermediate_size", "hidden_size", "num_hidden_layers"
        values = [f"model.{key} ({value})" for key in named if (value := getattr(model, key))]
        raise UserError(
            f"{', '.join(values)} need at least {weights:,} bytes for the parameters, and this "
            f"machine has {memory:,}: make the model smaller"
        )
    # every block's input is kept for the backward pass, in bfloat16 at least
    activations = 2 * rows * length * width * layers
    memory = memory if on_cpu else memory_of(torch.device("cuda", torch.cuda.current_device()))
    if memory is not None and activations > memory:
        raise UserError(
            f"train.batch_size ({rows}) rows of data.seq_len ({length}) tokens need at least "
            f"{activations:,} bytes, and there are {memory:,}: make them smaller; "
            "train.gradient_accumulation_steps gives larger batches in the same memory"
        )
