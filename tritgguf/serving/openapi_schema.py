"""The OpenAPI schema: FastAPI's, with the errors that the endpoints really answer."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

_ERRORS = {
    "401": "No API key, or a wrong one",
    "403": "A name of the server that is not allowed",
    "503": "The queue is full, or the server is shutting down; Retry-After says when to come back",
}
_ERRORS_OF_BODIES = {
    "400": "An impossible value, which the message names, or a prompt beyond the context",
    "408": "The body has not come in time",
    "413": "The body is too large",
    "504": "The answer has taken too long",
}
_TEXT, _OPTIONAL_TEXT = {"type": "string"}, {"type": ["string", "null"]}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {"message": _TEXT, "type": _TEXT, "param": _OPTIONAL_TEXT, "code": _OPTIONAL_TEXT},
        }
    },
}


def describe_errors(app: FastAPI) -> None:
    """Let an app's OpenAPI schema have its errors, in place of the 422 that FastAPI would answer."""
    without_errors = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _add_errors(without_errors())
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _add_errors(schema: dict[str, Any]) -> None:
    schemas = schema.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas["Error"] = _ERROR
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            errors = _ERRORS | (_ERRORS_OF_BODIES if "requestBody" in operation else {})
            if "{" in path:
                errors = errors | {"404": "There is no such thing"}
            responses = operation["responses"]
            responses.pop("422", None)
            responses |= {status: {"description": text, "content": content} for status, text in errors.items()}
