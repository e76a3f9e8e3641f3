"""RWKV's first values are those of its authors' code."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from retnet.model.ops import rwkv_init

REFERENCE = Path(__file__).parent / "reference" / "wkv" / "init_l3_d48.safetensors"


def test_first_values_are_those_of_rwkv_lm() -> None:
    expected = load_file(REFERENCE)
    for layer in range(3):
        mine = {"att.time_decay": rwkv_init.time_decay(layer, 3, 48)}
        mine["att.time_first"] = rwkv_init.time_first(48)
        for part, mix in (("att", rwkv_init.time_mix), ("ffn", rwkv_init.channel_mix)):
            mine |= {f"{part}.time_mix_{n}": x for n, x in mix(layer, 3, 48).items()}
        assert {f"{layer}.{n}" for n in mine} == {n for n in expected if n[0] == str(layer)}
        for name, x in mine.items():
            assert x.dtype == torch.float64
            torch.testing.assert_close(x, expected[f"{layer}.{name}"], rtol=0, atol=1e-14)


def test_first_values_of_one_layer() -> None:
    """Those of the first of several; it divides by the number of layers less one."""
    assert torch.equal(rwkv_init.time_decay(0, 1, 8), rwkv_init.time_decay(0, 3, 8))
    for mix in (rwkv_init.time_mix, rwkv_init.channel_mix):
        for name, x in mix(0, 1, 8).items():
            assert torch.equal(x, mix(0, 3, 8)[name])
    assert rwkv_init.time_decay(0, 1, 1).tolist() == [-5.0]
