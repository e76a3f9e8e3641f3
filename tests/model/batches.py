"""Batches with padding and documents for every mixer, and what a model makes of them."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.model.conftest import (
    CONTENDERS,
    PAD,
    QUICK,
    make_model,
    random_ids,
)

TOLERANCE = 1e-10
MODELS = {mixer: make_model(mixer) for mixer in CONTENDERS}
WITH_FORMS = [name for name in QUICK if CONTENDERS[name].modes]


def modes_of(mixer: str) -> tuple[str | None, ...]:
    return CONTENDERS[mixer].modes or (None,)


def logits(model, ids: Tensor, **arguments) -> Tensor:
    with torch.no_grad():
        return model(ids, **arguments).logits


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Tensor]:
    """Ids, perhaps with padding on either side and several documents in a row."""
    rows, length = draw(st.integers(1, 3)), draw(st.integers(2, 17))
    batch = {"input_ids": random_ids(rows, length, seed=draw(st.integers(0, 1000)))}
    padding = draw(st.sampled_from(["none", "left", "right"]))
    if padding != "none":
        column = torch.arange(length)
        mask = torch.ones(rows, length, dtype=torch.int64)
        for row in range(rows):
            kept = draw(st.integers(0, length))
            mask[row] = column >= length - kept if padding == "left" else column < kept
        batch["attention_mask"] = mask
        batch["input_ids"] = torch.where(mask == 1, batch["input_ids"], PAD)
    if draw(st.booleans()):
        changes = torch.tensor(
            [[draw(st.integers(0, 4)) == 0 for _ in range(length)] for _ in range(rows)]
        )
        batch["segment_ids"] = changes.cumsum(1)
    return batch


def cut(batch: dict[str, Tensor], part: slice) -> dict[str, Tensor]:
    return {name: values[:, part] for name, values in batch.items()}


def kept_rows(batch: dict[str, Tensor]) -> Tensor:
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"]).bool() if mask is None else mask.bool()
