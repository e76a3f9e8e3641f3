"""What the model promises where several of its features meet."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retnet.model import MIXERS
from retnet.model.loss import causal_lm_loss
from retnet.model.ops.precision import wide_dtype
from tests.model.batches import (
    MODELS,
    TOLERANCE,
    batches,
    cut,
    kept_rows,
    logits,
    modes_of,
)
from tests.model.conftest import EACH, PAD, VOCAB, make_model, random_ids

CHUNK = MODELS["retention"].config.chunk_size
each = pytest.mark.parametrize("mixer", EACH)


def _hand_overs(mixer: str) -> Iterator[Any]:
    """Every pair of modes; by default those in which each is once the first and once the second."""
    modes = modes_of(mixer)
    for first, second in itertools.product(modes, repeat=2):
        quick = (modes.index(first) + 1) % len(modes) == modes.index(second)
        yield pytest.param(mixer, first, second, marks=[] if quick else pytest.mark.slow)


HAND_OVERS = [each for mixer in (*MIXERS, "hybrid-window") for each in _hand_overs(mixer)]


@pytest.mark.parametrize(("mixer", "first", "second"), HAND_OVERS)
def test_hand_over_at_every_split_with_gradients_through_the_state(
    mixer: str, first: str | None, second: str | None
) -> None:
    """One batch with padding and documents; the state's gradient reaches the first part."""
    model = MODELS[mixer]
    ids = random_ids(2, 12)
    batch = {
        "attention_mask": torch.ones(2, 12, dtype=torch.int64),
        "segment_ids": torch.tensor([[0] * 5 + [1] * 7, [0] * 12]),
    }
    batch["attention_mask"][1, :3] = 0
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()

    def gradient(out: Tensor) -> Tensor:
        """Of the last token's logits: from before it only the state can bring one."""
        weights = torch.linspace(-1, 1, VOCAB, dtype=torch.float64)
        return torch.autograd.grad((out[:, -1] * weights).sum(), embedded)[0]

    whole = model(inputs_embeds=embedded, **batch, mode=modes_of(mixer)[-1]).logits
    expected = gradient(whole)
    assert expected[1, 3].abs().max() > 0
    assert expected[0, :5].abs().max() == 0  # another document
    for split in range(1, 12):
        cache = model.new_cache()
        parts = [
            model(
                inputs_embeds=embedded[:, part],
                **cut(batch, part),
                past_key_values=cache,
                mode=mode,
            ).logits
            for part, mode in ((slice(0, split), first), (slice(split, None), second))
        ]
        out = torch.cat(parts, dim=1)
        keep = batch["attention_mask"].bool()
        assert (out - whole)[keep].abs().max() < TOLERANCE
        assert (gradient(out) - expected).abs().max() < TOLERANCE


@each
@pytest.mark.parametrize(
    "lengths",
    [[CHUNK, CHUNK], [CHUNK, 2 * CHUNK, 1], [2 * CHUNK, 3], [1] * 7, [1, CHUNK - 1, 1, CHUNK + 1]],
    ids=str,
)
def test_documents_that_end_at_a_chunks_edge_or_at_once(mixer: str, lengths: list[int]) -> None:
    model = MODELS[mixer]
    ids = random_ids(1, sum(lengths))
    segments = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    alone = torch.cat([logits(model, part) for part in ids.split(lengths, dim=1)], dim=1)
    for mode in modes_of(mixer):
        packed = logits(model, ids, segment_ids=segments, mode=mode)
        assert (packed - alone).abs().max() < TOLERANCE
        by_position = logits(model, ids, position_ids=positions, mode=mode)
        assert (by_position - alone).abs().max() < TOLERANCE


@each
@pytest.mark.parametrize("split", [1, 3, CHUNK, CHUNK + 2])
def test_a_document_goes_on_from_a_cache(mixer: str, split: int) -> None:
    """Its id decides: the same id goes on, another one begins anew, none goes on."""
    model = MODELS[mixer]
    ids = random_ids(2, 16)
    first = torch.full((2, split), 7)
    for mode in modes_of(mixer):
        for then, fresh in ((7, False), (None, False), (8, True), (0, True)):
            cache = model.new_cache()
            logits(model, ids[:, :split], segment_ids=first, past_key_values=cache, mode=mode)
            rest = ids[:, split:]
            segments = {} if then is None else {"segment_ids": torch.full(rest.shape, then)}
            out = logits(model, rest, **segments, past_key_values=cache, mode=mode)
            expected = logits(model, rest) if fresh else logits(model, ids)[:, split:]
            assert (out - expected).abs().max() < TOLERANCE


