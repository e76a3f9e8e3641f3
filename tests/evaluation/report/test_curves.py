"""Axes of the pictures."""

import pytest

from retnet.evaluation.report.canvas import own_settings, side_by_side
from retnet.evaluation.report.curves import doubling


@pytest.mark.parametrize(
    ("lengths", "shown"),
    [
        ([128, 512, 2048], ["128", "512", "2,048"]),
        ([2048, 4096, 6000], ["2,048", "6,000"]),
        ([2**i for i in range(12)], ["2", "8", "32", "128", "512", "2,048"]),
        ([], []),
        ([7], ["7"]),
    ],
)
def test_lengths_on_an_axis_have_room(lengths: list[int], shown: list[str]) -> None:
    with own_settings():
        _, (axis,) = side_by_side(1)
        axis.plot(lengths, lengths)
        doubling(axis)
    found = [label.get_text() for label in axis.get_xticklabels()]
    assert found[::-1] == shown, "from the longest on"
