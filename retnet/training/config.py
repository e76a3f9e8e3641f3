"""Reading the configuration of a run: defaults < YAML file < key=value arguments."""

import dataclasses
import difflib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import Field, replace
from pathlib import Path
from typing import Any

import yaml

from retnet.data import DataSpec
from retnet.data.aliases import MOST_TEXT
from retnet.data.spec import BPE
from retnet.errors import UserError, memory_errors
from retnet.paths import expand, kind_of
from retnet.training.initial import OF_TRAINING, changes, taken_over
from retnet.training.limits import problems
from retnet.training.optimizer import settled_optimizer
from retnet.training.recipes import find_recipe, recipe_names
from retnet.training.spec import Config, TrainSpec, config_schema, flatten, settled
from retnet.training.values import fit, read_argument, read_yaml, shown, write_yaml

logger = logging.getLogger(__name__)

Values = dict[str, Any]  # by section.key
RECORDED = "config.yaml"  # of a run


def load_config(
    path: str | Path | None, overrides: Sequence[str] = (), *, recorded: bool = False
) -> Config:
    """Read and check a configuration.

    Args:
        path: A YAML file with the sections model, data and train, or where there is no such file
            a recipe's name; None for the defaults.
        overrides: ``section.key=value``, the last word.
        recorded: The file is one that a run wrote, and there is nothing to say about it.

    Raises:
        UserError: Names the key or file, its value and the fix.
    """
    file = None if path is None else _recipe_or_file(path)
    in_file = {} if file is None else _read_file(file)
    if recorded and (lost := _keys().keys() - {key.partition(".")[0] for key in in_file}):
        raise UserError(f"configuration ({path}) lacks the sections {', '.join(sorted(lost))}")
    given = dict(_read_override(text) for text in overrides)
    if not recorded:
        plain = [key for key, value in in_file.items() if "${" in str(value)]
        if plain:
            logger.info(f"{', '.join(plain)} in {path}: ${{...}} is text, nothing is replaced")
        in_file = _with_initial(in_file, given, file)
    config = _fill({**in_file, **given})
    model, data, train = settled(config.model, given), config.data, config.train
    if "data.tokenizer" in given and "data.vocab_size" not in given and data.tokenizer != BPE:
        # the size in the file is for the tokenizer in the file
        data = replace(data, vocab_size=DataSpec.vocab_size)
    if "train.max_steps" in given and "train.warmup_steps" not in given:
        train = _with_shorter_warmup(train)
    train = settled_optimizer(train, in_file, given)
    if train.out_dir is None:
        train = replace(train, out_dir=_default_folder(file, model.mixer))
    _ = train.run_folder  # which out_dir must be able to name
    data.validate()
    if data.validation is not None and "data.validation_fraction" in given:
        raise UserError(
            f"data.validation_fraction ({data.validation_fraction}) has no meaning with "
            f"data.validation ({data.validation}): leave one of them out"
        )
    config = replace(config, model=model, data=data, train=train)
    if found := [*problems(config)]:
        raise UserError("; ".join(found))
    return config


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML."""
    return write_yaml(dataclasses.asdict(config))


def is_recorded(file: Path) -> bool:
    """Whether a configuration is one that a run wrote, and not a recipe by hand.

    A run's names all keys, but for those that came later; a recipe names a few.
    """
    try:
        return 2 * len(_read_file(file)) > len(flatten(load_config(file, recorded=True)))
    except UserError:
        return False


def key_of(override: str) -> str:
    """The key of a ``section.key=value`` argument."""
    return override.partition("=")[0]


def _fill(values: Values) -> Config:
    """The configuration with these values."""
    sections: dict[str, Values] = {name: {} for name in _keys()}
    for key, value in values.items():
        section, _, name = key.partition(".")
        sections[section][name] = value
    schema = config_schema()
    default = schema()
    return schema(**{k: replace(getattr(default, k), **v) for k, v in sections.items()})


def _with_initial(in_file: Values, given: Values, file: Path | None) -> Values:
    """A recipe's values with those that belong to the weights of ``model.init_from``, if any.

    A run that goes on keeps what it took over when it began, also where they are gone.
    """
    source = given.get("model.init_from", in_file.get("model.init_from"))
    if not source:
        return in_file
    values = {**in_file, **given}
    mixer = values.get("model.mixer", config_schema()().model.mixer)
    out_dir = values.get("train.out_dir") or _default_folder(file, mixer)
    taken = _begun_with(source, expand(str(out_dir), "train.out_dir") / RECORDED)
    if taken is None:
        taken = {key: fit(_option(key).type, own, key) for key, own in taken_over(source)}
    size = taken.pop("data.vocab_size", DataSpec.vocab_size)  # the recipe's is for its own
    for key, own in taken.items():
        if key.startswith("model.") and given.get(key) not in (None, own):
            raise UserError(
                f"{key} ({shown(given[key])}) is {shown(own)} in the model of model.init_from "
                f"({source}), whose weights mean that: leave it out"
            )
    taken = {key: own for key, own in taken.items() if key not in given}
    if changed := changes(in_file, taken):
        logger.info(f"model.init_from ({source}) decides: {changed}")
    return {**in_file, **taken, **({"data.vocab_size": size} if "data.tokenizer" in taken else {})}


def _begun_with(source: str, file: Path) -> Values | None:
    """What a run that is there took over from the same ``source``; None where there is no such."""
    try:
        began = flatten(load_config(file, recorded=True)) if file.is_file() else {}
    except UserError:  # which is told when the two are compared
        return None
    if began.get("model.init_from") != source:
        return None
    kept = {key: own for key, own in began.items() if key.startswith("model.")}
    kept = {key: own for key, own in kept.items() if key.partition(".")[2] not in OF_TRAINING}
    return kept | {key: began[key] for key in ("data.tokenizer", "data.vocab_size")}


def _default_folder(file: Path | None, mixer: str) -> str:
    return f"runs/{'default' if file is None else file.stem}-{mixer}"


def _with_shorter_warmup(train: TrainSpec) -> TrainSpec:
    """A warm-up that nobody asked for on the command line fits the steps that somebody did."""
    if not 0 < train.max_steps < train.warmup_steps:
        return train
    steps = train.max_steps // 10
    logger.info(
        f"train.warmup_steps ({train.warmup_steps}) is too long for train.max_steps "
        f"({train.max_steps}): it is {steps}, a tenth of them"
    )
    return replace(train, warmup_steps=steps)


def _recipe_or_file(path: str | Path) -> Path:
    """The file of a path; where none is, and it is a recipe's name, that recipe's."""
    file = expand(path, "configuration")
    recipe = None if kind_of(file, "configuration") == "file" else find_recipe(file)
    if recipe is None:
        return file
    logger.info(f"configuration ({path}) is no file here: it is the recipe {recipe}")
    return recipe


def _read_file(path: Path) -> Values:
    if kind_of(path, "configuration") != "file":
        raise UserError(
            f"configuration ({path}) is not a file: give the path of a YAML file, or a recipe's "
            f"name: {', '.join(recipe_names())}"
        )
    try:
        with memory_errors(path):
            text = path.read_text(encoding="utf-8")
        if len(text) > MOST_TEXT:
            raise UserError(
                f"configuration ({path}) has {len(text):,} characters, and no more than "
                f"{MOST_TEXT:,} are read: give the path of a YAML file as configs/tiny.yaml"
            )
        content = read_yaml(text)
    except UserError:
        raise
    except OSError as error:
        raise UserError(
            f"configuration ({path}) cannot be read ({error.strerror}): check its permissions"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"configuration ({path}) is not valid YAML: byte {error.start + 1} is not UTF-8, save "
            "it in that encoding"
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"configuration ({path}) is not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(
            f"configuration ({path}) must have the sections model, data and train: it holds a "
            f"{type(content).__name__}"
        )
    try:
        return dict(_flat(content))
    except UserError as error:
        raise UserError(f"configuration ({path}): {error}") from error


def _flat(content: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    """The values of a file, each of a key that there is and of its type."""
    for section, values in content.items():
        if str(section) not in _keys():
            raise _no_section(str(section))
        if not isinstance(values, dict | None):
            raise UserError(f"{section} ({shown(values)}) must be a section with keys")
        for name, value in (values or {}).items():
            key = f"{section}.{name}"
            yield key, fit(_option(key).type, value, key)


def _read_override(text: str) -> tuple[str, Any]:
    """Key and value of a ``section.key=value`` argument."""
    key, equals, value = text.partition("=")
    if text.startswith("-"):
        meant = key.lstrip("-")
        if "." not in meant and not _meant_by(meant):
            raise UserError(
                f"argument ({text}) is not known: there are a YAML file, which comes first, keys "
                "as train.max_steps=100 and --print-config"
            )
        meant = "".join(_meant_by(meant)[:1]) or meant
        raise UserError(
            f"argument ({text}) is not known: keys are written without dashes, as in "
            f"{meant}={value if equals else 'VALUE'}"
        )
    if not equals or "." not in key:
        example = [f"{name}={value}" for name in _meant_by(key) if equals and value]
        raise UserError(
            f"argument ({text}) must be section.key=value without blanks, as "
            f"{(example or ['train.max_steps=100'])[0]}"
        )
    if text != text.encode(errors="ignore").decode():
        raise UserError(f"argument ({text!r}) is not UTF-8: write it in UTF-8")
    kind = _option(key).type
    try:
        found = read_argument(kind, value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"argument ({text}) can't be read: {reason}; quote the value") from error
    return key, fit(kind, found, key)


def _keys() -> dict[str, dict[str, Field]]:
    """All keys by section."""
    sections = vars(config_schema()())
    return {name: {f.name: f for f in dataclasses.fields(of)} for name, of in sections.items()}


def _meant_by(name: str) -> list[str]:
    """The keys that a name may mean which is written without its section, or as an option."""
    plain = name.strip().replace("-", "_")
    keys = [(section, key) for section, names in _keys().items() for key in names]
    return [f"{section}.{key}" for section, key in keys if plain in (key, f"{section}.{key}")]


def _no_section(name: str) -> UserError:
    """The error for what stands in a file where only sections may."""
    meant = _meant_by(name)
    if not meant:
        return _unknown(name, name, _keys())
    section, _, key = meant[0].partition(".")
    return UserError(
        f"configuration key ({name}) stands outside of its section: write {key} in a line below "
        f"{section}:, indented by two blanks"
    )


def _option(key: str) -> Field:
    """The field of a ``section.key``; a ``UserError`` where there is none."""
    section, _, name = key.partition(".")
    sections = _keys()
    if section not in sections:
        raise _unknown(key, section, sections)
    if name not in sections[section]:
        raise _unknown(key, name, sections[section])
    return sections[section][name]


def _unknown(key: str, name: str, there: dict[str, Any]) -> UserError:
    near = difflib.get_close_matches(name, there)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return UserError(
        f"configuration key ({key}) is not known: {hint}python train.py --help lists all"
    )
