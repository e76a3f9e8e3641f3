"""transformers' generate, with our memory: exactly what the uncached model gives."""

import copy
import inspect
import threading

import pytest
import torch
from transformers import GenerationMixin, TextIteratorStreamer, TextStreamer, pipeline
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.model.conftest import PAD, make_model, random_ids

GREEDY = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None}


def left_padded(prompts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    width = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), width), PAD)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


PROMPTS = [random_ids(1, n, seed=n)[0] for n in (3, 8, 1)]


@pytest.mark.parametrize(
    "how",
    [
        GREEDY,
        GREEDY | {"num_beams": 4},
        GREEDY | {"num_beams": 4, "num_return_sequences": 3},
        {"do_sample": True, "max_new_tokens": 12, "top_k": 20},
        {"do_sample": True, "max_new_tokens": 8, "num_return_sequences": 3},
        GREEDY | {"repetition_penalty": 1.5},
    ],
    ids=["greedy", "beams", "beams-3", "sampling", "sampling-3", "penalty"],
)
def test_cached_is_uncached(model, how: dict) -> None:
    batch = left_padded(PROMPTS)
    outs = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        outs.append(model.generate(**batch, **how, use_cache=use_cache))
    assert torch.equal(*outs)


@pytest.mark.parametrize("beams", [1, 4])
def test_left_padded_batches_are_single_prompts(model, beams: int) -> None:
    batch = left_padded(PROMPTS)
    together = model.generate(**batch, **GREEDY, num_beams=beams)[:, batch["input_ids"].shape[1] :]
    for row, prompt in enumerate(PROMPTS):
        alone = model.generate(prompt[None], **GREEDY, num_beams=beams)[0, len(prompt) :]
        assert torch.equal(together[row], alone)


def test_prefill_in_chunks(model) -> None:
    for batch in (left_padded(PROMPTS), {"input_ids": random_ids(2, 9)}):
        whole = model.generate(**batch, **GREEDY)
        assert torch.equal(model.generate(**batch, **GREEDY, prefill_chunk_size=3), whole)
        beams = GREEDY | {"num_beams": 3}
        whole = model.generate(**batch, **beams)
        assert torch.equal(model.generate(**batch, **beams, prefill_chunk_size=3), whole)


def test_a_prefix_is_read_once(model) -> None:
    ids = random_ids(1, 10)
    whole = model.generate(ids, **GREEDY)
    with torch.no_grad():
        prefix = model(ids[:, :6], use_cache=True).past_key_values
    for _ in range(2):
        again = model.generate(ids, **GREEDY, past_key_values=copy.deepcopy(prefix))
        assert torch.equal(again, whole)


def test_going_on_from_a_returned_cache(model) -> None:
    ids = random_ids(1, 5)
    whole = model.generate(ids, **GREEDY)
    first = model.generate(ids, **GREEDY | {"max_new_tokens": 4}, return_dict_in_generate=True)
    rest = model.generate(
        first.sequences, **GREEDY | {"max_new_tokens": 8}, past_key_values=first.past_key_values
    )
    assert torch.equal(rest, whole)


def test_streamer_gets_each_token(model) -> None:
    class Tokenizer:
        def decode(self, ids, **_):
            return "".join(f"<{int(i)}>" for i in ids)

    printed: list[str] = []
    streamer = TextStreamer(Tokenizer(), skip_prompt=True)
    streamer.on_finalized_text = lambda text, stream_end=False: printed.append(text)
    ids = random_ids(1, 4)
    out = model.generate(ids, **GREEDY, streamer=streamer)
    assert "".join(printed) == Tokenizer().decode(out[0, 4:])


def test_pipeline(model) -> None:
    from retnet.data import load_tokenizer

    tokenizer = load_tokenizer("bytes")
    wide = make_model("retention", torch.float32, vocab_size=len(tokenizer))
    text = pipeline("text-generation", model=wide, tokenizer=tokenizer)
    result = text("def ", max_new_tokens=5, do_sample=False)
    assert result[0]["generated_text"].startswith("def ")


def test_other_caches_are_refused(model) -> None:
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(random_ids(1, 3), **GREEDY, cache_implementation="static")


@pytest.mark.parametrize(
    "how",
    [{"assistant_early_exit": 1}, {"prompt_lookup_num_tokens": 2}, {"assistant_model": True}],
    ids=lambda how: next(iter(how)),
)
def test_assisted_decoding_is_refused_before_anything_changes(model, mixer: str, how: dict) -> None:
    """It takes tokens back, which a state can't."""
    if "assistant_model" in how:
        how = {"assistant_model": make_model(mixer)}
    before = model.config.to_dict()
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        model.generate(random_ids(1, 3), **GREEDY, **how)
    assert model.config.to_dict() == before


