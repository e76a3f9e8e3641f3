"""However a global batch is divided among processes and micro-batches, the run is the same."""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from accelerate.state import AcceleratorState

from retnet.machine import computes_in_bfloat16
from tests.training.conftest import as_options
from tests.training.test_train import TINY, metrics, run

STEPS = 20


def launch(arguments: list[str], *, code: int = 0, program: tuple[str, ...] = ("train.py",)) -> str:
    """Run train.py in 2 processes over gloo; returns standard error."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [sys.executable, *torchrun, *program, TINY, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == code, result.stderr
    return result.stderr


def fork_two(arguments: list[str], printed: Path) -> str:
    """As ``launch``, without torchrun and the seconds that three interpreters need to start.

    Builds for CUDA refuse gradients in a child after there were any in the parent.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    children = [os.fork() or _one_of_two(rank, port, arguments, printed) for rank in range(2)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0, 0], printed.read_text()
    return printed.read_text()


def _one_of_two(rank: int, port: int, arguments: list[str], printed: Path) -> NoReturn:
    variables = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank,
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
    code = 3
    try:
        os.environ.update({name: str(value) for name, value in variables.items()})
        AcceleratorState._reset_state(reset_partial_state=True)  # as in a process of its own
        with printed.open("a") as sys.stderr:
            code = run(arguments)
    finally:  # never pytest's own code
        os._exit(code)


def exit_codes(printed: str) -> set[str]:
    """Of the processes; -15 where torchrun ended one after it had seen the other's end."""
    found = set(re.findall(r"exitcode  : (-?\d+)", printed))
    assert found
    return found


def losses(folder: Path) -> list[float]:
    rows = metrics(folder)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["train/loss"] for row in rows]


@pytest.mark.parametrize("carry", ["false", pytest.param("true", marks=pytest.mark.slow)])
def test_processes_and_accumulation_give_the_same_losses(
    options, tmp_path: Path, carry: str
) -> None:
    """And a run saved with one goes on with another: 1 x 8, 2 processes x 4, 2 rows x 4 times."""
    keys = {"model.dropout": 0, "train.max_steps": STEPS, "train.eval_every": STEPS // 2,
            "train.save_every": STEPS // 2, "train.carry_state": carry}  # fmt: skip
    common = [*options, *as_options(keys)]
    layouts = {"one": (8, 1), "two": (4, 1), "accumulated": (2, 4)}

    def arguments(layout: str, folder: Path) -> list[str]:
        batch, micro_steps = layouts[layout]
        own = {"train.batch_size": batch, "train.gradient_accumulation_steps": micro_steps,
               "train.out_dir": folder}  # fmt: skip
        return [*common, *as_options(own)]

    def first_half(layout: str, name: str) -> Path:
        """A run folder as it was after half of the steps."""
        folder = tmp_path / name
        shutil.copytree(tmp_path / layout, folder)
        shutil.rmtree(folder / "final")
        shutil.rmtree(folder / f"checkpoints/step_{STEPS}")
        return folder

    assert run(arguments("one", tmp_path / "one")) == 0
    assert run(arguments("accumulated", tmp_path / "accumulated")) == 0
    two = arguments("two", tmp_path / "two")
    forks = carry == "false" and torch.version.cuda is None
    printed = fork_two(two, tmp_path / "printed") if forks else launch(two)
    assert "fp32, 2 processes" in printed
    names = ["accumulated", "two"]
    for before, layout in (("two", "accumulated"), ("accumulated", "one"), ("one", "two")):
        names.append(f"{before} then {layout}")
        folder = first_half(before, names[-1])
        if layout != "two":
            assert run(arguments(layout, folder)) == 0
        elif carry == "true":  # in the slow variant only: it takes as long as all the others
            launch(arguments(layout, folder))
    expected = losses(tmp_path / "one")
    assert len(expected) == STEPS
    for name in names[: 5 if carry == "true" else 4]:
        assert losses(tmp_path / name) == pytest.approx(expected, abs=1e-5), name
    ends = [metrics(tmp_path / name)[-1]["val/loss"] for name in ("one", "two")]
    assert ends[0] == pytest.approx(ends[1], abs=1e-5)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all(options, tmp_path: Path) -> None:
    """After the same step, which is saved; then the run goes on in one process.

    What there is to say is said by one of them.
    """
    printed = launch(options, code=1, program=("-m", "tests.training.signal_driver"))
    saved = tmp_path / "run/checkpoints/step_3"
    assert f"stopped after step 3, saved in {saved}" in printed
    assert printed.count("windows     1/(1-decay)") == 1
    assert exit_codes(printed) <= {"143", "-15"}, printed
    assert saved.is_dir()
    assert run(options, train__batch_size=8) == 0
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_mistake_in_the_data_is_no_traceback(options, tmp_path: Path) -> None:
    """The main process finds it; the others must not end in the library that they wait in."""
    printed = launch([*options, f"data.source={tmp_path}/no.txt"], code=1)
    assert f"error: data.source ({tmp_path}/no.txt) does not exist" in printed
    assert printed.count("Traceback") == 1  # torchrun's own
    assert exit_codes(printed) <= {"2", "-15"}, printed


LAUNCHED = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "1"}  # fmt: skip


