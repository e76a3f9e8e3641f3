"""What each token takes of every token's values: times the values it is what the heads give."""

import torch

from retnet.model.mixers.base import split_heads
from tests.model.conftest import make_model, random_ids

PLAIN = {"retention": {"gate": False, "head_norm": "none"}}
PLAIN |= dict.fromkeys(("gated_retention", "hybrid", "hybrid-window"), PLAIN["retention"])
WITHOUT = {"aft", "rwkv"}  # each channel has weights of its own


@torch.no_grad()
def test_weights_times_values_are_the_heads(mixer: str) -> None:
    """Also with padding and a document boundary; nothing comes from a later token."""
    model = make_model(mixer, **PLAIN.get(mixer, {}))
    ids = random_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    segments = (torch.arange(12) >= 7).long().expand(2, 12)
    seen = []

    def look(part, given) -> None:
        hidden, shared = given[:2]
        seen.append((part, part.token_weights(hidden, shared), hidden))

    def look_at_output(linear, given) -> None:
        seen.append(given[0])

    for layer in model.model.layers:
        layer.mixer.register_forward_pre_hook(look)
        layer.mixer.o_proj.register_forward_pre_hook(look_at_output)
    model(ids, attention_mask=mask, segment_ids=segments, use_cache=False)
    assert len(seen) == 4
    for (part, weights, hidden), out in zip(seen[::2], seen[1::2], strict=True):
        if mixer in WITHOUT:
            assert weights is None
            continue
        heads = part.config.num_heads
        values = split_heads(part.v_proj(hidden), heads)
        valid = mask.bool()[:, :, None]
        expected = torch.where(valid, out, 0)
        found = torch.where(valid, (weights @ values).transpose(1, 2).flatten(2), 0)
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
        weights = torch.where(valid[:, None], weights, 0)  # padding has no meaning
        assert weights.shape == (2, heads, 12, 12) and not weights.triu(1).any()
        assert not weights[:, :, 7:, :7].any(), "of another document"
