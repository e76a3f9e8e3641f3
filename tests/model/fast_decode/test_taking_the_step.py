"""Which models, caches and calls take the lean step, and which the plain way."""

from typing import Any

import pytest
import torch

from retnet.generation import Usage, decode_one, generate, make_step, prefill
from retnet.model.fast_decode.step import make_decode_step
from tests.generation.builders import tiny_model
from tests.model.fast_decode.cases import GREEDY, both_mixers, random_ids


@both_mixers
def test_an_empty_cache_takes_the_plain_way(mixer: str) -> None:
    model, ids = tiny_model(mixer), random_ids(2, 2)
    cache = model.new_cache()
    step = make_step(model)
    parts, paths = [], []
    for t in (0, 1):
        parts.append(step(ids[:, t], cache))
        paths.append(step.path)
    assert paths == ["plain step: the cache is empty", "fast step"]
    torch.testing.assert_close(torch.stack(parts, 1), model(ids, use_cache=False).logits)


@both_mixers
def test_what_is_not_plain_takes_the_plain_way(mixer: str) -> None:
    """Hooks are called, adapters and training's dropout have their effect."""

    class Adapted(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    ids = random_ids(1, 9)
    hooked, adapted, training = (tiny_model(mixer) for _ in range(3))
    seen: list[int] = []
    hooked.lm_head.register_forward_hook(lambda *_: seen.append(1))
    adapted.model.layers[0].mixer.o_proj.__class__ = Adapted
    training.train()
    reasons = {
        hooked: "lm_head has hooks",
        adapted: "model.layers.0.mixer.o_proj is an Adapted",
        training: "the model is in training mode",
    }
    for model, reason in reasons.items():
        assert make_decode_step(model) == (None, reason)
        cache, plain = model.new_cache(), model.new_cache()
        prefill(model, ids[:, :8], cache)
        prefill(model, ids[:, :8], plain)
        step = make_step(model)
        torch.testing.assert_close(step(ids[:, 8], cache), decode_one(model, ids[:, 8], plain))
        assert step.path == f"plain step: {reason}"
    assert len(seen) == 4


@both_mixers
def test_generate_decodes_by_the_step(mixer: str) -> None:
    usage = Usage()
    tokens = generate(tiny_model(mixer), random_ids(2, 5), max_new_tokens=6, usage=usage)
    assert len(list(tokens)) == 6
    assert usage.path == "fast step"


def counted(model: Any) -> Any:
    """The model, counting in ``steps`` and ``passes`` how generate feeds it."""

    class Counted(type(model)):  # type: ignore[misc]
        steps = passes = 0

        def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            inputs = super().prepare_inputs_for_generation(*args, **kwargs)
            by_the_step = inputs.get("decode_step") is not None
            self.steps += by_the_step
            self.passes += not by_the_step
            return inputs

    model.__class__ = Counted
    return model


@both_mixers
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"return_dict_in_generate": True}])
def test_transformers_generate_takes_the_step(mixer: str, options: dict) -> None:
    model, ids = counted(tiny_model(mixer)), random_ids(2, 5)
    options = GREEDY | {"pad_token_id": 0} | options
    expected = model.generate(ids, **options, use_cache=False)
    model.steps = model.passes = 0
    made = model.generate(ids, **options)
    if "return_dict_in_generate" in options:
        expected, made = expected.sequences, made.sequences
    assert made.equal(expected)
    assert (model.steps, model.passes) == (7, 1)


@both_mixers
def test_transformers_generate_without_the_step(mixer: str) -> None:
    """Padding needs a mask, hidden states the whole pass, hooks their calls."""
    model, ids = counted(tiny_model(mixer)), random_ids(2, 5)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    for options in (
        {"attention_mask": mask},
        {"output_hidden_states": True, "return_dict_in_generate": True},
        {"use_cache": False},
    ):
        model.generate(ids, **GREEDY, pad_token_id=0, **options)
    model.lm_head.register_forward_hook(lambda *_: None)
    model.generate(ids, **GREEDY, pad_token_id=0)
    assert (model.steps, model.passes) == (0, 32)


@both_mixers
def test_a_cache_of_our_prefill_is_gone_on_with_by_generate(mixer: str) -> None:
    """It was made in inference mode, where generate is not."""
    model, ids = tiny_model(mixer), random_ids(1, 8)
    cache = model.new_cache()
    prefill(model, ids[:, :-1], cache)
    made = model.generate(ids, past_key_values=cache, **GREEDY, pad_token_id=0)
    assert made.equal(model.generate(ids, **GREEDY, pad_token_id=0))


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ({}, True),
        ({"return_dict": True, "use_cache": True}, True),
        ({"return_dict": False}, False),
        ({"use_cache": False}, False),
        ({"output_hidden_states": True}, False),
        ({"segment_ids": torch.zeros(1, 5, dtype=torch.int64)}, False),
    ],
    ids=str,
)
def test_what_asks_for_something_else_gets_it(asked: dict[str, Any], given: bool) -> None:
    """False is an answer too: the step gives none but the default output."""
    model, ids = tiny_model("retention"), random_ids(1, 5)
    cache = model.new_cache()
    with torch.no_grad():
        model(input_ids=ids[:, :4], past_key_values=cache)
    step, _ = make_decode_step(model)
    inputs = model.prepare_inputs_for_generation(
        ids, past_key_values=cache, next_sequence_length=1, decode_step=step, **asked
    )
    assert (inputs.get("decode_step") is step) == given
    with torch.no_grad():
        output = model(**inputs)
    assert isinstance(output, tuple) == (asked.get("return_dict") is False)


@both_mixers
def test_compiled_and_subclassed_parts_are_not_plain(mixer: str) -> None:
    class Quantised(torch.nn.Parameter):
        pass

    compiled, quantised = tiny_model(mixer), tiny_model(mixer)
    compiled.compile()
    weight = quantised.lm_head.weight
    quantised.lm_head.weight = Quantised(weight.detach())
    assert make_decode_step(compiled) == (None, "the model is compiled")
    assert make_decode_step(quantised) == (None, "lm_head.weight is a Quantised")
    assert make_decode_step(torch.nn.Linear(1, 1)) == (None, "Linear is no model of this package")


@both_mixers
def test_a_mixer_with_another_forward_brings_its_own_step_or_has_none(mixer: str) -> None:
    model = tiny_model(mixer)
    kind = type(model.model.layers[0].mixer)

    class Renamed(kind):
        pass

    class Changed(kind):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    class Without(kind):
        step = None

    class Whole(Changed):
        step = kind.step

    reasons = {
        Renamed: "",
        Whole: "",
        Changed: "model.layers.0.mixer is a Changed",
        Without: "a Without has no step of its own",
    }
    for changed, reason in reasons.items():
        model.model.layers[0].mixer.__class__ = changed
        step, found = make_decode_step(model)
        assert (step is None, found) == (bool(reason), reason)
