"""Where a server listens."""

from __future__ import annotations

import socket

from tritgguf.errors import TritGgufError

_BACKLOG = 2048  # connections that wait until they are accepted


def listening_socket(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address but does not listen yet; TritGgufError where that fails."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise _refusal(host, port, error.strerror or str(error)) from error
    except UnicodeError as error:  # such as a label that is too long
        raise _refusal(host, port, "this is no name of a host") from error
    return bound


def listen(bound: socket.socket) -> None:
    """Begin to listen; TritGgufError where another server has bound the same address meanwhile and listens first."""
    host, port = bound.getsockname()[:2]
    try:
        bound.listen(_BACKLOG)
    except OSError as error:
        raise _refusal(host, port, error.strerror or str(error)) from error


def _refusal(host: str, port: int, reason: str) -> TritGgufError:
    return TritGgufError(f"cannot listen on {host}, port {port}: {reason}; choose another --host or --port")


def url_of(bound: socket.socket) -> str:
    """Return the URL of a server that listens on a socket."""
    host, port = bound.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
