"""Operations on the memory that generation uses."""

import copy

import pytest
import torch

from tests.model.conftest import ROW_BYTES, make_model, random_ids


def continued(model, cache, ids):
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


@pytest.fixture
def prefilled(model):
    ids = random_ids(3, 6)
    mask = torch.ones(3, 6, dtype=torch.int64)
    mask[0, :2] = 0
    cache = model.new_cache()
    with torch.no_grad():
        model(ids, attention_mask=mask, segment_ids=(ids > 30).cumsum(1), past_key_values=cache)
    return cache


def test_rows_are_reordered_repeated_and_selected(model, prefilled) -> None:
    new = random_ids(3, 2, seed=5)
    plain = continued(model, copy.deepcopy(prefilled), new)
    for change, rows in (
        (lambda c: c.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ):
        cache = copy.deepcopy(prefilled)
        change(cache)
        assert cache.batch_size == len(rows)
        assert (continued(model, cache, new[rows]) - plain[rows]).abs().max() < 1e-12


def test_all_of_it_can_be_named_taken_out_and_put_back(model, prefilled) -> None:
    """That is how a state is saved."""
    new, empty = random_ids(3, 2, seed=5), model.new_cache()
    kept = prefilled.tensors()
    given = 1, model.device, model.dtype
    layers = {
        f"layers.{i}.{part}.{name}"
        for i, layer in enumerate(model.model.layers)
        for part in ("mixer", "ffn")
        for name in getattr(layer, part).init_state(*given)
    }
    rows = {"valid", "document_start"} if model.grows else set()
    assert kept.keys() == layers | rows | {"record", "last_hidden"}
    for name, x in kept.items():
        empty.put(name, x.clone())
    empty.length = prefilled.length
    assert empty.num_bytes() == prefilled.num_bytes()
    assert continued(model, empty, new).equal(continued(model, prefilled, new))


def test_reset_forgets_everything(model, prefilled) -> None:
    prefilled.reset()
    assert prefilled.get_seq_length() == 0
    new = random_ids(3, 4, seed=7)
    assert (continued(model, prefilled, new) - model(new).logits).abs().max() < 1e-12


def test_detach_cuts_the_graph() -> None:
    model = make_model("retention")
    cache = model.new_cache()
    model(random_ids(1, 4), past_key_values=cache)
    assert cache.layers[0].mixer["state"].requires_grad
    cache.detach()
    assert not cache.layers[0].mixer["state"].requires_grad


def test_a_copy_of_a_memory_in_a_graph(model) -> None:
    """It is on its own, and in the same graph."""
    ids, new = random_ids(2, 4), random_ids(2, 3, seed=5)
    cache = model.new_cache(max_length=9)
    embeds = model.model.embed_tokens(ids).detach().requires_grad_()
    model(inputs_embeds=embeds, past_key_values=cache)
    copied = copy.deepcopy(cache)
    found = model(new, past_key_values=copied).logits
    assert (copied.length, cache.length, copied.capacity) == (7, 4, 9)
    assert torch.equal(model(new, past_key_values=copy.deepcopy(cache)).logits, found)
    found.sum().backward()
    assert embeds.grad is not None and embeds.grad.abs().max() > 0


def test_a_copy_of_what_inference_mode_made_can_be_written(model) -> None:
    ids = random_ids(1, 4)
    with torch.inference_mode():
        cache = model(ids, use_cache=True).past_key_values
    copied = copy.deepcopy(cache)
    with torch.no_grad():
        assert torch.equal(
            model(ids, past_key_values=copied).logits, model(ids, past_key_values=cache).logits
        )


def test_what_transformers_asks_a_cache(model, prefilled) -> None:
    assert model.new_cache().get_seq_length() == 0
    assert model.new_cache().batch_size == -1
    assert prefilled.get_seq_length() == 6
    assert prefilled.get_mask_sizes(2, 0) == (8, 0)
    assert prefilled.get_max_length() == -1
    assert not prefilled.is_compileable
    assert not prefilled.is_croppable
    with pytest.raises(NotImplementedError, match="deepcopy"):
        prefilled.crop(1)


def test_the_state_is_float32_whatever_the_weights() -> None:
    model = make_model("retention", torch.bfloat16)
    cache = model(random_ids(1, 4), use_cache=True).past_key_values
    assert cache.layers[0].mixer["state"].dtype == torch.float32
    wide = make_model("retention", torch.float64)
    assert wide(random_ids(1, 4)).past_key_values.layers[0].mixer["state"].dtype == torch.float64


def test_a_cache_made_in_inference_mode_can_be_used_outside_it(mixer: str) -> None:
    model, ids = make_model(mixer), random_ids(1, 8)
    cache = model.new_cache(max_length=8)
    with torch.inference_mode():
        model(ids[:, :6], past_key_values=cache)
    with torch.no_grad():
        parts = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in (6, 7)]
        assert torch.allclose(torch.cat(parts, 1), model(ids).logits[:, 6:])


def test_bytes_of_everything_that_is_kept(model, prefilled) -> None:
    """Of columns that are reserved those that are used, and the integers that all layers share."""
    reserved = model.new_cache(max_length=64)
    with torch.no_grad():
        model(random_ids(3, 9), past_key_values=reserved)
    growing = {f"layers.{i}.mixer.{name}" for i, layer in enumerate(reserved.layers)
               for name in layer.growing}  # fmt: skip
    used = {name: x.narrow(-2, 0, 9) if name in growing else x
            for name, x in reserved.tensors().items()}  # fmt: skip
    assert "record" in used and used["record"].nbytes == 3 * ROW_BYTES
    assert reserved.num_bytes() == sum(x.numel() * x.element_size() for x in used.values())
    assert prefilled.num_bytes() >= sum(x.nbytes for x in prefilled.rows.values()) > 3 * ROW_BYTES
