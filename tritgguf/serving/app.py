"""The application: endpoints, what guards them, and how errors are told."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from tritgguf.errors import TritGgufError
from tritgguf.generation.loaded_model import LoadedModel
from tritgguf.serving import chat_completions, completions, embeddings, information, reference_page, tokens
from tritgguf.serving.errors import ApiError, bad_request
from tritgguf.serving.limits import BodyLimits
from tritgguf.serving.openapi_schema import describe_errors
from tritgguf.serving.page import files
from tritgguf.serving.responses import error_response
from tritgguf.serving.security import Gate
from tritgguf.serving.service import Service
from tritgguf.serving.settings import ServerSettings
from tritgguf.version import __version__

_LOGGER = logging.getLogger(__name__)
_STOP_SECONDS = 5.0  # for the forward pass that runs
_MOST_MESSAGE = 500


def create_app(model: LoadedModel, settings: ServerSettings) -> FastAPI:
    """Return the application that serves a model; its state has the `service`."""
    service = Service(model, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.engine_thread.start()
        yield
        await service.engine_thread.stop(_STOP_SECONDS)

    page_files = files.load() if settings.page else {}
    app = FastAPI(
        title="tritgguf",
        version=__version__,
        description="OpenAI's API on a balanced-ternary model.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        middleware=_middleware(settings, [*page_files, "/docs", "/openapi.json"]),
        exception_handlers={
            ApiError: _api_error,
            TritGgufError: _library_error,
            RequestValidationError: _validation_error,
            HTTPException: _http_error,
        },
    )
    app.state.service = service
    for part in (chat_completions, completions, embeddings, tokens, information, reference_page):
        app.include_router(part.router)
    files.add_routes(app, page_files)
    describe_errors(app)
    return app


def _middleware(settings: ServerSettings, public_paths: Sequence[str]) -> list[Middleware]:
    cors = Middleware(
        CORSMiddleware,
        allow_origins=list(settings.cors_origins),
        allow_methods=["GET", "POST"],
        allow_headers=["*"],  # clients add their own, such as openai-node's X-Stainless-Lang
        expose_headers=["Retry-After"],
    )
    gate = Middleware(Gate, settings=settings, public_paths=public_paths)
    limits = Middleware(BodyLimits, settings=settings)
    return [*([cors] if settings.cors_origins else []), gate, limits]


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _library_error(request: Request, error: Exception) -> Response:
    public = request.app.state.service.public_error(error)
    if public.status == 500:
        _LOGGER.error("%s", error)
    return error_response(public)


async def _http_error(request: Request, error: Exception) -> Response:
    """Answer what the framework refuses: a path or a method that does not exist, a body that is no JSON."""
    assert isinstance(error, HTTPException)
    message = {
        404: f"there is no {request.url.path[:200]}; /docs lists what there is",
        405: f"{request.method[:20]} is not what {request.url.path[:200]} takes",
    }.get(error.status_code, "the body is not valid JSON")
    return error_response(ApiError(error.status_code, message, headers=error.headers))


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = _most_telling(error.errors())
    if found["type"] == "json_invalid":
        return error_response(bad_request("the body is not valid JSON"))
    if found["type"] in ("model_attributes_type", "missing") and len(found["loc"]) == 1:
        return error_response(bad_request("the body must be a JSON object, sent as Content-Type: application/json"))
    place = [str(part)[:80] for part in found["loc"][1:] if not _names_a_type(part)]
    param = place[0] if place else None
    message = f"{'.'.join(place)[:200]}: {found['msg']}"[:_MOST_MESSAGE]
    return error_response(bad_request(message, param))


def _most_telling(errors: Sequence[Any]) -> dict[str, Any]:
    """Return the error to tell a client: the first, or one of the same parameter that is about more than the type.

    Of a value that may have several types, there is an error for each: a list that is too long is no text either.
    """
    first: dict[str, Any] = dict(errors[0])
    same = (dict(error) for error in errors if error["loc"][:2] == first["loc"][:2])
    return next((error for error in same if not error["type"].endswith("_type")), first)


def _names_a_type(part: Any) -> bool:
    """Tell whether a part of an error's place is the name of a type that was tried, such as list[int]."""
    return isinstance(part, str) and (part in ("str", "constrained-str") or "[" in part)
