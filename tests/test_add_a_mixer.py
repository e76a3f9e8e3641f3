"""What docs/architecture.md promises: a mixer is one file and one line.

The toy is an exponential moving average. All that the project does with a mixer works with it,
although nothing outside of this file knows of it.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from retnet import cli
from retnet.checkpoints import load_checkpoint
from retnet.commands import compare, generate, train
from retnet.generation import decode_one, make_step, prefill
from retnet.model.configuration import DecoderConfig, option
from retnet.model.mixers import MIXERS
from retnet.model.mixers.attention import CausalAttention
from retnet.model.mixers.base import Mixer, State
from retnet.model.models import RetNetConfig, RetNetForCausalLM, configuration, model_class
from retnet.model.ops.precision import wide_dtype
from retnet.training.spec import describe_keys
from tests.model.conftest import ROW_BYTES, random_ids
from tests.training.conftest import as_options, corpus  # noqa: F401


class AverageOptions(DecoderConfig):
    forget: float = option(0.25, "share of the average that each token replaces", meaning=True)

    def problems(self) -> list[str]:
        return super().problems() + self.check_number("forget", 0, 1)


class ExponentialAverage(Mixer):
    """y_t = W_o m_t with m_t = (1 - f) m_{t-1} + f W_v x_t; its state is m, at first 1."""

    name = "average"
    options = AverageOptions
    no_matrices = ("scale",)

    def __init__(self, config: Any, layer_idx: int = 0) -> None:
        super().__init__(config, layer_idx)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.scale = nn.Parameter(torch.ones(1, config.hidden_size))

    @classmethod
    def matrix_parameters(cls, config: Any) -> int:
        return 2 * config.hidden_size**2

    @classmethod
    def describe(cls, config: Any) -> list[str]:
        return [f"average     forgets {config.forget}"]

    @classmethod
    def initialize(cls, module: nn.Module, role: str, config: Any) -> None:
        if isinstance(module, cls):
            nn.init.ones_(module.scale)
        super().initialize(module, role, config)

    def init_state(
        self, rows: int, device: torch.device, dtype: torch.dtype, capacity: int | None = None
    ) -> State:
        return {
            "mean": torch.ones(
                rows, self.config.hidden_size, dtype=wide_dtype(dtype), device=device
            )
        }

    def forward(
        self, hidden: Tensor, shared: Any, state: State | None = None, mode: str | None = None
    ) -> tuple[Tensor, State]:
        first = self.init_state(hidden.shape[0], hidden.device, hidden.dtype)["mean"]
        mean = first if state is None else state["mean"]
        out = []
        for t, new in enumerate(self.v_proj(hidden).unbind(1)):
            if shared.resets is not None:
                mean = torch.where(shared.resets[:, t, None], first, mean)
            moved = (1 - self.config.forget) * mean + self.config.forget * new
            mean = moved if shared.valid is None else moved.where(shared.valid[:, t, None], mean)
            out.append(mean * self.scale)
        return self.o_proj(torch.stack(out, dim=1)), {"mean": mean}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    MIXERS[ExponentialAverage.name] = ExponentialAverage
    yield
    del MIXERS[ExponentialAverage.name]


def toy_model() -> Any:
    model = model_class("average")
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 2}
    return model(configuration(model)(**sizes, pad_token_id=60)).double().eval()


def test_padding_packing_splits_and_beams() -> None:
    model, ids = toy_model(), random_ids(1, 12)
    alone = model(ids).logits
    for side in ("left", "right"):
        pad = torch.full((1, 3), 60)
        padded = torch.cat((pad, ids) if side == "left" else (ids, pad), dim=1)
        mask = (padded != 60).long()
        torch.testing.assert_close(model(padded, attention_mask=mask).logits[mask.bool()], alone[0])
    other = random_ids(1, 5, seed=1)
    packed = model(
        torch.cat((other, ids), dim=1), segment_ids=torch.tensor([[3] * 5 + [4] * 12])
    ).logits
    torch.testing.assert_close(packed[:, 5:], alone)
    cache = model.new_cache()
    parts = [model(ids[:, cut], past_key_values=cache).logits for cut in (slice(7), slice(7, 12))]
    torch.testing.assert_close(torch.cat(parts, dim=1), alone)
    assert not model.grows and cache.num_bytes() == 2 * 16 * 8 + ROW_BYTES
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    made = model.generate(ids, **options)
    assert made.equal(model.generate(ids, **options, use_cache=False))


def test_without_a_step_it_takes_the_plain_way_and_says_so() -> None:
    model, ids = toy_model(), random_ids(2, 6)
    cache, step = model.new_cache(), make_step(model)
    prefill(model, ids[:, :5], cache)
    expected = decode_one(model, ids[:, 5], copy.deepcopy(cache))
    assert step(ids[:, 5], cache).equal(expected)
    assert step.path == "plain step: an ExponentialAverage has no step of its own"


def test_its_keys_reach_help_and_configuration() -> None:
    text = "\n".join(describe_keys())
    assert f"model.mixer: {' | '.join(MIXERS)} = retention\n" in text and "average" in MIXERS
    assert "average: share of the average" in text
    with pytest.raises(ValueError, match=r"forget \(2\) must be between 0 and 1"):
        configuration(model_class("average"))(forget=2)


def test_it_trains_resumes_generates_and_is_compared(
    corpus: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    keys = {
        "model.mixer": "average", "model.forget": 0.5, "model.hidden_size": 16,
        "model.num_hidden_layers": 1, "model.num_heads": 2, "data.source": corpus,
        "data.tokenizer": "bytes", "data.seq_len": 24, "data.cache_dir": tmp_path / "cache",
        "train.batch_size": 4, "train.warmup_steps": 2, "train.save_every": 2,
        "train.carry_state": "true", "train.sample_tokens": 4, "train.max_steps": 4,
    }  # fmt: skip

    def run(folder: str, **changes: Any) -> None:
        values = keys | {"train.out_dir": tmp_path / folder, **changes}
        if values["model.mixer"] != "average":
            del values["model.forget"]
        assert cli.run(train.main, ["configs/tiny.yaml", *as_options(values)]) == 0

    run("whole")
    assert "average     forgets 0.5" in capsys.readouterr().err
    run("parts", **{"train.max_steps": 2, "train.schedule": "constant"})
    run("same", **{"train.max_steps": 4, "train.schedule": "constant"})
    run("parts", **{"train.max_steps": 4, "train.schedule": "constant"})
    one, other = (load_checkpoint(tmp_path / name).model for name in ("same", "parts"))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert configuration(type(one)).mixer_class is ExponentialAverage

    run("attention", **{"model.mixer": "attention", "train.carry_state": "false"})
    capsys.readouterr()
    argv = [str(tmp_path / "whole"), "--prompt", "the ", "--max-new-tokens", "5", "--greedy"]
    assert cli.run(generate.main, argv) == 0
    assert "plain step: an ExponentialAverage has no step" in capsys.readouterr().err
    both = [str(tmp_path / "whole"), str(tmp_path / "attention")]
    assert cli.run(compare.main, [*both, "--contexts", "8"]) == 0
    assert " average " in capsys.readouterr().out


def test_its_own_parameters_are_initialised_and_decayed_as_it_says() -> None:
    from retnet.training.optimizer import build_optimizer
    from retnet.training.spec import TrainSpec

    model = toy_model()
    decayed, others = (
        group["params"] for group in build_optimizer(model, TrainSpec()).param_groups
    )
    scales = {id(layer.mixer.scale) for layer in model.model.layers}
    assert scales <= {id(p) for p in others} and not scales & {id(p) for p in decayed}


class HybridConfig(RetNetConfig):
    """Retention, but for the last layer."""

    model_type = "hybrid_test"

    def mixer_of(self, layer_idx: int) -> Any:
        last = layer_idx == self.num_hidden_layers - 1
        return CausalAttention if last else super().mixer_of(layer_idx)


def test_layers_of_two_mixers_in_one_model() -> None:
    """Each kind has its states, its memory by row and what it shares; modes go to who has them."""

    class Hybrid(RetNetForCausalLM):
        config_class = HybridConfig

    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 3, "num_heads": 2}
    model = Hybrid(HybridConfig(**sizes, pad_token_id=60)).double().eval()
    ids = random_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    alone = model(ids[:1, 4:]).logits
    padded = model(ids, attention_mask=mask).logits[:1, 4:]
    torch.testing.assert_close(padded, alone)
    cache = model.new_cache(max_length=20)
    parts = [
        model(ids[:, cut], past_key_values=cache, mode=mode).logits
        for cut, mode in (
            (slice(7), "parallel"),
            (slice(7, 11), "chunkwise"),
            (slice(11, 12), None),
        )
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids).logits)
    states = [set(layer.mixer) for layer in cache.layers]
    assert states == [{"state"}, {"state"}, {"keys", "values"}] and model.grows
    states = 2 * 2 * 2 * 8 * 16 * 8 + 2 * 2 * (12 * 16) * 8
    assert cache.num_bytes() == states + 2 * ROW_BYTES
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert model.generate(ids, **options).equal(model.generate(ids, **options, use_cache=False))
