"""Muon: torch's numbers, which parameters it has, what is saved of it, and its learning rates."""

import math

import pytest
import torch

from retnet import RetNetConfig, RetNetForCausalLM, RWKVConfig, RWKVForCausalLM
from retnet.errors import UserError
from retnet.training import muon
from retnet.training.config import load_config
from retnet.training.muon import Muon, orthogonalize, parameters_of_muon
from retnet.training.optimizer import build_optimizer, learning_rate
from retnet.training.spec import ADAMW_SHARE, RATES, TrainSpec
from tests.training.test_train import metrics, run


def losses(folder) -> list[float]:
    return [row["train/loss"] for row in metrics(folder)]


SHAPES = [(6, 6), (6, 6), (12, 5), (5, 12), (5, 12), (1, 4)]


def trained(kind, steps: int = 4, **options) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(*s, generator=generator).requires_grad_() for s in SHAPES]
    optimizer = kind(weights, **options)
    for _ in range(steps):
        for w in weights:
            w.grad = torch.randn(*w.shape, generator=generator)
        optimizer.step()
    return [w.detach() for w in weights]


def ours(weights, *, lr: float, weight_decay: float) -> Muon:
    return Muon([{"params": weights, "muon": True, "weight_decay": weight_decay}], lr=lr)


@pytest.mark.parametrize("wide", [False, True])
def test_torchs_numbers(wide: bool, monkeypatch) -> None:
    """Both iterate in bfloat16; in float32, where a CPU lacks it, they differ by its rounding."""
    monkeypatch.setattr(muon, "computes_in_bfloat16", lambda: not wide)
    keys = {"lr": 0.02, "weight_decay": 0.1}
    theirs = trained(torch.optim.Muon, adjust_lr_fn="match_rms_adamw", **keys)
    moved = 4 * 0.02 * 0.2 * math.sqrt(12)  # the most that a number may have moved, about
    for mine, other in zip(trained(ours, **keys), theirs, strict=True):
        assert (mine - other).abs().max() < (0.05 if wide else 0.02) * moved


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 4, 9), (2, 9, 4)])
def test_singular_values_become_one(shape, monkeypatch) -> None:
    monkeypatch.setattr(muon, "computes_in_bfloat16", lambda: False)
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    found = orthogonalize(x)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    assert found.shape == x.shape and found.dtype == torch.float32
    singular = torch.linalg.svdvals(found)
    assert singular.min() > 0.6 and singular.max() < 1.3
    assert torch.nn.functional.cosine_similarity(found.flatten(1), (u @ v).flatten(1)).min() > 0.95
    assert not orthogonalize(torch.zeros(1, 3, 3)).any()


def test_matrices_of_blocks_are_its_own_and_the_rest_is_adamws() -> None:
    model = RWKVForCausalLM(RWKVConfig(hidden_size=16, vocab_size=20))
    optimizer = build_optimizer(model, TrainSpec(optimizer="muon", weight_decay=0.3))
    own = {id(p) for p in parameters_of_muon(optimizer)}
    names = {name for name, p in model.named_parameters() if id(p) in own}
    assert all(name.startswith("model.layers.") and name.endswith(".weight") for name in names)
    assert len(names) == 4 * 7  # RWKV's four and the three of its channel mix, in four layers
    assert not any("norm" in name for name in names)
    first, *others = optimizer.param_groups
    assert first["weight_decay"] == 0.3 and first["share"] == 1
    assert {group["share"] for group in others} == {ADAMW_SHARE}
    everything = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(everything) == len(set(map(id, everything))) == len([*model.parameters()])


