"""A decode step compiled ahead of time: one call of C++ a token, kept for later processes.

``torch.compile`` looks at each token whether what it compiled still holds, and hands over every
weight; for a small model that takes as long as the computation. A program made ahead of time has
its weights from the start and takes tokens, positions and states.

What is kept in a folder has no weights in it: it says which of the step's tensors each of them is,
and is found by everything that it was made of. What cannot be read is made anew.
"""

import contextlib
import functools
import gc
import hashlib
import inspect
import json
import logging
import tempfile
import warnings
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .weights import MOST_LEFT, onednn_is_on

logger = logging.getLogger(__name__)

Compute = Callable[[Any, Tensor, Tensor, int, Sequence[Any]], Tensor]  # ``DecodeStep._compute``
MOST_KEPT = 32  # programs in a folder
ROUNDED = 0.02  # of the largest logit: as far apart two steps may be that round activations
OPTIONS = {"aot_inductor.package_constants_in_so": False, "always_keep_tensor_constants": True}


class AheadOfTime:
    """``DecodeStep._compute`` for few rows on the CPU; other calls, and failures, go ``otherwise``.

    Args:
        step: A ``DecodeStep``, whose state must not grow. It is handed over at each call anew and
            not held: it would refer to itself.
        otherwise: The step compiled at its first call.
        folder: Of the programs, made where it lacks.
    """

    def __init__(self, step: Any, otherwise: Compute, folder: Path) -> None:
        self.config, self.otherwise, self.folder = step.config, otherwise, folder
        self.tensors = tensors_of(step)
        self.programs: dict[int, Program | None] = {}  # by rows

    def __call__(
        self, step: Any, tokens: Tensor, positions: Tensor, length: int, states: Sequence[Any]
    ) -> Tensor:
        rows = len(tokens)
        if rows not in self.programs:
            wanted = rows <= MOST_LEFT and tokens.device.type == "cpu"
            self.programs[rows] = self._program(step, rows, states) if wanted else None
        program = self.programs[rows]
        if program is None:
            return self.otherwise(step, tokens, positions, length, states)
        return program(tokens, positions, states)

    def _program(self, step: Any, rows: int, states: Sequence[Any]) -> "Program | None":
        places = [(i, name) for i, state in enumerate(states) for name in state or ()]
        held = [states[i][name] for i, name in places]
        if not all(x.is_contiguous() for x in held):
            return None
        path = self.folder / f"{self._key(rows, held)}.pt2"
        try:
            program = Program(path, self.tensors, places)
            _check(program, step, rows, states)
            with contextlib.suppress(OSError):  # in a folder of somebody else
                path.touch()
            return program
        except Exception as error:  # what another process left there may do anything
            if path.exists():
                logger.info(f"{path} is compiled anew: {error}")
        with tempfile.TemporaryDirectory() as folder:
            try:
                made = Path(folder) / path.name
                self._make(made, step, rows, places, states)
                program = Program(made, self.tensors, places)
                _check(program, step, rows, states)
            except Exception as error:  # compilers raise anything
                logger.info(f"the step is compiled at its first call, not ahead of time: {error}")
                return None
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                for file in (_map_of(made), made):  # the program last: it is looked for
                    _put(file, self.folder)
                _tidy(self.folder)
            except OSError as error:
                logger.info(f"the compiled step is not kept for later: {error}")
        return program

    def _key(self, rows: int, held: Sequence[Tensor]) -> str:
        """A name that says all that a program depends on."""
        parts = [
            torch.__version__,
            torch.backends.cpu.get_cpu_capability(),
            torch.cpu.get_capabilities(),
            torch.get_num_threads(),
            onednn_is_on(),
            _code(),
            self.config.to_dict(),
            rows,
            [_shape(x) for x in held],
            [(name, *_shape(x)) for name, x in self.tensors.items()],
        ]
        text = json.dumps(parts, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def _make(
        self,
        path: Path,
        step: Any,
        rows: int,
        places: Sequence[tuple[int, str]],
        states: Sequence[Any],
    ) -> None:
        quiet = warnings.catch_warnings(action="ignore")  # of torch about itself
        with torch.inference_mode(False), torch.no_grad(), quiet:
            tokens = torch.zeros(rows, dtype=torch.int64)
            held = [torch.zeros_like(states[i][name]) for i, name in places]
            computation = Computation(step, places, [state is None for state in states])
            exported = torch.export.export(
                computation, (tokens, tokens.clone(), *held), strict=False
            )
            torch._inductor.aoti_compile_and_package(
                exported,
                package_path=str(path),
                inductor_configs=OPTIONS,
            )
        _map_of(path).write_text(json.dumps(_places(exported.constants, self.tensors)))
        del exported, computation
        gc.collect()  # the compiler's graphs refer to themselves, and hold the weights


class Computation(nn.Module):
    """A step as a function of tensors only."""

    def __init__(
        self, step: Any, places: Sequence[tuple[int, str]], without: Sequence[bool]
    ) -> None:
        super().__init__()
        self.step, self.places, self.without = step, places, without

    def forward(self, tokens: Tensor, positions: Tensor, *held: Tensor) -> Tensor:
        states: list[Any] = [None if none else {} for none in self.without]
        for (i, name), x in zip(self.places, held, strict=True):
            states[i][name] = x
        logits: Tensor = self.step._compute(tokens, positions, 0, states)
        return logits


class Program:
    """A program with the tensors of a step.

    Raises:
        OSError, RuntimeError, ValueError, KeyError: It is not there, or no whole one.
    """

    def __init__(
        self, path: Path, tensors: dict[str, Tensor], places: Sequence[tuple[int, str]]
    ) -> None:
        names = json.loads(_map_of(path).read_text())
        if not path.exists():
            raise FileNotFoundError(path)
        program: Any = torch._inductor.aoti_load_package(str(path))
        with torch.inference_mode(False):  # aliases: see _let_go
            fqns = program.get_constant_fqns()
            constants = {name: tensors[names[name]].detach() for name in fqns}
        program.load_constants(constants, check_full_update=True, user_managed=True)
        self.constants = constants  # which are the program's only as long as they live
        weakref.finalize(self, _let_go, list(constants.values()))
        self.program, self.places = program, places
        # without the look for tensors in nested arguments, which takes as long as a small layer
        self.run: Callable[[list[Tensor]], Sequence[Tensor]] = program.loader.boxed_run

    def __call__(self, tokens: Tensor, positions: Tensor, states: Sequence[Any]) -> Tensor:
        """The logits; the states are changed in place."""
        held = [states[i][name] for i, name in self.places]
        # strides are built in, and a sampler's tokens are a column of what it drew
        return self.run([tokens.contiguous(), positions.contiguous(), *held])[0]


def _let_go(aliases: Sequence[Tensor]) -> None:
    """Leave tensors without memory: torch never drops those that a program was handed."""
    with torch.inference_mode():
        for alias in aliases:
            alias.set_()  # type: ignore[call-overload]


def _check(program: Program, step: Any, rows: int, states: Sequence[Any]) -> None:
    """A ``ValueError`` where a program does not compute the step."""
    tokens = torch.zeros(rows, dtype=torch.int64)
    copies = [[state and {k: x.clone() for k, x in state.items()} for state in states]
              for _ in range(2)]  # fmt: skip
    with torch.inference_mode():
        expected = step._compute(tokens, tokens, 0, copies[0])
        found = program(tokens, tokens, copies[1])
    # products with quantised weights round activations: those near a border this way or that
    share = ROUNDED if step.weights else torch.finfo(expected.dtype).eps ** 0.5
    atol = share * expected.abs().amax().item()
    if not torch.allclose(found, expected, rtol=0, atol=atol, equal_nan=True):
        raise ValueError("it computes something else")


def tensors_of(thing: Any, name: str = "") -> dict[str, Tensor]:
    """All that a step computes with, by where it is: weights, and what was made of them."""
    parts: Any = ()
    if isinstance(thing, Tensor):
        return {name: thing} if thing.layout == torch.strided else {}
    if isinstance(thing, list | tuple):
        parts = enumerate(thing)
    elif isinstance(thing, dict):
        parts = thing.items()
    elif inspect.isfunction(thing):
        parts = inspect.getclosurevars(thing).nonlocals.items()
    elif type(thing).__module__.startswith(__name__.split(".fast_decode")[0] + "."):
        parts = getattr(thing, "__dict__", {}).items()
    return {
        place: x
        for key, part in parts
        if not isinstance(part, nn.Module)
        for place, x in tensors_of(part, f"{name}.{key}").items()
    }


def _places(constants: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, str]:
    """Where each of a program's constants is, by the names that compilers have for it.

    torch names them by their order, here and once more when it compiles.

    Raises:
        ValueError: One of them is no tensor of the step.
    """
    known = {_where(x): name for name, x in tensors.items()}
    unknown = [name for name, x in constants.items() if _where(x) not in known]
    if unknown:
        raise ValueError(f"{', '.join(unknown)} are no tensors of the step")
    places = {name: known[_where(x)] for name, x in constants.items()}
    return places | {f"_tensor_constant{i}": place for i, place in enumerate(places.values())}


def _map_of(path: Path) -> Path:
    return path.with_suffix(".json")


def _where(x: Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), *_shape(x)


def _shape(x: Tensor) -> tuple[Any, ...]:
    return str(x.dtype), tuple(x.shape), x.stride()


@functools.cache
def _code() -> str:
    """What the model's code says."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _put(file: Path, folder: Path) -> None:
    """A copy in a folder, whole or not at all."""
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as copy:
        copy.write(file.read_bytes())
    Path(copy.name).replace(folder / file.name)


def _tidy(folder: Path) -> None:
    """Leave the programs that were used last, and of others nothing, nor of unfinished copies."""
    used: dict[str, float] = {}
    files = list(folder.iterdir())
    for file in files:
        with contextlib.suppress(FileNotFoundError):  # another process tidies too
            used[file.stem] = max(file.stat().st_mtime, used.get(file.stem, 0.0))
    kept = sorted(used, key=lambda name: used[name])[-MOST_KEPT:]
    for file in files:
        if file.stem not in kept:
            file.unlink(missing_ok=True)
