"""What a server is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServerSettings:
    """Settings of a server.

    Attributes:
        host: the address to listen on.
        port: the port; 0 takes a free one.
        alias: the model's name in answers; None takes the file's.
        api_keys: of which a request must bring one; none are needed where there are none.
        allowed_hosts: further names that the Host header may have, besides loopback names and `host`.
        cors_origins: origins whose pages may use the server; "*" for all.
        queue: how many answers may wait; beyond, requests get a 503.
        timeout: seconds that an answer may take.
        shutdown_seconds: how long running answers may go on after a signal to end.
        page: whether the chat page is served.
        most_body_bytes: the size of a request's body.
        body_seconds: how long a client may take to send headers, and then a body.
        write_seconds: how long a client may refuse to read what is sent to it.
        most_connections: how many clients may be connected.

    """

    host: str = "127.0.0.1"
    port: int = 8080
    alias: str | None = None
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    queue: int = 64
    timeout: float = 600.0
    shutdown_seconds: float = 10.0
    page: bool = True
    most_body_bytes: int = 10 << 20
    body_seconds: float = 30.0
    write_seconds: float = 60.0
    most_connections: int = 1000
