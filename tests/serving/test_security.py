"""Who may ask: names of the host, API keys, other sites' pages."""

from __future__ import annotations

from typing import Any

import pytest
from scripted_model import scripted
from serving import RunningServer, running_server
from starlette.datastructures import Headers

from tritgguf.serving.security import HostPolicy, KeyPolicy


@pytest.mark.parametrize(
    "header",
    [
        "localhost",
        "localhost:8080",
        "LOCALHOST.",
        "127.0.0.1",
        "127.0.0.1:1",
        "127.9.9.9",
        "[::1]",
        "[::1]:8080",
        "::1",
    ],
)
def test_names_of_this_machine(header: str) -> None:
    assert HostPolicy("127.0.0.1").allows(header) is (header != "::1")


OTHERS = """
    evil.example localhost.evil.example 127.0.0.1.evil.example localhost:80:80 localhost:x 192.168.0.1 [::1 [::1]x
    evil.example:127.0.0.1 0.0.0.0 localhost@evil.example \u0660
"""


@pytest.mark.parametrize("header", [None, "", *OTHERS.split()])
def test_names_of_others(header: str | None) -> None:
    assert not HostPolicy("127.0.0.1").allows(header)


def test_names_that_are_allowed_besides() -> None:
    policy = HostPolicy("192.168.0.7", ["llm.example"])
    assert all(map(policy.allows, ["192.168.0.7:80", "llm.example", "LLM.example:443", "localhost"]))
    assert not any(map(policy.allows, ["192.168.0.8", "other.example"]))
    everywhere = HostPolicy("0.0.0.0")  # an address is no name that could be bound anew
    assert all(map(everywhere.allows, ["192.168.0.7:80", "[fe80::1]:80", "localhost"]))
    assert not everywhere.allows("evil.example")


def test_keys() -> None:
    policy = KeyPolicy(["secret", "schlüssel"])
    assert policy.allows(Headers({"authorization": "Bearer secret"}))
    assert policy.allows(Headers({"authorization": "bearer  secret "}))
    assert policy.allows(Headers({"x-api-key": "secret"}))
    assert policy.allows(Headers(raw=[(b"authorization", "Bearer schlüssel".encode())]))
    for header in ({}, {"authorization": "secret"}, {"authorization": "Bearer "}, {"authorization": "Bearer secretx"}):
        assert not policy.allows(Headers(header))
    assert not policy.allows(Headers(raw=[(b"authorization", b"Bearer \xff\xfe")]))
    assert KeyPolicy([]).allows(Headers({}))


@pytest.fixture(scope="module")
def guarded() -> Any:
    with running_server(scripted([40] * 1000), api_keys=("secret",), cors_origins=("https://app.example",)) as server:
        yield server


def test_a_key_is_needed_for_all_but_health_and_the_page(guarded: RunningServer) -> None:
    for path in ("/v1/models", "/props", "/slots", "/metrics", "/tokenizer_info", "/nothing"):
        response = guarded.http.get(path)
        assert response.status_code == 401, path
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert guarded.http.get(path, headers={"Authorization": "Bearer secret"}).status_code != 401
    assert guarded.post("/v1/completions", prompt="a").status_code == 401
    for path in ("/health", "/", "/docs", "/openapi.json"):
        assert guarded.http.get(path).status_code == 200
    with guarded.openai.with_options(api_key="secret") as client:
        assert client.completions.create(model="any", prompt="a", max_tokens=2).choices[0].text


def test_another_name_is_refused(guarded: RunningServer) -> None:
    for path in ("/health", "/", "/v1/models"):
        headers = {"Host": "evil.example", "Authorization": "Bearer secret"}
        response = guarded.http.get(path, headers=headers)
        assert response.status_code == 403
        assert response.json()["error"]["code"] == "host_not_allowed"


def test_pages_of_other_sites_are_kept_out(server: RunningServer, guarded: RunningServer) -> None:
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}

    def asked(running: RunningServer, origin: str) -> Any:
        return running.http.options("/v1/completions", headers={"Origin": origin, **preflight})

    assert "access-control-allow-origin" not in asked(server, "https://app.example").headers
    assert asked(guarded, "https://app.example").headers["access-control-allow-origin"] == "https://app.example"
    assert "access-control-allow-origin" not in asked(guarded, "https://evil.example").headers
    own = {"Origin": "https://app.example", **preflight, "Access-Control-Request-Headers": "x-stainless-lang, x-own"}
    assert guarded.http.options("/v1/completions", headers=own).status_code == 200
    refused = guarded.http.get("/v1/models", headers={"Origin": "https://app.example"})
    assert refused.headers["access-control-allow-origin"] == "https://app.example"  # so that the page can read why
    # A form of another page's cannot send JSON without asking first.
    for headers in ({"Content-Type": "text/plain"}, {"Content-Type": "text/plain; application/json"}, {}):
        response = server.http.post("/v1/completions", content=b'{"prompt": "a"}', headers=headers)
        assert response.status_code == 400
        assert "application/json" in response.json()["error"]["message"]


def test_headers_for_browsers_are_everywhere(server: RunningServer) -> None:
    for path in ("/", "/health", "/docs", "/nothing", "/v1/completions"):
        headers = server.http.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "server" not in headers


def test_the_page_is_served_and_can_be_left_out(server: RunningServer) -> None:
    page = server.http.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert server.http.get("/", headers={"If-None-Match": page.headers["etag"]}).status_code == 304
    assert server.http.head("/").status_code == 200
    for path in ("/..%2f__init__.py", "/%2e%2e/files.py", "/static/index.html", "//etc/passwd", "/files.py"):
        assert server.http.get(path).status_code == 404
    with running_server(scripted([]), page=False) as bare:
        assert bare.http.get("/").status_code == 404
