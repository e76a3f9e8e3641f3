"""Reading the configuration of a run: defaults < YAML file < key=value arguments."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from retnet.data import DataSpec
from retnet.data.spec import BPE
from retnet.errors import UserError
from retnet.paths import expand, kind_of
from retnet.training.limits import problems
from retnet.training.spec import Config, config_schema, settled


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read and check a configuration.

    Args:
        path: A YAML file with the sections model, data and train; None for the defaults.
        overrides: ``section.key=value``, the last word.

    Raises:
        UserError: Names the key or file, its value and the fix.
    """
    layers = [] if path is None else [_read_yaml(expand(path, "configuration"))]
    layers += [_read_override(override) for override in overrides]
    try:
        merged = OmegaConf.structured(config_schema())
        for layer in layers:
            for key in sorted(OmegaConf.missing_keys(layer)):  # a merge passes over them
                raise UserError(
                    f"configuration key ({key}): ??? is no value: set it, or leave it out"
                )
            merged = OmegaConf.merge(merged, layer)
        config = cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        message, key = str(error).splitlines()[0], getattr(error, "full_key", None) or "sections"
        raise UserError(
            f"configuration key ({key}): {message}; python train.py --help lists all"
        ) from error
    except TypeError as error:  # a mapping for the one key that is a list
        raise UserError("train.trackers must be a list, as train.trackers=[wandb]") from error
    model, data, train = settled(config.model), config.data, config.train
    given = {text.partition("=")[0] for text in overrides}
    if "data.tokenizer" in given and "data.vocab_size" not in given and data.tokenizer != BPE:
        # the size in the file is for the tokenizer in the file
        data = replace(data, vocab_size=DataSpec.vocab_size)
    if train.out_dir is None:
        name = "default" if path is None else Path(path).stem
        train = replace(train, out_dir=f"runs/{name}-{model.mixer}")
    _ = train.run_folder  # which out_dir must be able to name
    data.validate()
    config = replace(config, model=model, data=data, train=train)
    if found := [*problems(config)]:
        raise UserError("; ".join(found))
    return config


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


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
