"""The Transformer is a Llama: the same logits from the same weights."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from retnet.model.cache import DecoderCache
from tests.model.conftest import ROW_BYTES, VOCAB, make_model, random_ids

NAMES = {
    "mixer_norm": "input_layernorm",
    "mixer.": "self_attn.",
    "ffn_norm": "post_attention_layernorm",
    "ffn.": "mlp.",
}


def llama_of(model) -> LlamaForCausalLM:
    config = model.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_heads,
            rms_norm_eps=config.norm_eps,
        )
    )
    weights = {}
    for name, weight in model.state_dict().items():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        weights[name] = weight
    llama.load_state_dict(weights)
    return llama.to(model.dtype).eval()


@pytest.fixture(scope="module")
def pair():
    model = make_model("attention", torch.float32, norm="rmsnorm", ffn="swiglu")
    return model, llama_of(model)


def test_logits_of_llama(pair) -> None:
    model, llama = pair
    ids = random_ids(3, 70)
    with torch.no_grad():
        assert (model(ids).logits - llama(ids).logits).abs().max() < 2e-5


def test_logits_of_llama_with_left_padding(pair) -> None:
    model, llama = pair
    ids, mask = random_ids(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        ours = model(ids, attention_mask=mask).logits
        theirs = llama(ids, attention_mask=mask, position_ids=positions).logits
    assert (ours - theirs)[mask.bool()].abs().max() < 2e-5


def test_generate_of_llama(pair) -> None:
    model, llama = pair
    ids = random_ids(2, 5)
    arguments = {"max_new_tokens": 15, "do_sample": False, "eos_token_id": None, "pad_token_id": 60}
    assert torch.equal(model.generate(ids, **arguments), llama.generate(ids, **arguments))


def test_cached_decode_is_the_full_forward_and_copies_the_past_rarely() -> None:
    model = make_model("attention")
    ids = random_ids(2, 40)
    cache = model.new_cache()
    parts, buffers = [], set()
    with torch.no_grad():
        whole = model(ids).logits
        parts.append(model(ids[:, :7], past_key_values=cache).logits)
        for t in range(7, 40):
            parts.append(model(ids[:, t : t + 1], past_key_values=cache).logits)
            buffers.add(cache.layers[0].mixer["keys"].data_ptr())
    assert (torch.cat(parts, dim=1) - whole).abs().max() < 1e-10
    assert len(buffers) <= 4  # 7 -> 14 -> 28 -> 56 columns
    assert cache.num_bytes() == 2 * (2 * (2 * 40 * 32) * 8 + ROW_BYTES)


def test_reserved_columns_are_never_copied() -> None:
    model = make_model("attention")
    cache = model.new_cache(max_length=30)
    with torch.no_grad():
        model(random_ids(1, 4), past_key_values=cache)
        first = cache.layers[0].mixer["keys"].data_ptr()
        for t in range(26):
            model(random_ids(1, 1, seed=t), past_key_values=cache)
    assert cache.layers[0].mixer["keys"].data_ptr() == first
    assert cache.layers[0].mixer["keys"].shape[2] == 30
    assert isinstance(cache, DecoderCache) and cache.get_seq_length() == 30


def test_gradients_flow_through_the_cache() -> None:
    model = make_model("attention")
    ids = random_ids(1, 10)

    def gradients(logits: torch.Tensor) -> list[torch.Tensor]:
        weights = torch.linspace(-1, 1, VOCAB, dtype=torch.float64)
        return list(torch.autograd.grad((logits * weights).sum(), list(model.parameters())))

    cache = model.new_cache()
    parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 4), (4, 5), (5, 10))]
    for a, b in zip(gradients(torch.cat(parts, 1)), gradients(model(ids).logits), strict=True):
        assert torch.allclose(a, b, atol=1e-10)