@each
@settings(max_examples=25, deadline=None)
@given(batch=batches(), data=st.data())
def test_losses_of_a_packed_and_padded_batch(mixer: str, batch: dict, data: st.DataObject) -> None:
    """Labels with -100, documents and padding: the sum over the targets that each text has."""
    model = MODELS[mixer]
    ids, keep = batch["input_ids"], kept_rows(batch)
    labels = ids.clone()
    ignored = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.2
    labels[ignored] = -100
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in range(ids.shape[0]):
        columns = keep[row].nonzero().flatten().tolist()
        segments = batch.get("segment_ids")
        for _, group in itertools.groupby(
            columns, key=lambda c: 0 if segments is None else segments[row, c].item()
        ):
            document = list(group)
            # the definition: the next column must belong to the document
            pairs = [(a, b) for a, b in itertools.pairwise(document) if b == a + 1]
            targets = torch.full((len(document),), -100)
            for a, b in pairs:
                targets[document.index(a)] = labels[row, b]
            out = logits(model, ids[row, document][None])
            total = total + causal_lm_loss(out, targets[None], 1)
            count += int((targets != -100).sum())
    items = data.draw(st.sampled_from([None, 1, 7]))
    with torch.no_grad():
        loss = model(**batch, labels=labels, num_items_in_batch=items).loss
    expected = total / (max(count, 1) if items is None else items)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-9)


@each
def test_position_ids_of_left_padding_say_what_the_mask_says(mixer: str) -> None:
    """transformers' own: cumsum of the mask - 1, and 0 or 1 at the padding."""
    model = MODELS[mixer]
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
    ids = random_ids(2, 7).where(mask == 1, PAD)
    expected = logits(model, ids, attention_mask=mask)[mask.bool()]
    for fill in (0, 1):
        positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, fill)
        for mode in modes_of(mixer):
            out = logits(model, ids, attention_mask=mask, position_ids=positions, mode=mode)
            assert (out[mask.bool()] - expected).abs().max() < TOLERANCE


@each
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32, torch.uint8])
def test_masks_of_any_type(mixer: str, dtype: torch.dtype) -> None:
    model, mask = MODELS[mixer], torch.tensor([[0, 0, 1, 1, 1]])
    ids = random_ids(1, 5)
    out = logits(model, ids, attention_mask=mask.to(dtype))
    assert (out[:, 2:] - logits(model, ids[:, 2:])).abs().max() < TOLERANCE


@each
def test_padding_repeats_the_logits_of_the_token_before(mixer: str) -> None:
    """So the last column is what generation reads on from, on whichever side the padding is."""
    model = MODELS[mixer]
    ids, mask = random_ids(2, 6), torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 1, 0]])
    out = logits(model, ids, attention_mask=mask)
    assert torch.equal(out[0, 3:], out[0, 2].expand(3, -1))
    assert torch.equal(out[1, [2, 3, 5]], out[1, [1, 1, 4]])
    last = logits(model, ids, attention_mask=mask, logits_to_keep=1)
    assert (last[0, 0] - logits(model, ids[:1, :3])[0, -1]).abs().max() < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@each
def test_from_pretrained_in_any_dtype(mixer: str, dtype: torch.dtype, tmp_path) -> None:
    model = make_model(mixer, torch.float32)
    model.save_pretrained(tmp_path)
    kind = type(model)
    loaded = kind.from_pretrained(tmp_path, dtype=dtype).eval()
    wide = loaded.wide_names()
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == (wide_dtype(dtype) if name in wide else dtype)
    ids = random_ids(2, 40)
    exact, out = logits(model.double(), ids), logits(loaded, ids)
    assert out.dtype == dtype
    error = (out.double() - exact).pow(2).mean().sqrt() / exact.std()
    assert error < {torch.bfloat16: 0.04, torch.float16: 0.01}.get(dtype, 1e-5)
    loaded.save_pretrained(tmp_path / "again")
    again = kind.from_pretrained(tmp_path / "again", dtype="auto")
    assert again.dtype == dtype
    assert torch.equal(logits(again.eval(), ids), out)


@each
@pytest.mark.parametrize("kind", ["weights", "autocast"])
def test_bfloat16_with_a_cache_padding_and_documents(mixer: str, kind: str) -> None:
    """The float64 logits within the tolerance of bfloat16, in pieces too."""
    exact = make_model(mixer)
    for parameter in exact.parameters():
        parameter.data = parameter.data.bfloat16().double()
    narrow = make_model(mixer, torch.float32 if kind == "autocast" else torch.bfloat16)
    ids, mask = random_ids(2, 40), torch.ones(2, 40, dtype=torch.int64)
    mask[0, :6] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "segment_ids": (ids > 50).cumsum(1)}
    with torch.no_grad():
        expected = exact(**batch).logits[mask.bool()]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == "autocast"):
            cache = narrow.new_cache()
            parts = [
                narrow(**cut(batch, part), past_key_values=cache).logits
                for part in (slice(0, 17), slice(17, 18), slice(18, 40))
            ]
    error = torch.cat(parts, dim=1)[mask.bool()].double() - expected
    assert error.pow(2).mean().sqrt() / expected.std() <= 0.04


@each
def test_gradients_are_finite_for_rows_of_nothing_but_padding(mixer: str) -> None:
    model = make_model(mixer)
    ids, mask = random_ids(2, 7), torch.tensor([[0] * 7, [1] * 7])
    for mode in modes_of(mixer):
        model.zero_grad()
        model(ids, attention_mask=mask, labels=ids, mode=mode).loss.backward()
        mine = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        model(ids[1:], labels=ids[1:], mode=mode).loss.backward()
        for a, b in zip(mine, (p.grad for p in model.parameters()), strict=True):
            assert torch.allclose(a, b, atol=1e-12)