@pytest.mark.parametrize(
    ("size", "lacking", "words"),
    [
        ("2", list(LAUNCHED)[1:], "(2) is set, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not"),
        ("2", ["LOCAL_RANK"], "WORLD_SIZE (2) is set, but LOCAL_RANK not"),
        ("x", [], "WORLD_SIZE (x) must be a whole number"),
        ("0", [], "WORLD_SIZE (0) must be a whole number"),
        ("\u00b2", [], "WORLD_SIZE (\u00b2) must be a whole number"),
    ],
)
def test_world_size_without_torchrun(
    options, tmp_path: Path, capsys, monkeypatch, size: str, lacking: list[str], words: str
) -> None:
    """Neither a traceback about an address nor a wait for processes that do not come."""
    for name, value in {**LAUNCHED, "WORLD_SIZE": size}.items():
        monkeypatch.setenv(name, value)
        if name in lacking:
            monkeypatch.delenv(name)
    assert run(options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({**LAUNCHED, "RANK": "2"}, "RANK (2) must be below WORLD_SIZE (2)"),
        ({**LAUNCHED, "RANK": "x"}, "RANK (x) must be a whole number"),
        ({**LAUNCHED, "LOCAL_RANK": "2"}, "LOCAL_RANK (2) must be below WORLD_SIZE (2)"),
        ({**LAUNCHED, "LOCAL_RANK": "first"}, "LOCAL_RANK (first) must be a whole number"),
        ({"LOCAL_RANK": "first"}, "(LOCAL_RANK=first"),
        ({"LOCAL_RANK": "0", "RANK": "x"}, "RANK (x) is set, but WORLD_SIZE not"),
        ({"RANK": "1"}, "RANK (1) is set, but WORLD_SIZE not"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE (2) is set, but WORLD_SIZE not"),
        ({"PMI_SIZE": "2"}, "PMI_SIZE (2) is set, but WORLD_SIZE not"),
        ({"ACCELERATE_DEBUG_MODE": "x"}, "ACCELERATE_DEBUG_MODE=x"),
        ({"ACCELERATE_USE_CPU": "x"}, "ACCELERATE_USE_CPU=x"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED (true) is not possible"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "ACCELERATE_USE_MEGATRON_LM (true) is not poss"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "PARALLELISM_CONFIG (true) is not poss"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "unset it, and set train.compile=true"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, "unset it, and set train.grad_clip"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "(4) is not train.gradient_accumulation"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "ACCELERATE_MIXED_PRECISION (fp16) is not poss"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "ACCELERATE_MIXED_PRECISION (fp8) is not possible"),
        ({"ACCELERATE_TORCH_DEVICE": "meta"}, "ACCELERATE_TORCH_DEVICE (meta) is not train.device"),
        ({"ACCELERATE_USE_FSDP": "true"}, "ACCELERATE_USE_FSDP (true) needs a GPU"),
    ],
)
@pytest.mark.slow
def test_an_environment_that_makes_no_processes(
    options, tmp_path: Path, capsys, monkeypatch, variables: dict[str, str], words: str
) -> None:
    """What accelerate and torch make of it ends in one line too, and the next run works."""
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", *LAUNCHED):
        monkeypatch.setenv(name, "1")  # to be restored: accelerate writes some of them
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    AcceleratorState._reset_state(reset_partial_state=True)  # as in a process of its own
    assert run(options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
    for name in {"WORLD_SIZE", "LOCAL_WORLD_SIZE", *LAUNCHED, *variables}:
        monkeypatch.delenv(name, raising=False)
    assert run(options, train__max_steps=2) == 0


def test_accelerate_does_not_divide_the_gradient(options, tmp_path: Path, monkeypatch) -> None:
    two = {"train__batch_size": 2, "train__gradient_accumulation_steps": 2}
    assert run(options, **two, train__out_dir=tmp_path / "without") == 0
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    assert run(options, **two) == 0
    assert metrics(tmp_path / "run") == metrics(tmp_path / "without")


def test_the_precision_that_accelerate_launch_asks_for(
    options, tmp_path: Path, capsys, monkeypatch
) -> None:
    """It was ignored; what it sets when nobody asked, no, leaves the choice to the key."""
    options += ["train.max_steps=2"]
    of_cpu = "bf16" if computes_in_bfloat16() else "fp32"
    for asked, key, used in (("bf16", "auto", "bf16"), ("no", "bf16", "bf16"),
                             ("bf16", "bf16", "bf16"), ("no", "auto", of_cpu)):  # fmt: skip
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
        folder = tmp_path / f"{asked}-{key}"
        assert run(options, train__precision=key, train__out_dir=folder) == 0
        assert f"cpu, {used}, 1 process" in capsys.readouterr().err
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert run(options, train__precision="fp32", train__out_dir=tmp_path / "b") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "ACCELERATE_MIXED_PRECISION (bf16) contradicts train.precision (fp32)" in line
    assert not (tmp_path / "b").exists()


def test_world_size_that_accelerate_ignored(options, capsys, monkeypatch) -> None:
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("retnet.training.processes.Accelerator", lambda **_: SingleProcess())
    assert run(options) == 2
    assert "WORLD_SIZE (2) is set, but accelerate runs 1 process" in capsys.readouterr().err


class SingleProcess:
    """What accelerate would give if it overlooked the environment."""

    num_processes = 1
