"""Which targets count, and what the sum is divided by."""

import math

import pytest
import torch
import torch.nn.functional as F

from retnet.model import loss as loss_module
from retnet.model.loss import causal_lm_loss, linear_cross_entropy, shift_targets
from tests.model.conftest import make_model, random_ids
from tests.model.recorders import Operators


def test_labels_are_shifted_and_ignored(model) -> None:
    ids = random_ids(2, 7)
    labels = ids.clone()
    labels[0, 3] = -100
    out = model(ids, labels=labels)
    targets = labels[:, 1:].flatten()
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), targets, ignore_index=-100)
    assert torch.allclose(out.loss, expected, atol=1e-12)
    assert out.loss.dtype == torch.float64
    counted = model(ids, labels=labels, num_items_in_batch=torch.tensor(4)).loss
    assert torch.allclose(counted, expected * 11 / 4)
    assert torch.allclose(model(ids, labels=labels, num_items_in_batch=4).loss, counted)
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    assert torch.equal(model(ids, shift_labels=shifted).loss, out.loss)


def test_targets_across_documents_and_padding_do_not_count() -> None:
    labels = torch.arange(8)[None] + 10
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 0, 1, 1]])
    targets = shift_targets(labels, mask, segments, None)
    assert targets.tolist() == [[-100, 12, -100, 14, -100, -100, 17, -100]]
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    targets = shift_targets(labels, None, None, positions)
    assert targets.tolist() == [[11, 12, -100, 14, 15, 16, 17, -100]]


def test_no_target_at_all_is_zero_not_nan(model) -> None:
    ids = random_ids(1, 1)
    assert model(ids, labels=ids).loss.item() == 0


def test_the_loss_is_in_nats_and_float32() -> None:
    logits = torch.zeros(1, 3, 5, dtype=torch.bfloat16)
    loss = causal_lm_loss(logits, torch.tensor([[1, 2, -100]]))
    assert loss.dtype == torch.float32
    assert abs(loss.item() - math.log(5)) < 1e-6


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "MIN_TOKENS_PER_CHUNK", 5)
    monkeypatch.setattr(loss_module, "LOGITS_PER_CHUNK", 1)


def case(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(9, 4, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, 9, (2, 6), generator=generator)
    targets[0, 2] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets


@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(3)])
def test_the_chunked_loss_is_the_plain_one(small_chunks, num_items) -> None:
    hidden, weight, targets = case()
    plain = causal_lm_loss(hidden @ weight.T, targets, num_items)
    chunked = linear_cross_entropy(hidden, weight, targets, num_items)
    assert torch.allclose(plain, chunked, rtol=1e-12)
    for a, b in zip(
        *(torch.autograd.grad(x * 3, (hidden, weight)) for x in (plain, chunked)), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-13)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_none_are_made(small_chunks, mode) -> None:
    """Twelve tokens are three chunks, of one product each instead of three."""
    hidden, weight, targets = case(torch.float32)
    with Operators() as with_gradients:
        expected = linear_cross_entropy(hidden, weight, targets)
    with mode(), Operators() as without:
        assert linear_cross_entropy(hidden, weight, targets).equal(expected.detach())
    assert with_gradients.count("mm", "addmm_") == 9
    assert without.count("mm", "addmm_", "linear") == 3


@pytest.mark.parametrize("scale", [1e-3, 1, 20, 1000])
def test_chances_of_every_size(small_chunks, scale: float) -> None:
    """Float32 holds no chance below 1e-38, which is a loss of 87; larger losses are as right."""
    hidden, weight, targets = case(torch.float32)
    exact = causal_lm_loss((scale * hidden).double() @ weight.double().T, targets)
    chunked = linear_cross_entropy(scale * hidden, weight, targets)
    assert abs(chunked - exact) < 1e-6 * (1 + exact)
    assert scale < 1000 or exact > 87


def test_gradcheck_of_the_chunked_loss(small_chunks) -> None:
    hidden, weight, targets = case()
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, targets), (hidden, weight)
    )


def test_the_chunked_loss_in_bfloat16_and_autocast(small_chunks) -> None:
    hidden, weight, targets = case(torch.float32)
    plain = causal_lm_loss(hidden @ weight.T, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = linear_cross_entropy(hidden, weight, targets)
    assert mixed.dtype == torch.float32
    assert 0 < abs(mixed.item() - plain.item()) < 0.02
    for a, b in zip(
        *(torch.autograd.grad(x, (hidden, weight)) for x in (plain, mixed)), strict=True
    ):
        assert a.dtype == b.dtype == torch.float32
        assert (a - b).abs().max() < 0.02
    with torch.no_grad():
        narrow = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets)
    assert narrow.item() == pytest.approx(mixed.item(), abs=1e-3)


def test_the_loss_alone(model, small_chunks) -> None:
    ids = random_ids(2, 9)
    whole, alone = model(ids, labels=ids), model(ids, labels=ids, return_logits=False)
    assert alone.logits is None
    assert torch.allclose(whole.loss, alone.loss, rtol=1e-12)
    for a, b in zip(
        *(torch.autograd.grad(x.loss, list(model.parameters())) for x in (whole, alone)),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-12)
    with pytest.raises(ValueError, match="return_logits"):
        model(ids, return_logits=False)


def test_the_chunked_loss_keeps_no_logits() -> None:
    """What the backward pass keeps: nothing of size tokens x vocabulary."""
    model = make_model("retention", torch.float32, vocab_size=3000)
    ids = random_ids(2, 200)
    sizes = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(ids, labels=ids, return_logits=False)
    assert max(sizes) < 400 * 3000 / 4


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_one_side_alone_gets_its_gradient(trained: str) -> None:
    """A frozen body under a head in training, and the other way round."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 300, 8, generator=generator)
    weight = torch.randn(20, 8, generator=generator)
    targets = torch.randint(20, (2, 300), generator=generator)
    leaf = {"hidden": hidden, "weight": weight}[trained].requires_grad_()
    grads = [
        torch.autograd.grad(loss, leaf)[0]
        for loss in (
            linear_cross_entropy(hidden, weight, targets),
            causal_lm_loss(F.linear(hidden, weight), targets),
        )
    ]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
