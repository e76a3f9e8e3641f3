"""Asking the Hub so that a network that is not there costs seconds.

One request with a short timeout asks for the revision; only then is anything loaded, and while that
takes time the Hub is asked again now and then. The client alone would try again for minutes.
"""

import difflib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Literal, TypeVar

from retnet.data.spec import BPE, BYTES, PYTHON_STDLIB
from retnet.errors import UserError

T = TypeVar("T")
Kind = Literal["dataset", "model"]
# Values that are no names on the Hub, which a misspelt one may mean.
WORDS = {"dataset": [PYTHON_STDLIB], "model": [BYTES, BPE]}
# A host name that never resolves, or eight addresses that never answer, outlast the client's own
# timeout, so the whole request has one too. A data set and a tokenizer may each wait for it:
# together they stay below 30 s. So does a load whose Hub is gone: the Hub is asked every PATIENCE_S
# and has TIMEOUT_S for each answer. In hours a few of these fail; FAILURES in a row end the load.
TIMEOUT_S = 5.0
DEADLINE_S = 10.0
PATIENCE_S = 7.5
FAILURES = 3
# Packages whose exceptions mean that the network failed.
TRANSPORTS = ("httpx", "httpcore", "requests", "urllib3", "aiohttp")


class HubUnreachableError(UserError):
    """The Hub does not answer."""


def hub_revision(name: str, kind: Kind, what: str) -> str:
    """The commit of a Hub repository's main branch; ``what`` is the key and value for messages.

    Raises:
        UserError: The Hub does not know the name or refuses access.
        HubUnreachableError: The Hub cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    api = huggingface_hub.HfApi()
    ask = api.dataset_info if kind == "dataset" else api.model_info
    near = difflib.get_close_matches(name.lower(), WORDS[kind], n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    try:
        revision = answered(lambda: ask(name, timeout=TIMEOUT_S).sha)
    except Exception as error:  # every transport has its own; all mean the same here
        if isinstance(error, HfHubHTTPError) and not is_network_failure(error):
            raise UserError(
                f"{what} is no local path, and the Hub refuses it ({str(error).splitlines()[0]}): "
                f"{hint}correct the name, or log in if it is private"
            ) from error
        raise HubUnreachableError(
            f"{what} is no local path, and the Hub cannot be reached ({reason_of(error)}): "
            f"{hint}correct the path, or connect to the network"
        ) from error
    if revision is None:
        raise UserError(f"{what} has no commit on the Hub: name another one")
    return revision


def while_reachable(call: Callable[[], T], name: str, kind: Kind, what: str) -> T:
    """The result of a call to the Hub's client, which may take any time while the Hub answers.

    Raises ``HubUnreachableError`` when it stops answering, or refuses now what it gave before; the
    client alone would try for minutes. The other arguments are those of ``hub_revision``.
    """
    result = _in_thread(call)
    asked, failures = time.monotonic(), 0
    while not wait([result], timeout=max(0.0, asked + PATIENCE_S - time.monotonic())).done:
        asked = time.monotonic()
        try:
            _in_thread(lambda: hub_revision(name, kind, what)).result(TIMEOUT_S)
            failures = 0
        except (UserError, TimeoutError) as error:
            failures += 1
            if failures == FAILURES:
                raise HubUnreachableError(
                    f"{what}: the Hub stopped answering during a load, {FAILURES} times in a row "
                    f"({reason_of(error.__cause__ or error)}): start again when it answers, or log "
                    "in again if it refuses"
                ) from error
    return result.result()


def answered(call: Callable[[], T]) -> T:
    """The result of one request to the Hub; a ``TimeoutError`` where it takes too long."""
    return _in_thread(call).result(DEADLINE_S)


def _in_thread(call: Callable[[], T]) -> Future[T]:
    """The call's result, some time; a thread left behind does not keep the process alive."""
    result: Future[T] = Future()

    def work() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return result


@contextmanager
def offline() -> Iterator[None]:
    """Keep the clients to their local caches: what they would ask does not answer."""
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def is_network_failure(error: BaseException) -> bool:
    """Whether the network or the server failed, rather than what was asked for."""
    for link in _chain(error):
        status = _status(link)
        if status is not None:
            return status >= 500 or status == 429
        known = isinstance(link, ConnectionError | TimeoutError)
        if known or type(link).__module__.startswith(TRANSPORTS):
            return True
    return False


def is_refusal(error: BaseException) -> bool:
    """Whether the server wants a login: of one that gave before, a token that expired."""
    return next(filter(None, map(_status, _chain(error))), None) in (401, 403)


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, what it comes from, and so on."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def reason_of(error: BaseException) -> str:
    """The error in one line."""
    return ": ".join(filter(None, (type(error).__name__, " ".join(str(error).split()))))