def test_assisting_another_model_is_refused(model, mixer: str) -> None:
    config = copy.deepcopy(model.generation_config)
    config.is_assistant = True
    with pytest.raises(ValueError, match="can't assist"):
        model.generate(random_ids(1, 3), generation_config=config)


def test_continuous_batching_is_refused_at_once(model) -> None:
    with pytest.raises(NotImplementedError, match="generate_batch"):
        model.generate_batch([[1, 2, 3]])


def test_a_memory_as_long_as_the_prompt_is_refused(model) -> None:
    """A second generate would go on from the end of the first."""
    ids = random_ids(1, 6)
    cache = model.new_cache()
    model(ids[:, :4], past_key_values=cache)  # with gradients on, as one would
    kept = copy.deepcopy(cache)
    whole = model.generate(ids, **GREEDY, past_key_values=cache)
    for chunk in ({}, {"prefill_chunk_size": 2}):
        with pytest.raises(ValueError, match=r"past_key_values holds 17 .* has 6: .*deepcopy"):
            model.generate(ids, **GREEDY, **chunk, past_key_values=cache)
    assert torch.equal(model.generate(ids, **GREEDY, past_key_values=copy.deepcopy(kept)), whole)
    with pytest.raises(ValueError, match=r"past_key_values holds 4 .* has 4: "):
        model.generate(ids[:, :4], **GREEDY, past_key_values=kept)


