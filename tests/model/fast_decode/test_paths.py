"""Which way single tokens take is told, with the reason: by our loop, and by transformers' once."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from torch import nn

from retnet.generation import Step, Usage, generate, prefill
from retnet.model.fast_decode.step import make_decode_step
from tests.generation.builders import tiny_model
from tests.model.fast_decode.cases import GREEDY, random_ids

LOGGER = "retnet.model.hf_generate"


class Quantised(nn.Parameter):
    pass


def other_weight(model: Any) -> None:
    model.lm_head.weight = Quantised(model.lm_head.weight.detach())


def quantised(model: Any) -> None:
    torch_ao = pytest.importorskip("torch.ao.quantization")  # newer torch has it no more
    torch_ao.quantize_dynamic(model.float(), {nn.Linear}, dtype=torch.qint8, inplace=True)


def without_a_step(model: Any) -> None:
    mixer = model.model.layers[1].mixer
    mixer.__class__ = type("Average", (type(mixer),), {"step": None})


def other_forward(model: Any) -> None:
    model.lm_head.forward = model.lm_head.forward


def with_a_bias(model: Any) -> None:
    model.lm_head.bias = nn.Parameter(torch.arange(model.lm_head.out_features).double())


def parametrised(model: Any) -> None:
    nn.utils.parametrize.register_parametrization(model.lm_head, "weight", nn.Identity())


CASES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "plain": (lambda model: None, ""),
    "resized, untied": (lambda model: model.resize_token_embeddings(300, mean_resizing=False), ""),
    "adapter": (
        lambda model: get_peft_model(model, LoraConfig(target_modules=["q_proj"])).eval(),
        "model.layers.0.mixer.q_proj is a peft.tuners.lora.layer.Linear",
    ),
    "hook": (lambda model: model.lm_head.register_forward_hook(nothing), "lm_head has hooks"),
    "pre-hook": (
        lambda model: model.model.register_forward_pre_hook(nothing),
        "model has hooks",
    ),
    "weight class": (other_weight, "lm_head.weight is a Quantised"),
    "quantize_dynamic": (
        quantised,
        "model.layers.0.mixer.q_proj is a torch.ao.nn.quantized.dynamic.modules.linear.Linear",
    ),
    "no step": (without_a_step, "an Average has no step of its own"),
    "bias": (with_a_bias, "lm_head has a bias"),
    "parametrised": (parametrised, "lm_head is a ParametrizedLinear"),
    "other forward": (other_forward, "lm_head has another forward"),
    "accelerate": (
        lambda model: cpu_offload(model, execution_device=torch.device("cpu")),
        "the model has another forward, wrapped by accelerate",
    ),
    "training": (lambda model: model.train(), "the model is in training mode"),
}


def nothing(*_: Any) -> None:
    """A hook that changes nothing."""


def changed(case: str) -> tuple[Any, str]:
    change, reason = CASES[case]
    model: Any = tiny_model("retention")
    change(model)
    return model, reason


@pytest.fixture(autouse=True)
def lines_reach_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that another test ran keeps them to itself."""
    monkeypatch.setattr(logging.getLogger("retnet"), "propagate", True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("case", CASES)
def test_each_kind_of_model(case: str, caplog: pytest.LogCaptureFixture) -> None:
    """And whichever way it takes, the tokens are those of whole passes."""
    model, reason = changed(case)
    path, usage = f"plain step: {reason}" if reason else "fast step", Usage()
    ids = random_ids(1, 5)
    list(generate(model, ids, max_new_tokens=3, usage=usage))
    assert usage.path == path and usage.summary().endswith(f"| {path}")
    with caplog.at_level(logging.INFO, LOGGER):
        made = [model.generate(ids, **GREEDY, pad_token_id=0) for _ in range(2)]
        records = [r for r in caplog.records if r.name == LOGGER]
        assert [r.getMessage() for r in records] == [f"{type(model).__name__}.generate: {path}"]
        assert records[0].levelno == (logging.WARNING if reason else logging.INFO)
        assert made[0].equal(model.generate(ids, **GREEDY, pad_token_id=0, use_cache=False))


def test_a_compiled_model_and_one_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("retention")
    reason = "OptimizedModule is no model of this package"
    assert make_decode_step(torch.compile(model)) == (None, reason)
    reason = "DataParallel is no model of this package"
    assert make_decode_step(nn.DataParallel(model)) == (None, reason)
    monkeypatch.setattr(type(model), "device", torch.device("mps"))
    assert make_decode_step(model) == (None, "the device has no float64")
    monkeypatch.undo()
    model.compile()
    assert make_decode_step(model) == (None, "the model is compiled")


def test_compiled_by_our_loop() -> None:
    model = tiny_model("retention")
    assert Step(model, compile=True).path == "fast step, compiled"
    model.lm_head.register_forward_hook(nothing)
    assert Step(model, compile=True).path == "plain step, compiled: lm_head has hooks"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"attention_mask": torch.tensor([[0, 1, 1, 1, 1]])}, "the call gives attention_mask"),
        (
            {"output_hidden_states": True, "return_dict_in_generate": True},
            "the call gives output_hidden_states",
        ),
        ({"use_cache": False}, "use_cache is False"),
    ],
    ids=["mask", "hidden states", "no cache"],
)
def test_what_a_call_asks_for(options: Any, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    """Each is told once, and no warning: whoever wrote the call knows it."""
    model, ids = tiny_model("retention"), random_ids(1, 5)
    with caplog.at_level(logging.INFO, LOGGER):
        for how in (options, {}, options, {}):
            model.generate(ids, **GREEDY, pad_token_id=0, **how)
    start = f"{type(model).__name__}.generate: "
    assert caplog.messages == [f"{start}plain step: {reason}", f"{start}fast step"]
    assert {record.levelno for record in caplog.records} == {logging.INFO}


def test_each_kind_of_cache() -> None:
    ids = random_ids(1, 5)
    model = tiny_model("aft")  # defined up to 16 tokens
    step, _ = make_decode_step(model)
    assert step is not None
    cache = model.new_cache()
    assert step.obstacle(cache) == "the cache is empty"
    prefill(model, ids, cache)
    assert step.obstacle(cache) == "the cache was made in inference mode"
    with torch.inference_mode():
        assert step.obstacle(cache) == ""
        cache.rows["mask"] = ids
        assert step.obstacle(cache) == "the cache needs a mask"
        del cache.rows["mask"]
        prefill(model, random_ids(1, 11), cache)
        assert step.obstacle(cache) == "positions may go beyond max_position_embeddings (16)"
    cache = model.new_cache()
    with torch.no_grad():
        model(ids, position_ids=torch.arange(5)[None] + 9, past_key_values=cache)
    assert step.obstacle(cache) == "positions may go beyond max_position_embeddings (16)"
