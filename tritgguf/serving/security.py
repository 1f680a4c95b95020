"""Who may ask: the Host header, the API key, and the headers that tell browsers what a page may do."""

from __future__ import annotations

import hmac
import ipaddress
import logging
from collections.abc import Iterable, Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tritgguf.serving.errors import ApiError, internal_error
from tritgguf.serving.responses import error_response
from tritgguf.serving.settings import ServerSettings

_LOGGER = logging.getLogger(__name__)
_LOOPBACK_NAMES = ("localhost", "localhost.localdomain", "ip6-localhost")
_WILDCARDS = ("0.0.0.0", "::", "")
_PUBLIC_PATHS = ("/health", "/v1/health")
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:;"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
    " require-trusted-types-for 'script'; trusted-types dompurify"
)
_HEADERS = (
    (b"content-security-policy", PAGE_POLICY.encode("ascii")),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


class HostPolicy:
    """Which Host headers are accepted, against DNS rebinding.

    A page of another site may make a browser ask this server under the site's own name, which it lets point here. So
    only names that are known to be this machine's are accepted: loopback, `host`, and those that the user allows. A
    server that listens on all addresses also accepts any address, because an address is no name that can be rebound.
    """

    def __init__(self, host: str, allowed: Iterable[str] = ()) -> None:
        self._names = {name.casefold() for name in (*_LOOPBACK_NAMES, host, *allowed) if name}
        self._any_address = host in _WILDCARDS

    def allows(self, header: str | None) -> bool:
        """Tell whether a Host header is accepted."""
        name = host_name(header or "")
        if name is None:
            return False
        if name in self._names or name.removesuffix(".") in self._names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or self._any_address


def host_name(header: str) -> str | None:
    """Return the name of a Host header without its port, in lower case; None for one that is malformed."""
    header = header.strip().casefold()
    if header.startswith("["):
        name, bracket, port = header[1:].partition("]")
        if not bracket or (port and not port.startswith(":")):
            return None
        port = port[1:]
    else:
        name, _, port = header.partition(":")
    return name if name and (not port or (port.isascii() and port.isdigit())) else None


class KeyPolicy:
    """Which API keys are accepted; all comparisons take the same time."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = [key.encode("utf-8") for key in keys]

    def allows(self, headers: Headers) -> bool:
        """Tell whether a request brings a key: as a bearer token, or as X-Api-Key."""
        if not self._keys:
            return True
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.casefold() == "bearer" else headers.get("x-api-key", "")
        raw = given.encode("latin-1")  # as it came
        return bool(sum([hmac.compare_digest(raw, key) for key in self._keys]))


class Gate:
    """Middleware: refuses what is not allowed before anything else reads it, and adds headers to every answer."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, public_paths: Iterable[str] = ()) -> None:
        """Guard an app; `public_paths` need no key, besides /health."""
        self._app = app
        self._hosts = HostPolicy(settings.host, settings.allowed_hosts)
        self._keys = KeyPolicy(settings.api_keys)
        self._public = {*_PUBLIC_PATHS, *public_paths}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                present = {name.lower() for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(pair for pair in _HEADERS if pair[0] not in present)]
            await send(message)

        error = self._refusal(scope)
        answer = self._app if error is None else error_response(error)
        try:
            await answer(scope, receive, send_with_headers)
        except Exception:
            _LOGGER.exception("a request has failed")
            if started:
                raise
            await error_response(internal_error())(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        if not self._hosts.allows(headers.get("host")):
            message = "this name is not one of the server's; start it with --allowed-host NAME if it should be"
            return ApiError(403, message, type="permission_error", code="host_not_allowed")
        # A preflight request of a browser never brings a key.
        is_public = scope["path"] in self._public or scope["method"] == "OPTIONS"
        if not is_public and not self._keys.allows(headers):
            message = "an API key is needed: Authorization: Bearer KEY"
            challenge = {"WWW-Authenticate": "Bearer"}
            return ApiError(401, message, type="authentication_error", code="invalid_api_key", headers=challenge)
        return None