def test_one_prefix_for_all_beams(model) -> None:
    ids = random_ids(2, 6)
    with torch.no_grad():
        prefix = model(ids[:, :4], use_cache=True).past_key_values
    for how in ({"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}):
        whole = model.generate(ids, **GREEDY, **how)
        assert torch.equal(model.generate(ids, **GREEDY, **how, past_key_values=prefix), whole)
        assert prefix.batch_size == 2 and prefix.length == 4


def test_a_memory_of_other_rows_is_refused(model) -> None:
    ids = random_ids(3, 6)
    with torch.no_grad():
        prefix = model(ids[:1, :4], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values is of 1 rows, and 3 are wanted"):
        model.generate(ids, **GREEDY, past_key_values=prefix)
    with pytest.raises(ValueError, match="past_key_values is of 1 rows and the batch has 3"):
        model(ids[:, 4:], past_key_values=prefix)


def test_libraries_take_it_for_a_causal_language_model(model) -> None:
    class Own(type(model)):
        pass

    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    assert names[model.config.model_type] == type(model).__name__
    assert "Own" in names.values()


def test_the_private_hooks_that_we_override_exist() -> None:
    """transformers may rename them: then this fails, not generation."""
    cache_hook = inspect.signature(GenerationMixin._prepare_cache_for_generation)
    assert list(cache_hook.parameters)[1:3] == ["generation_config", "model_kwargs"]
    assert hasattr(GenerationMixin, "_prepare_position_ids_for_generation")


def right_padded(prompts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=PAD)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


@pytest.mark.parametrize("how", [{}, {"num_beams": 4}, {"use_cache": False}])
def test_right_padded_batches_are_single_prompts(model, how: dict) -> None:
    batch = right_padded(PROMPTS)
    together = model.generate(**batch, **GREEDY, **how)[:, batch["input_ids"].shape[1] :]
    for row, prompt in enumerate(PROMPTS):
        alone = model.generate(prompt[None], **GREEDY, **how)[0, len(prompt) :]
        assert torch.equal(together[row], alone)


def test_beams_return_several_different_texts(model) -> None:
    batch = left_padded(PROMPTS)
    how = GREEDY | {"num_beams": 4, "num_return_sequences": 3}
    together = model.generate(**batch, **how)[:, batch["input_ids"].shape[1] :].unflatten(0, (3, 3))
    for row, prompt in enumerate(PROMPTS):
        alone = model.generate(prompt[None], **how)[:, len(prompt) :]
        assert torch.equal(together[row], alone)
        assert len(alone.unique(dim=0)) == 3


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_goes_on_with_the_last_document(model, use_cache: bool) -> None:
    ids = random_ids(2, 10)
    segments = torch.tensor([[0] * 4 + [1] * 6] * 2)
    out = model.generate(ids, **GREEDY, segment_ids=segments, use_cache=use_cache)
    alone = model.generate(ids[:, 4:], **GREEDY)
    assert torch.equal(out[:, 10:], alone[:, 6:])


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_from_shifted_positions_and_from_embeddings(model, use_cache: bool) -> None:
    ids = random_ids(2, 10)
    whole = model.generate(ids, **GREEDY)
    far = (torch.arange(10) + 10_000_000).expand(2, -1)
    if model.config.longest is None:
        shifted = model.generate(ids, **GREEDY, position_ids=far, use_cache=use_cache)
        assert torch.equal(shifted, whole) or not model.config.mixer_class.relative
    else:
        with pytest.raises(ValueError, match="max_position_embeddings"):
            model.generate(ids, **GREEDY, position_ids=far, use_cache=use_cache)
    embeddings = model.get_input_embeddings()(ids)
    out = model.generate(inputs_embeds=embeddings, **GREEDY, use_cache=use_cache)
    assert torch.equal(out, whole[:, 10:])


def test_text_iterator_streamer(model) -> None:
    from retnet.data import load_tokenizer

    tokenizer = load_tokenizer("bytes")
    wide = make_model("retention", torch.float32, vocab_size=len(tokenizer))
    inputs = tokenizer("def ", return_tensors="pt")
    streamer = TextIteratorStreamer(
        tokenizer, skip_prompt=True, timeout=60, skip_special_tokens=True
    )
    arguments = dict(**inputs, **GREEDY, streamer=streamer)
    thread = threading.Thread(target=wide.generate, kwargs=arguments)
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    out = wide.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
    assert streamed == tokenizer.decode(out, skip_special_tokens=True)


def test_pipeline_with_a_batch_of_prompts(mixer: str) -> None:
    from retnet.data import load_tokenizer

    tokenizer = load_tokenizer("bytes")
    model = make_model(mixer, torch.float64, vocab_size=len(tokenizer))
    text = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompts = ["def a():", "x", "import torch"]
    how = {"max_new_tokens": 8, "do_sample": False}
    together = text(prompts, batch_size=3, **how)
    assert together == [text(prompt, **how) for prompt in prompts]


def test_sampling_in_a_batch_goes_on_from_a_copied_prefix(model) -> None:
    """One prefix, read once, repeated for several prompts that begin with it."""
    ids = random_ids(1, 6).expand(3, -1)
    ids = torch.cat((ids, random_ids(3, 4, seed=9)), dim=1)
    with torch.no_grad():
        prefix = model(ids[:1, :6], use_cache=True).past_key_values
    prefix.batch_repeat_interleave(3)
    outs = []
    for cache in (None, copy.deepcopy(prefix)):
        torch.manual_seed(1)
        outs.append(
            model.generate(ids, do_sample=True, max_new_tokens=9, past_key_values=cache, top_k=9)
        )
    assert torch.equal(*outs)


@pytest.mark.parametrize("chunk", [1, 3, 4])
def test_prefill_in_chunks_of_right_padded_prompts(model, chunk: int) -> None:
    """A row may have nothing but padding in its last chunks."""
    ids = torch.full((2, 9), PAD)
    ids[0], ids[1, :3] = random_ids(1, 9)[0], random_ids(1, 3, seed=1)[0]
    mask = (ids != PAD).long()
    made = model.generate(ids, attention_mask=mask, **GREEDY, prefill_chunk_size=chunk)[:, 9:]
    for row, length in ((0, 9), (1, 3)):
        alone = model.generate(ids[row : row + 1, :length], **GREEDY)[0, length:]
        assert torch.equal(made[row], alone)


def test_prefill_in_chunks_with_documents(model) -> None:
    ids = random_ids(2, 9)
    segments = torch.tensor([[0, 0, 1, 1, 1, 1, 2, 2, 2], [0] * 9])
    whole = model.generate(ids, segment_ids=segments, **GREEDY)
    in_chunks = model.generate(ids, segment_ids=segments, **GREEDY, prefill_chunk_size=4)
    assert torch.equal(in_chunks, whole)
    alone = model.generate(ids[:1, 6:], **GREEDY)[0, 3:]
    assert torch.equal(whole[0, 9:], alone)
    with torch.no_grad():
        prefix = model(ids[:, :5], segment_ids=segments[:, :5], use_cache=True).past_key_values
    again = model.generate(ids, segment_ids=segments, **GREEDY, past_key_values=prefix)
    assert torch.equal(again, whole)
