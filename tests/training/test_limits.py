"""What a run takes at least is known before anything is built."""

from dataclasses import replace

import pytest

from retnet.errors import UserError
from retnet.training import limits
from retnet.training.config import load_config

KEYS = ["model.hidden_size=64", "model.num_hidden_layers=2", "data.seq_len=128"]
PARAMETERS = 2 * 12 * 64**2


@pytest.mark.parametrize(("rank", "bytes_of_each"), [(0, 16), (2, 4)])
def test_the_weights_and_what_training_keeps_of_each(
    rank: int, bytes_of_each: int, monkeypatch
) -> None:
    """Of low-rank factors alone there are gradients and moments."""
    config = load_config(None, [*KEYS, "train.device=cpu", "train.batch_size=1"])
    config = replace(config, train=replace(config.train, lora_rank=rank))
    least = bytes_of_each * PARAMETERS
    monkeypatch.setattr(limits, "memory_of", lambda device: least)
    limits.check_run_fits(config)
    monkeypatch.setattr(limits, "memory_of", lambda device: least - 1)
    with pytest.raises(UserError, match=f"need at least {least:,} bytes for the parameters"):
        limits.check_run_fits(config)


def test_the_inputs_of_all_blocks(monkeypatch) -> None:
    config = load_config(None, [*KEYS, "train.device=cpu", "train.batch_size=100"])
    least = 2 * 100 * 128 * 64 * 2
    monkeypatch.setattr(limits, "memory_of", lambda device: least)
    limits.check_run_fits(config)
    monkeypatch.setattr(limits, "memory_of", lambda device: least - 1)
    with pytest.raises(UserError, match=rf"\(128\) tokens need at least {least:,} bytes, and"):
        limits.check_run_fits(config)
