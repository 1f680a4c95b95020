"""Errors in the shape of OpenAI's API: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tritgguf.errors import BadRequestError, ContextFullError


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
        status: the HTTP status.
        message: one line, without anything of the server's machine.
        type: OpenAI's class of errors, such as "invalid_request_error".
        param: the parameter that is wrong; None where it is none.
        code: a name for programs, such as "context_length_exceeded"; None where there is none.
        headers: further HTTP headers.

    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.type, self.param, self.code = status, message, type, param, code
        self.headers = dict(headers or {})

    def as_dict(self) -> dict[str, Any]:
        """Return the body of the answer."""
        fields = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": fields}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return an error of the client's."""
    return ApiError(400, message, param=param, code=code)


def internal_error() -> ApiError:
    """Return an error of ours; what it is stands in the log."""
    return ApiError(500, "the server has failed; its log says why", type="server_error", code="internal_error")


def timeout_error(seconds: float) -> ApiError:
    """Return the error of a request that takes too long."""
    return ApiError(504, f"the answer has taken more than {seconds:g} seconds", type="timeout_error", code="timeout")


def shutdown_error() -> ApiError:
    """Return the error of a request that ends because the server does."""
    return ApiError(503, "the server is shutting down", type="unavailable_error", code="shutting_down")


def from_exception(error: BaseException, without_paths: Callable[[str], str]) -> ApiError | None:
    """Return what a client is told of an error of the library; None for one that is not the client's.

    `without_paths` takes out of a message what must not leave the machine.
    """
    if isinstance(error, ApiError):
        return error
    if not isinstance(error, BadRequestError | ContextFullError):
        return None
    message = without_paths(str(error))
    if isinstance(error, ContextFullError):
        return bad_request(message, code="context_length_exceeded")
    return bad_request(message)
