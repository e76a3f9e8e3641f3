"""The Performer's random features: whose function they are, and when they change."""

from pathlib import Path
from typing import Any

import pytest
import torch

from retnet import PerformerConfig, PerformerForCausalLM, cli
from retnet.checkpoints import load_checkpoint
from retnet.commands import train
from retnet.model.ops.random_features import favor_projection
from retnet.training.optimizer import build_optimizer
from retnet.training.spec import TrainSpec
from tests.model.conftest import make_model, random_ids
from tests.training.conftest import corpus, options  # noqa: F401


def projections(model: Any) -> list[torch.Tensor]:
    return [layer.mixer.projection for layer in model.model.layers]


@pytest.mark.parametrize(("width", "features"), [(64, 266), (16, 44), (2, 1)])
def test_the_default_number_of_features(width: int, features: int) -> None:
    assert PerformerConfig(hidden_size=4 * width, num_heads=4).num_features == features


def test_they_are_a_function_of_seed_layer_and_redraws() -> None:
    model = make_model("performer", torch.float32, seed=3)
    size = model.config.num_features, model.config.head_dim
    for layer, found in enumerate(projections(model)):
        assert found.equal(favor_projection(*size, seed=3, layer=layer))
    assert not projections(model)[0].equal(projections(model)[1])


def test_a_redraw_every_few_steps_of_training_only() -> None:
    model = make_model("performer", torch.float32, feature_redraw_interval=5)
    size = model.config.num_features, model.config.head_dim
    first = [x.clone() for x in projections(model)]
    model.eval().after_step(5, seed=7)
    model.train().after_step(4, seed=7)
    for found, expected in zip(projections(model), first, strict=True):
        assert found.equal(expected)
    model.after_step(10, seed=7)
    for layer, found in enumerate(projections(model)):
        assert found.equal(favor_projection(*size, seed=7, layer=layer, redraws=2))
    fixed = make_model("performer", torch.float32).train()
    fixed.after_step(5, seed=7)
    assert projections(fixed)[0].equal(first[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_they_stay_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    model = make_model("performer", torch.float32)
    exact = [x.clone() for x in projections(model)]
    model.to(dtype).save_pretrained(tmp_path)
    loaded = [PerformerForCausalLM.from_pretrained(tmp_path, dtype=kind) for kind in (dtype, None)]
    cast_twice = make_model("performer", torch.float64).to(dtype)
    for other in (model, *loaded, cast_twice):
        for found, expected in zip(projections(other), exact, strict=True):
            assert found.dtype == torch.float32 and found.equal(expected)
    assert model.dtype == dtype
    assert model(random_ids(1, 5)).logits.dtype == dtype


def test_no_optimizer_sees_them() -> None:
    model = make_model("performer")
    groups = build_optimizer(model, TrainSpec()).param_groups
    trained = {id(p) for group in groups for p in group["params"]}
    assert not trained & {id(x) for x in projections(model)}
    assert all(name in model.state_dict() for name in model.wide_names())


def test_a_run_that_goes_on_draws_what_the_whole_run_drew(
    options: list[str],  # noqa: F811
    tmp_path: Path,
) -> None:
    def run(folder: str, steps: int) -> Any:
        keys = [f"train.out_dir={tmp_path / folder}", f"train.max_steps={steps}"]
        keys += ["model.mixer=performer", "model.feature_redraw_interval=2"]
        keys += ["train.schedule=constant", "train.seed=5"]
        assert cli.run(train.main, ["configs/tiny.yaml", *options, *keys]) == 0
        return load_checkpoint(tmp_path / folder, dtype=torch.bfloat16).model

    whole = run("whole", 5)
    run("parts", 3)
    parts = run("parts", 5)
    for name, x in whole.state_dict().items():
        assert x.equal(parts.state_dict()[name]), name
    config, found = whole.config, projections(whole)[0]
    expected = favor_projection(config.num_features, config.head_dim, seed=5, redraws=2)
    assert found.dtype == torch.float32 and found.equal(expected)