def test_one_step_of_both(monkeypatch) -> None:
    model = RetNetForCausalLM(RetNetConfig(hidden_size=16, num_heads=2, vocab_size=20))
    optimizer = build_optimizer(model, TrainSpec(optimizer="muon"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.arange(12)[None]
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert all((p != before[name]).any() for name, p in model.named_parameters())
    keys = {len(state): set(state) for state in optimizer.state.values()}
    assert keys == {1: {"momentum_buffer"}, 3: {"step", "exp_avg", "exp_avg_sq"}}


def test_a_run_goes_on_bit_for_bit(options, tmp_path) -> None:
    whole = {"train__optimizer": "muon", "train__schedule": "constant",
             "train__out_dir": tmp_path / "whole"}  # fmt: skip
    parts = whole | {"train__out_dir": tmp_path / "parts"}
    assert run(options, **whole) == 0
    assert run(options, **parts, train__max_steps=3, train__save_every=3) == 0
    assert run(options, **parts) == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_named_checkpoint_of_another_optimizer(options, tmp_path, capsys) -> None:
    """It is the same model."""
    assert run(options, train__out_dir=tmp_path / "m", train__optimizer="muon") == 0
    named = tmp_path / "m/checkpoints/step_6"
    assert run(options, train__out_dir=tmp_path / "a", train__resume=named) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: {named}/optimizer.safetensors is of another optimizer, ")
    assert "take over train.optimizer of its run's config.yaml, or the weights alone by" in line


def test_the_optimizer_changes_the_run_and_is_part_of_it(options, tmp_path, capsys) -> None:
    assert run(options, train__out_dir=tmp_path / "a") == 0
    assert run(options, train__out_dir=tmp_path / "m", train__optimizer="muon") == 0
    assert losses(tmp_path / "a")[1:] != losses(tmp_path / "m")[1:]
    assert run(options, train__out_dir=tmp_path / "a", train__optimizer="muon") == 2
    assert "train.optimizer (adamw -> muon)" in capsys.readouterr().err
    rest = {"train__optimizer": "muon", "train__adamw_learning_rate": 1e-9}
    assert run(options, train__out_dir=tmp_path / "r", **rest) == 0
    assert losses(tmp_path / "r")[1:] != losses(tmp_path / "m")[1:]
    assert metrics(tmp_path / "m")[0]["optim/lr"] == metrics(tmp_path / "a")[0]["optim/lr"]


@pytest.mark.parametrize(
    ("recipe", "given", "rates"),
    [
        ({}, [], (RATES["adamw"], None)),
        ({"optimizer": "muon"}, [], (0.02, 0.004)),
        ({"optimizer": "muon", "learning_rate": 0.01}, [], (0.01, 0.002)),
        ({"optimizer": "muon", "adamw_learning_rate": 0.003}, [], (0.02, 0.003)),
        ({"optimizer": "muon", "learning_rate": 0.01}, ["optimizer=adamw"], (0.002, None)),
        ({"optimizer": "muon", "adamw_learning_rate": 0.003}, ["optimizer=adamw"], (0.003, None)),
        ({"optimizer": "muon"}, ["optimizer=adamw", "learning_rate=0.1"], (0.1, None)),
        ({"optimizer": "muon"}, ["learning_rate=0.1"], (0.1, 0.02)),
        ({"learning_rate": 1e-3}, ["optimizer=muon"], (0.02, 0.004)),
        ({"learning_rate": 1e-3}, ["optimizer=muon", "learning_rate=0.03"], (0.03, 0.006)),
        ({"learning_rate": 1e-3, "adamw_learning_rate": 5.0}, [], (1e-3, None)),
    ],
)
def test_rates(recipe, given, rates, tmp_path, caplog) -> None:
    file = tmp_path / "recipe.yaml"
    lines = [f"  {key}: {value}" for key, value in recipe.items()]
    file.write_text("\n".join(["train:", *lines]))
    with caplog.at_level("INFO"):
        train = load_config(file, [f"train.{text}" for text in given]).train
    assert train.learning_rate == pytest.approx(rates[0])
    assert train.adamw_learning_rate == (rates[1] and pytest.approx(rates[1]))
    changed = bool(given) and given[0].startswith("optimizer") and len(given) == 1
    assert caplog.text.count("train.learning_rate (") == changed


def test_keys_without_meaning() -> None:
    with pytest.raises(UserError, match=r"adamw_learning_rate .* has no meaning with train.optim"):
        load_config(None, ["train.adamw_learning_rate=1e-3"])
    with pytest.raises(UserError, match=r"decay_fraction \(0.5\) has no meaning with .*=cosine"):
        load_config(None, ["train.decay_fraction=0.5"])


def test_divided_matrices_are_refused(options, whole, capsys, monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert run(options, train__lora_rank=2, model__init_from=whole) == 2
    assert "error: train.lora_rank (2) needs whole matrices" in capsys.readouterr().err
    assert run(options, train__optimizer="muon") == 2
    assert "error: train.optimizer (muon) needs whole matrices" in capsys.readouterr().err


def test_the_trapezoid() -> None:
    spec = TrainSpec(
        learning_rate=1.0, schedule="wsd", warmup_steps=10, max_steps=110, decay_fraction=0.5,
        final_learning_rate=0.1,
    )  # fmt: skip
    rates = [learning_rate(step, spec) for step in range(1, 111)]
    assert rates[4] == 0.5 and set(rates[9:55]) == {1.0} and rates[55] < 1
    assert rates[82] == pytest.approx(0.55, abs=0.01) and rates[-1] == pytest.approx(0.1)
    falling = TrainSpec(learning_rate=1.0, schedule="wsd", warmup_steps=10, max_steps=20,
                        decay_fraction=1.0, final_learning_rate=0.0)  # fmt: skip
    assert learning_rate(10, falling) == 1 and learning_rate(15, falling) == 0.5


@pytest.mark.parametrize("computes", [False, True])
def test_the_type_of_its_products(computes: bool, monkeypatch) -> None:
    monkeypatch.setattr(muon, "computes_in_bfloat16", lambda: computes)
    kinds = {name: muon.products_dtype(torch.device(name)) for name in ("cpu", "cuda")}
    own = torch.bfloat16 if computes else torch.float32
    assert kinds == {"cpu": own, "cuda": torch.bfloat16}
