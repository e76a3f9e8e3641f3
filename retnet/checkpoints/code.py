"""The model's code as files beside a checkpoint, with which transformers alone can load it.

transformers copies flat relative imports only (``from .a import b``), so the model's folders become
one: the file of ``mixers.retention`` is mixers_retention.py, and the imports are rewritten.
"""

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import retnet.model
from retnet.checkpoints.format import CONFIG, COPY_AGAIN
from retnet.files import read_json, write_json
from retnet.model.models import PUBLIC, configuration

MODEL = Path(retnet.model.__file__).parent
MODELS = "models"  # the module with the public classes, below that
SUFFIX = ".py"
NOTICE = "# SPDX-License-Identifier: MIT, Copyright (c) 2026 The RetNet developers\n"
# as transformers looks for them, which knows no other way
RELATIVE_IMPORT = re.compile(r"^\s*from\s+(?P<dots>\.+)(?P<name>[\w.]*)\s+import", re.MULTILINE)


@dataclass(frozen=True)
class ModelCode:
    """What a checkpoint needs to be loaded where this package is not."""

    auto_map: Mapping[str, str]  # which class transformers finds where
    files: Mapping[str, str]  # names and texts

    def write(self, folder: Path) -> None:
        """Add the code to a folder with a model's configuration, which says where it is."""
        config = read_json(folder / CONFIG, COPY_AGAIN)
        write_json(folder / CONFIG, config | {"auto_map": dict(self.auto_map)})
        for name, text in self.files.items():
            (folder / name).write_text(text, encoding="utf-8")


def model_code(model_type: object) -> ModelCode | None:
    """The code of a model as it was when it was first asked for; None without a public class.

    So a run that takes weeks exports the code that it runs, whatever has become of the source.
    """
    for model in PUBLIC:
        if configuration(model).model_type == model_type:
            parts = {
                "AutoConfig": configuration(model),
                "AutoModel": model.model_class,
                "AutoModelForCausalLM": model,
            }
            auto_map = {auto: f"{MODELS}.{kind.__name__}" for auto, kind in parts.items()}
            return ModelCode(auto_map, _files())
    return None


@functools.cache
def _files() -> dict[str, str]:
    return {f"{name}{SUFFIX}": NOTICE + text for name, text in flat_code(MODELS)}


def flat_code(module: str) -> Iterator[tuple[str, str]]:
    """A module (dotted, below the model's folder) and all that it imports there, as of one folder.

    Yields names without dots, and the text with the imports rewritten.
    """
    waiting, done = [module], set()
    while waiting:
        name = waiting.pop()
        if name in done:
            continue
        done.add(name)
        file = MODEL.joinpath(*name.split(".")).with_suffix(SUFFIX)
        package = name if not file.exists() else name.rpartition(".")[0]
        source = file if file.exists() else file.with_suffix("") / "__init__.py"
        text, last = [], 0
        whole = source.read_text(encoding="utf-8")
        for found in RELATIVE_IMPORT.finditer(whole):
            level, own = len(found["dots"]), found["name"]
            assert own, f"{name}: {found[0]}: import from a module by its name"
            base = package.split(".") if package else []
            target = ".".join([*base[: len(base) - level + 1], own])
            waiting.append(target)
            text += [whole[last : found.start("dots")], ".", target.replace(".", "_")]
            last = found.end("name")
        yield name.replace(".", "_"), "".join([*text, whole[last:]])
