"""The pieces add up to the text, hold whole characters, and end before a stop string."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from retnet.errors import UserError
from retnet.generation import Sampling, Usage, encode_prompt, generate, sample_text, stream_text
from retnet.generation.decode import NotFiniteError
from retnet.generation.stream import TextStream
from tests.generation.builders import BOS, EOS, MIXERS, PAD, byte_tokenizer, tiny_model

TOKENIZER = byte_tokenizer()


def stream(ids, stop=(), before=(), tokenizer=TOKENIZER) -> list[str]:
    made = TextStream(tokenizer, before, stop)
    return [*(made.push(token) for token in ids), made.finish()]


random_ids = st.lists(st.one_of(st.integers(0, PAD), st.integers(128, 255)), max_size=30)


@given(random_ids, st.text(max_size=12))
def test_pieces_add_up_to_the_decoded_text(ids: list[int], before: str) -> None:
    expected = TOKENIZER.decode(ids, skip_special_tokens=True)
    assert "".join(stream(ids, before=[BOS, *before.encode()])) == expected


broken_bytes = st.lists(
    st.one_of(
        st.sampled_from([0x80, 0xBF, 0xC3, 0xE2, 0x82, 0xAC, 0xED, 0xF0, 0x9F, 0x98, 0xF5, 0xFF]),
        st.integers(0, PAD),
    ),
    min_size=30,
    max_size=200,
)
MERGED = byte_tokenizer(tuple(
    (left, right)
    for left in bytes_to_unicode().values()
    for right in (bytes_to_unicode()[0x82], bytes_to_unicode()[0x9F])
))  # fmt: skip


@settings(deadline=None)
@given(broken_bytes)
def test_a_long_run_of_broken_bytes_adds_up_too(ids: list[int]) -> None:
    expected = TOKENIZER.decode(ids, skip_special_tokens=True)
    assert "".join(stream(ids)) == expected
    assert "".join(stream(ids, before=[BOS, 0xE2, 0x82])) == expected


@settings(deadline=None)
@given(st.lists(st.integers(0x80, len(MERGED) - 1), min_size=30, max_size=120))
def test_tokens_of_several_bytes_add_up_too(ids: list[int]) -> None:
    expected = MERGED.decode(ids, skip_special_tokens=True)
    assert "".join(stream(ids, tokenizer=MERGED)) == expected


@pytest.mark.parametrize(
    "endless", [[97], [0xFF], [0x80], [PAD], [9999], [0xE2, 0x82], [0xC3, EOS]]
)
def test_only_the_last_tokens_are_kept(endless: list[int]) -> None:
    """However long the text becomes, also where all of it waits for a character's rest."""
    made = TextStream(TOKENIZER, [BOS], ["never\0there"])
    pieces = []
    for _ in range(300):
        pieces += [made.push(token) for token in endless]
        assert len(made._ids) < 40
    text = "".join([*pieces, made.finish()])
    assert text == TOKENIZER.decode(endless * 300, skip_special_tokens=True)


@given(st.text(), st.text(min_size=1, max_size=3), st.text(max_size=5))
def test_nothing_from_the_stop_string_on(head: str, stop: str, tail: str) -> None:
    text = head + stop + tail
    pieces = stream(text.encode(), [stop, "never\0there"])
    assert "".join(pieces) == text[: text.index(stop)]


@given(st.text(alphabet="ab", max_size=20), st.text(alphabet="ab", min_size=1, max_size=4))
def test_text_that_only_begins_like_a_stop_string_comes_out(text: str, stop: str) -> None:
    assert "".join(stream(text.encode(), [stop])) == text.split(stop)[0]


def test_a_character_comes_whole_and_a_cut_one_at_the_end() -> None:
    assert stream([*"aé".encode(), 0xE2, 0x82]) == [
        "a",
        "",
        "é",
        "",
        "",
        "\N{REPLACEMENT CHARACTER}",
    ]


def test_special_tokens_are_no_text() -> None:
    assert "".join(stream([BOS, 65, PAD, 66, EOS])) == "AB"


def test_text_waits_only_while_it_may_be_a_stop_string() -> None:
    assert stream(b"xENxEND", ["END"]) == ["x", "", "", "ENx", "", "", "", ""]


def test_the_earliest_of_several_stop_strings_counts() -> None:
    tokenizer = byte_tokenizer((("a", "b"), ("ab", "c")))
    assert tokenizer.encode("abc", add_special_tokens=False) == [257]
    assert "".join(stream([256, 257], ["c", "b"], tokenizer=tokenizer)) == "a"


def test_a_first_token_is_decoded_in_its_context() -> None:
    """Metaspace decoders drop the space of a text's first token."""
    backend = Tokenizer(models.BPE(vocab={"▁Hello": 0, "▁world": 1}, merges=[]))
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert "".join(stream([1, 1], before=[0], tokenizer=tokenizer)) == " world world"


def joined(pieces) -> list[str]:
    return ["".join(own) for own in zip(*pieces, strict=True)]


@pytest.mark.parametrize("mixer", MIXERS)
def test_streamed_text_is_the_sampled_text(mixer: str) -> None:
    model = tiny_model(mixer)
    sampling = Sampling(temperature=0.7, top_p=0.9, seed=2)
    pieces = list(stream_text(model, TOKENIZER, "ab", max_new_tokens=30, sampling=sampling))
    sampled = sample_text(model, TOKENIZER, "ab", max_new_tokens=30, sampling=sampling)
    assert len(pieces) > 5
    assert joined(pieces) == [sampled]
    assert sampled != sample_text(model, TOKENIZER, "ab", max_new_tokens=30)


