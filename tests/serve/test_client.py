"""The server and OpenAI's own client, over the network of this machine."""

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from retnet.checkpoints import Checkpoint
from retnet.generation import Sampling, sample_text
from tests.generation.builders import byte_tokenizer, tiny_model
from tests.serve.test_answers import TEMPLATE

pytestmark = pytest.mark.slow
openai = pytest.importorskip("openai", reason="needs the packages of the extra serve")
httpx = pytest.importorskip("httpx", reason="needs the packages of the extra serve")
uvicorn = pytest.importorskip("uvicorn", reason="needs the packages of the extra serve")
pytest.importorskip("fastapi", reason="needs the packages of the extra serve")

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(
        tmp_path_factory.mktemp("own"), tiny_model("retention"), byte_tokenizer(), None
    )


@pytest.fixture(scope="module")
def address(own: Checkpoint) -> Iterator[str]:
    from retnet.serve.answers import Answers
    from retnet.serve.app import build_app

    answers = Answers(own)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        app = build_app(own, "tiny", answers)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        answers.stop()
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def client(address: str) -> Any:
    return openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=60)


def test_the_one_model_is_listed(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "local"
    with pytest.raises(openai.NotFoundError, match=r"model \('gpt2'\) is not here"):
        client.models.retrieve("gpt2")


def test_a_completion(client: Any, own: Checkpoint) -> None:
    made = client.completions.create(
        model="tiny", prompt="ab", max_tokens=20, seed=3, temperature=0.7
    )
    options = Sampling(seed=3, temperature=0.7, top_p=1.0)
    expected = sample_text(own.model, own.tokenizer, "ab", max_new_tokens=20, sampling=options)
    assert made.choices[0].text == expected and made.choices[0].finish_reason == "length"
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (3, 20)
    assert made.id != client.completions.create(model="tiny", prompt="ab").id


def test_a_stream_is_the_same_text_in_pieces(client: Any) -> None:
    options = {"model": "tiny", "prompt": "ab", "max_tokens": 30, "temperature": 0}
    whole = client.completions.create(**options)
    chunks = [*client.completions.create(**options, stream=True)]
    texts = [chunk.choices[0].text for chunk in chunks]
    assert "".join(texts) == whole.choices[0].text and len(texts) > 10
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(texts) - 1) + ["length"]
    assert chunks[-1].usage == whole.usage
    stop = whole.choices[0].text[5:7]
    for stream in (False, True):
        made = client.completions.create(**options, stop=[stop], stream=stream)
        choices = [c.choices[0] for c in (made if stream else [made])]
        assert "".join(c.text for c in choices) == texts_before(whole, stop)
        assert choices[-1].finish_reason == "stop"


def texts_before(whole: Any, stop: str) -> str:
    return str(whole.choices[0].text.split(stop)[0])


def test_what_is_not_obeyed_is_refused_in_the_apis_form(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="ab", n=2)
    assert caught.value.body == {
        "message": "n (2) is not supported here: leave it out, or give 1",
        "type": "invalid_request_error", "param": "n", "code": "unsupported_parameter",
    }  # fmt: skip
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="org/model", messages=HI)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="POST /v1/embeddings is not served here"):
        client.embeddings.create(model="tiny", input="ab")


def test_addresses_of_transformers_that_load_other_models_are_not_there(client: Any) -> None:
    for path in ("/../load_model", "/../reset", "/responses", "/audio/transcriptions"):
        with pytest.raises(openai.NotFoundError, match="is not served here"):
            client.post(path, body={"model": "org/model"}, cast_to=object)


def test_a_body_that_is_no_object(client: Any) -> None:
    for body in ([1], "a"):
        with pytest.raises(openai.BadRequestError, match="must be a JSON object"):
            client.post("/completions", body=body, cast_to=object)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"prompt": "\xff"}', "There was an error parsing the body"),
        (b"[" * 100_000, "There was an error parsing the body"),
        (rb'{"prompt": "a", "\ud800": 1}', r"\ud800 (1) is not supported here: leave it out"),
        (rb'{"model": "\ud800"}', r"model ('\ud800') is not here: this server has tiny"),
    ],
)
def test_bytes_that_are_no_request(client: Any, address: str, body: bytes, words: str) -> None:
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{address}/completions", content=body, headers=headers)
    assert 400 <= answer.status_code < 500
    assert answer.json()["error"]["message"].startswith(words)


def test_chat_without_and_with_a_template(client: Any, own: Checkpoint, monkeypatch) -> None:
    with pytest.raises(openai.BadRequestError, match="no chat template") as caught:
        client.chat.completions.create(model="tiny", messages=HI)
    assert caught.value.code == "no_chat_template"
    monkeypatch.setattr(own.tokenizer, "chat_template", TEMPLATE)
    options = {"model": "tiny", "messages": HI, "max_completion_tokens": 20, "temperature": 0}
    whole = client.chat.completions.create(**options)
    assert whole.choices[0].message.role == "assistant"
    assert whole.usage.prompt_tokens == len("user: hi\n")
    chunks = [*client.chat.completions.create(**options, stream=True)]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content and chunks[0].choices[0].delta.role
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"


def test_two_at_once_and_one_that_leaves(client: Any) -> None:
    """A million tokens would take minutes: who comes after them waits for no more than one."""
    long = {"model": "tiny", "prompt": "ab", "max_tokens": 10**6, "temperature": 0}
    stream = client.completions.create(**long, stream=True)
    next(iter(stream))
    found: list[Any] = []
    ask = {"model": "tiny", "prompt": "cd", "max_tokens": 5, "temperature": 0}
    threads = [
        threading.Thread(target=lambda: found.append(client.completions.create(**ask)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    assert not found  # one text after the other
    stream.close()
    with pytest.raises(openai.APITimeoutError):  # not streamed, and its client leaves too
        client.with_options(timeout=0.5).completions.create(**long)
    for thread in threads:
        thread.join(timeout=60)
    assert len({made.choices[0].text for made in found}) == 1 and len(found) == 2
    assert client.completions.create(**ask).choices[0].text == found[0].choices[0].text


def test_a_long_prompt(client: Any) -> None:
    made = client.completions.create(model="tiny", prompt="long " * 5000, max_tokens=3)
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (25_001, 3)


def test_a_failure_on_the_way_reaches_a_stream(client: Any, monkeypatch) -> None:
    from retnet.serve import answers

    def full(*_: Any, **__: Any) -> Any:
        raise MemoryError('no "memory"')
        yield

    monkeypatch.setattr(answers, "generate", full)
    with pytest.raises(openai.InternalServerError, match="out of memory"):
        client.completions.create(model="tiny", prompt="ab")
    with pytest.raises(openai.APIError):
        [*client.completions.create(model="tiny", prompt="ab", stream=True)]


def test_what_nobody_thought_of_is_the_servers_error(client: Any, monkeypatch) -> None:
    from retnet.serve import answers

    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("by a tokenizer")
        yield

    monkeypatch.setattr(answers, "generate", broken)
    with pytest.raises(openai.InternalServerError, match="its log says more") as caught:
        client.completions.create(model="tiny", prompt="ab")
    assert (caught.value.status_code, caught.value.type) == (500, "server_error")
