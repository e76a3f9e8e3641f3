"""What only a GPU can show: bf16, compilation, FSDP with one process, the forms' agreement."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from retnet.model import retention_chunkwise, retention_parallel, retention_recurrent
from tests.training.conftest import as_options
from tests.training.test_train import TINY, metrics, run, weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
DEVICE = "cuda"
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "DecoderLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


@pytest.fixture
def on_gpu(options: list[str]) -> list[str]:
    """Without dropout, whose random numbers differ between devices."""
    return [*options, "model.dropout=0", f"train.device={DEVICE}"]


def losses(folder: Path) -> list[float]:
    return [row["train/loss"] for row in metrics(folder)]


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 0.05), ("auto", 0.05)]
)
def test_a_run_is_that_of_the_cpu(
    on_gpu, tmp_path: Path, capsys, precision: str, tolerance: float
) -> None:
    """And a run saved on the GPU goes on there and on the CPU."""
    cpu = [*on_gpu, "train.device=cpu", "train.precision=fp32", f"train.out_dir={tmp_path / 'cpu'}"]
    assert run(cpu) == 0
    capsys.readouterr()
    assert run(on_gpu, train__precision=precision) == 0
    assert f", {'fp32' if precision == 'fp32' else 'bf16'}, 1 process" in capsys.readouterr().err
    expected = losses(tmp_path / "cpu")
    assert losses(tmp_path / "run") == pytest.approx(expected, abs=tolerance)
    assert all(w.dtype == torch.float32 for w in weights(tmp_path / "run/final").values())
    for steps, device in ((8, DEVICE), (10, "cpu")):
        changes = {"train__max_steps": steps, "train__device": device}
        assert run(on_gpu, train__precision=precision, **changes) == 0
        assert f"(step {steps - 2})" in capsys.readouterr().err
    assert len(losses(tmp_path / "run")) == 10


@pytest.mark.parametrize("carry", ["false", "true"])
def test_a_compiled_run(on_gpu, tmp_path: Path, carry: str) -> None:
    common = [*on_gpu, "train.precision=bf16", f"train.carry_state={carry}"]
    assert run(common) == 0
    assert run([*common, "train.compile=true", f"train.out_dir={tmp_path / 'compiled'}"]) == 0
    expected = losses(tmp_path / "run")
    assert losses(tmp_path / "compiled") == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_the_forms_agree(dtype: torch.dtype, tolerance: float) -> None:
    """Outputs, states and gradients of the three forms, from a state that is not zero."""
    torch.manual_seed(0)
    b, h, t, k, v = 2, 3, 37, 8, 16
    log_decay = torch.log(torch.tensor([0.8, 0.95, 0.99], dtype=dtype, device=DEVICE))
    state = torch.randn(b, h, k, v, dtype=dtype, device=DEVICE)
    inputs = [torch.randn(b, h, t, n, dtype=dtype, device=DEVICE) for n in (k, k, v)]
    weighting = torch.randn(b, h, t, v, dtype=dtype, device=DEVICE)
    results = []
    forms = (retention_recurrent, retention_parallel, partial(retention_chunkwise, chunk_size=8))
    for form in forms:
        leaves = [x.clone().requires_grad_() for x in inputs]
        out, end = form(*leaves, log_decay, initial_state=state)
        ((out * weighting).sum() + end.sum()).backward()
        results.append([out.detach(), end.detach(), *(x.grad for x in leaves)])
    for other in results[1:]:
        for a, b_ in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b_, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("mixer", ["retention", "attention"])
def test_fsdp_with_one_process(on_gpu, tmp_path: Path, mixer: str) -> None:
    """The run of a plain process; its checkpoints load without FSDP, and plain ones with it."""
    common = [*on_gpu, "train.precision=fp32", f"model.mixer={mixer}"]

    def launch(**changes: object) -> None:
        keys = {"train.out_dir": tmp_path / "fsdp"} | {
            key.replace("__", "."): value for key, value in changes.items()
        }
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
        driver = ["-m", "tests.training.fsdp_driver", TINY]
        result = subprocess.run(
            [sys.executable, *torchrun, *driver, *common, *as_options(keys)],
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
            env={**os.environ, **FSDP},
        )
        assert result.returncode == 0, result.stderr

    assert run(common, train__out_dir=tmp_path / "plain") == 0
    launch()
    expected = losses(tmp_path / "plain")
    assert losses(tmp_path / "fsdp") == pytest.approx(expected, abs=1e-4)
    shapes = [
        {key: value.shape for key, value in weights(tmp_path / name / "final").items()}
        for name in ("plain", "fsdp")
    ]
    assert shapes[0] == shapes[1]
    launch(train__out_dir=tmp_path / "plain", train__max_steps=8)
    assert run(common, train__out_dir=tmp_path / "fsdp", train__max_steps=8) == 0
    ends = [losses(tmp_path / name)[6:] for name in ("plain", "fsdp")]
    assert ends[0] == pytest.approx(ends[1], abs=1e-4)
