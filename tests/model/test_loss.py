"""Which targets count, and what the sum is divided by."""

import math

import torch
import torch.nn.functional as F

from retnet.model.loss import causal_lm_loss, shift_targets
from tests.model.conftest import random_ids


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
