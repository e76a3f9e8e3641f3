"""The server: four addresses of OpenAI's API, answered by transformers' handlers."""

import asyncio
import uuid
from collections.abc import Coroutine
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.utils import logging as transformers_logging

from retnet.checkpoints import Checkpoint
from retnet.errors import UserError
from retnet.serve.answers import Answers, OneModel, State
from retnet.serve.requests import RequestError, Wanted, check_fields, wanted_of

ASKED_EVERY_S = 0.25  # whether a client is still there
CLIENT_LEFT = 499  # as other servers log it; nobody reads it


class _Asked:
    """What transformers' handlers ask about a request, answered for one ``kind`` of ``FIELDS``."""

    kind: str
    model_manager: Any

    def _validate_request(self, body: dict[str, Any]) -> None:
        check_fields(body, self.kind, str(self.model_manager.force_model))

    def _build_generation_config(self, body: dict[str, Any], *_: Any, **__: Any) -> Wanted:
        return wanted_of(body, self.kind)


class Completions(_Asked, CompletionHandler):  # type: ignore[misc]
    """/v1/completions."""

    kind = "completion"


class ChatCompletions(_Asked, ChatCompletionHandler):  # type: ignore[misc]
    """/v1/chat/completions."""

    kind = "chat"


def build_app(checkpoint: Checkpoint, name: str, answers: Answers) -> FastAPI:
    """The application that serves one checkpoint under a name."""
    transformers_logging.set_verbosity_error()  # its handlers warn of each request
    models: Any = OneModel(checkpoint, name)
    state = State(answers)
    completions, chat = Completions(models, state), ChatCompletions(models, state)
    app = FastAPI(title="RetNet", docs_url=None, redoc_url=None, openapi_url=None)

    @app.post("/v1/completions")
    async def _completions(request: Request, body: dict[str, Any]) -> Any:
        return await _while_there(request, completions.handle_request(body, _new_id("cmpl")))

    @app.post("/v1/chat/completions")
    async def _chat(request: Request, body: dict[str, Any]) -> Any:
        return await _while_there(request, chat.handle_request(body, _new_id("chatcmpl")))

    @app.get("/v1/models")
    async def _models() -> Any:
        return {"object": "list", "data": models.list_models()}

    @app.get("/v1/models/{wanted:path}")
    async def _model(wanted: str) -> Any:
        check_fields({"model": wanted}, "completion", name)
        return models.list_models()[0]

    @app.get("/health")
    async def _health() -> Any:
        return {"status": "ok"}

    _answer_errors(app)
    return app


def _new_id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}"


async def _while_there(request: Request, answer: Coroutine[Any, Any, Any]) -> Any:
    """The answer; when the client leaves before it begins, what is being made for it ends."""
    task = asyncio.ensure_future(answer)
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=ASKED_EVERY_S)
            if not task.done() and await request.is_disconnected():
                return Response(status_code=CLIENT_LEFT)
        return task.result()
    finally:
        task.cancel()


def _answer_errors(app: FastAPI) -> None:
    """Have every error leave in the API's form."""

    @app.exception_handler(UserError)
    async def _user_error(_: Request, error: UserError) -> JSONResponse:
        return _error(error if isinstance(error, RequestError) else RequestError(str(error)))

    @app.exception_handler(RequestValidationError)
    async def _unreadable(_: Request, error: RequestValidationError) -> JSONResponse:
        return _error(RequestError("the request's body must be a JSON object"))

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def _elsewhere(request: Request, error: HTTPException) -> JSONResponse:
        words = f"{request.method} {request.url.path} is not served here: see GET /v1/models, POST "
        words += "/v1/completions and /v1/chat/completions"
        return _error(RequestError(words, status=error.status_code))

    @app.exception_handler(HTTPException)
    async def _refused(_: Request, error: HTTPException) -> JSONResponse:
        return _error(RequestError(str(error.detail), status=error.status_code))

    @app.exception_handler(Exception)
    async def _failed(_: Request, error: Exception) -> JSONResponse:
        words = f"the server failed ({type(error).__name__}): its log says more"
        return _error(RequestError(words, status=500))


def _error(error: RequestError) -> JSONResponse:
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    told = {"message": str(error), "type": kind, "param": error.param, "code": error.code}
    # a name in a request may be no text, half of a surrogate pair
    content = {
        name: value and value.encode(errors="backslashreplace").decode()
        for name, value in told.items()
    }
    return JSONResponse({"error": content}, status_code=error.status)