@pytest.mark.parametrize("training", [True, False])
def test_sample_text_restores_the_mode_and_the_global_randomness(training: bool) -> None:
    model = tiny_model("retention").train(training)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = sample_text(model, TOKENIZER, "", max_new_tokens=8)
    assert model.training is training
    assert torch.rand(3).equal(expected)
    assert first == sample_text(model.eval(), TOKENIZER, "", max_new_tokens=8)


def test_each_sample_stops_at_its_own_stop_string_and_generation_ends() -> None:
    model = tiny_model("retention")
    greedy = Sampling(greedy=True)
    (text,) = joined(stream_text(model, TOKENIZER, "x", max_new_tokens=40, sampling=greedy))
    stop, usage = text[4], Usage()
    (cut,) = joined(
        stream_text(
            model, TOKENIZER, "x", max_new_tokens=40, sampling=greedy, stop=[stop], usage=usage
        )
    )
    assert cut == text[: text.index(stop)]
    assert usage.new_tokens < 40


def test_the_prompt_is_not_searched_for_stop_strings() -> None:
    model = tiny_model("retention")
    greedy = Sampling(greedy=True)
    (text,) = joined(stream_text(model, TOKENIZER, "x", max_new_tokens=9, sampling=greedy))
    across = "x" + text[0]
    assert across not in text
    pieces = stream_text(model, TOKENIZER, "x", max_new_tokens=9, sampling=greedy, stop=[across])
    assert joined(pieces) == [text]


def test_a_sample_ends_with_the_end_token() -> None:
    model, tokenizer, usage = tiny_model("retention"), byte_tokenizer(), Usage()
    greedy = Sampling(greedy=True)
    first = next(generate(model, encode_prompt(tokenizer, "x"), max_new_tokens=1, sampling=greedy))
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(first[0])
    pieces = stream_text(model, tokenizer, "x", max_new_tokens=9, sampling=greedy, usage=usage)
    assert len(list(pieces)) == 2  # of the token, and what is left at the end
    assert usage.new_tokens == 1


@pytest.mark.parametrize("part", [slice(None), slice(1, 3)])
def test_a_stop_string_may_name_a_special_token(part: slice) -> None:
    """Which is no text, so the stream of text would not find it."""
    model, tokenizer, usage = tiny_model("retention"), byte_tokenizer(), Usage()
    options = {"max_new_tokens": 200, "sampling": Sampling(seed=2)}
    made = [row[0] for row in generate(model, encode_prompt(tokenizer, "x"), **options)]
    end = made.index(PAD)
    assert EOS not in made[:end]
    options |= {"stop": [tokenizer.pad_token[part]], "usage": usage}
    assert joined(stream_text(model, tokenizer, "x", **options)) == [tokenizer.decode(made[:end])]
    assert usage.new_tokens == end + 1


def test_a_stop_string_needs_a_token() -> None:
    """Half a surrogate pair, which a command line may hold, has none in any vocabulary."""
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<bos>": 1, "a": 2}, unk_token="<unk>"))
    words = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", unk_token="<unk>")
    model = tiny_model("retention", vocab_size=3)
    for tokenizer, stop in ((words, "z"), (words, "\udcff"), (TOKENIZER, "END\udcff")):
        with pytest.raises(UserError, match=r"--stop \('.*'\) has no token in the model's voc"):
            stream_text(model, tokenizer, "", max_new_tokens=1, stop=[stop])
    stream_text(model, words, "", max_new_tokens=1, stop=["a", "z"])
    stream_text(model, TOKENIZER, "", max_new_tokens=1, stop=["é"])


def words_of(vocabulary: list[str], **options) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, **options))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", **options)


@pytest.mark.parametrize("options", [{"unk_token": "<unk>"}, {}])
def test_a_stop_string_may_be_part_of_tokens_only(options: dict[str, str]) -> None:
    """No token is "。" alone, and text that ends with one is made all the same."""
    tokenizer = words_of(["<bos>", "<unk>", "好。", "你"], **options)
    model = tiny_model("retention", vocab_size=4)
    made = "".join(stream([3, 2, 3], ["。"], tokenizer=tokenizer))
    assert made.rstrip() == "你 好"
    stream_text(model, tokenizer, "", max_new_tokens=1, stop=["。"])
    stream_text(model, tokenizer, "", max_new_tokens=1, stop=["好。 你"])
    with pytest.raises(UserError, match=r"--stop \('END'\) has no token in the model's voc"):
        stream_text(model, tokenizer, "", max_new_tokens=1, stop=["END"])


def test_an_empty_stop_string_is_an_error() -> None:
    with pytest.raises(UserError, match=r"--stop \(''\) is empty"):
        list(stream_text(tiny_model("retention"), TOKENIZER, "", max_new_tokens=1, stop=[""]))


def test_what_waits_comes_out_before_logits_that_are_no_numbers(monkeypatch) -> None:
    def broken(*args, **kwargs):
        yield [97]
        yield [98]
        raise NotFiniteError(2)

    monkeypatch.setattr("retnet.generation.stream.generate", broken)
    model, made = tiny_model("retention"), []
    with pytest.raises(NotFiniteError, match="after 2 new tokens"):
        made += stream_text(model, TOKENIZER, "", max_new_tokens=9, stop=["bc"])
    assert made == [["a"], [""], ["b"]]
    text = sample_text(model, TOKENIZER, "", max_new_tokens=9)  # training goes on
    assert text == f"ab [{NotFiniteError(2)}]"
