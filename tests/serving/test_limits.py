"""Bodies that are too large, too deep or too slow, clients that are no clients, and how the others fare meanwhile."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from scripted_model import scripted
from serving import MOST_SECONDS, RunningServer, request_bytes, running_server

from tritgguf.generation.sampling import Sampler
from tritgguf.serving import tokens
from tritgguf.serving.limits import MOST_JSON_DEPTH, json_depth
from tritgguf.serving.protocol import ChatBody, CompletionBody, DetokenizeBody, EmbeddingBody

JSON = {"content-type": "application/json"}


@given(
    st.recursive(
        st.none() | st.text(alphabet='[]{}"\\a'),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('"[', max_size=2), inner, max_size=3),
    ),
    st.integers(MOST_JSON_DEPTH, 300),
)
def test_the_depth_of_json(value: Any, wrapped: int) -> None:
    def depth(value: Any) -> int:
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
        return 0 if parts is None else 1 + max(map(depth, parts), default=0)

    text = "[" * wrapped + json.dumps(value) + "]" * wrapped
    assert max(json_depth(text.encode()), MOST_JSON_DEPTH) == wrapped + depth(value)


def test_brackets_in_a_text_are_no_depth(server: RunningServer) -> None:
    assert server.post("/tokenize", content="[{" * 500).status_code == 200
    assert server.post("/tokenize", content='"[' * 500 + "\\").status_code == 200


def test_no_text_makes_the_first_look_at_it_long(server: RunningServer) -> None:
    """Each quote could be the first of a string, and none is its last: a search from each of them would not end."""
    body = b"[" * (MOST_JSON_DEPTH + 1) + b'"' + b'\\"' * 1_000_000
    assert server.http.post("/v1/completions", content=body, headers=JSON).status_code == 400


def test_a_body_in_another_encoding(server: RunningServer) -> None:
    text = '{"prompt": "\u2200", "x": ' + "[" * 300 + "]" * 300 + "}"  # a byte of the character is that of a quote
    response = server.http.post("/v1/completions", content=text.encode("utf-16-le"), headers=JSON)
    assert response.status_code == 400
    assert "UTF-8" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "given"),
    [
        (CompletionBody, {"prompt": [1.5] * 1000}),
        (CompletionBody, {"prompt": [[1.5] * 1000] * 100}),
        (CompletionBody, {"prompt": "a", "logit_bias": {str(token): "1" for token in range(1000)}}),
        (CompletionBody, {"prompt": "a", "logit_bias": {f"\ud800{token}": 1 for token in range(1000)}}),
        (CompletionBody, {"prompt": "a", "stop": [1] * 1000}),
        (ChatBody, {"messages": [1] * 1000}),
        (ChatBody, {"messages": [{"role": "user", "content": [1] * 1000}]}),
        (ChatBody, {"messages": [{"role": "user", "content": "a"}], "tools": [1] * 1000}),
        (EmbeddingBody, {"input": [[]] * 1000}),
        (DetokenizeBody, {"tokens": ["1"] * 1000}),
    ],
)
def test_a_thousand_mistakes_are_not_listed(body: type[BaseModel], given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        body.model_validate(given)
    assert caught.value.error_count() < 6


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stop": ["a"] * 17}, "stop: List should have at most 16 items"),
        ({"prompt": [-1]}, "prompt.0: Input should be greater than or equal to 0"),
        ({"prompt": []}, "prompt: List should have at least 1 item"),
        ({"prompt": 5}, "prompt: Input should be a valid string"),
    ],
)
def test_the_message_says_what_is_wrong(server: RunningServer, given: dict[str, Any], message: str) -> None:
    assert server.error("/v1/completions", **{"prompt": "a", **given})["message"].startswith(message)


def test_null_is_the_default(server: RunningServer) -> None:
    names = ("ignore_eos", "cache_prompt", "timings_per_token", "stream", "n", "stop", "seed", "echo", "logprobs")
    assert server.post("/v1/completions", prompt="a", max_tokens=1, **dict.fromkeys(names)).status_code == 200


def test_a_request_has_a_bounded_number_of_answers(server: RunningServer) -> None:
    error = server.error("/v1/completions", prompt=["a"] * 256, n=2, max_tokens=1)
    assert error["param"] == "n"
    assert "512 answers" in error["message"]


def test_a_body_that_is_too_deep(server: RunningServer) -> None:
    for text in ("[" * 100_000, '{"a":' * 200 + "1" + "}" * 200):
        response = server.http.post("/v1/completions", content=text.encode(), headers=JSON)
        assert response.status_code == 400
    assert "100 levels" in response.json()["error"]["message"]


def test_a_body_that_is_too_large() -> None:
    with running_server(scripted([40] * 100), most_body_bytes=1000) as server:
        body = b'{"prompt": "' + b"a" * 100_000 + b'"}'
        response = server.http.post("/v1/completions", content=body, headers=JSON)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "body_too_large"
        chunked = server.http.post("/v1/completions", content=iter([body] * 100), headers=JSON)  # no length is told
        assert chunked.status_code == 413
        assert server.post("/v1/completions", prompt="a", user="a" * 900, max_tokens=1).status_code == 200


@pytest.mark.parametrize("sent", [b"", b"POST /v1/compl", b"POST / HTTP/1.1\r\nHost: localhost\r\nX: "])
def test_half_a_request_is_not_waited_for(sent: bytes) -> None:
    with running_server(scripted([]), body_seconds=1.0) as server, server.connect() as connection:
        connection.sendall(sent)
        start = time.monotonic()
        with pytest.raises(ConnectionResetError):  # aborted
            if connection.recv(100) == b"":
                raise ConnectionResetError
        assert time.monotonic() - start < 10
        assert server.http.get("/health").status_code == 200


def test_half_a_body_is_not_waited_for() -> None:
    with running_server(scripted([]), body_seconds=1.0) as server, server.connect() as connection:
        connection.sendall(request_bytes("/v1/completions", b'{"prompt"', length=100))
        assert connection.recv(100).startswith(b"HTTP/1.1 408 ")
        assert server.http.get("/health").status_code == 200


def test_a_drop_at_a_time_is_not_waited_for() -> None:
    with running_server(scripted([]), body_seconds=1.0) as server, server.connect() as connection:
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            for byte in request_bytes("/v1/completions", b"{}" * 500):
                connection.sendall(bytes([byte]))
                time.sleep(0.01)
        assert server.http.get("/health").status_code == 200


@pytest.mark.parametrize(
    "rubbish", [b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/9\r\n\r\n", b"A" * 100_000 + b"\r\n\r\n"]
)
def test_rubbish_is_no_http(server: RunningServer, rubbish: bytes) -> None:
    with server.connect() as connection:
        connection.sendall(rubbish + b"\r\n\r\n")
        answer = connection.recv(1000)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b'{"error":{"message":"this is not a valid HTTP request"' in answer


def test_a_client_that_does_not_read_is_left() -> None:
    # Answers larger than what the system buffers, which nobody reads.
    with running_server(scripted([]), write_seconds=0.3) as server, server.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        tokens = b'{"tokens": [' + b"300," * 200_000 + b"300]}"
        with contextlib.suppress(ConnectionError):
            connection.sendall(request_bytes("/detokenize", tokens) * 20)
        server.wait_until(lambda: len(server.connections) == 0)
        assert server.http.get("/health").status_code == 200


def test_too_many_connections() -> None:
    with running_server(scripted([]), most_connections=3) as server:
        assert server.http.get("/health").status_code == 200  # keeps its connection
        others = [server.connect() for _ in range(4)]
        with pytest.raises(ConnectionResetError):
            if others[-1].recv(1) == b"":
                raise ConnectionResetError
        assert server.http.get("/health").status_code == 200
        for connection in others:
            connection.close()


def mutated(generator: random.Random, body: bytes) -> bytes:
    """Return a body with some bytes changed, cut out, or doubled; or values of other types in it."""
    data = bytearray(body)
    for _ in range(generator.randint(1, 4)):
        place = generator.randrange(len(data) + 1)
        kind = generator.randrange(4)
        if kind == 0:
            data[place : place + 1] = bytes([generator.randrange(256)])
        elif kind == 1:
            del data[place : place + generator.randint(1, 20)]
        elif kind == 2:
            data[place:place] = generator.choice(VALUES)
        else:
            text, value = generator.choice(VALUES), generator.choice(VALUES)
            data = bytearray(bytes(data).replace(text, value, 1))
    return bytes(data)


VALUES = [
    b"null",
    b"true",
    b"-1",
    b"0",
    b"1e999",
    b"NaN",
    b'""',
    b"[]",
    b"{}",
    b"[[]]",
    b'{"a":1}',
    b'"\\ud800"',
    b"9" * 30,
]
VALUES += [
    b"5",
    b"1",
    b"0.5",
    b'"a"',
    b'"user"',
    b"[1,2]",
    b'{"1":5}',
    b"448",
    b"9" * 5000,
    b'"\\u0000"',
    b"-0",
    b"1.5",
]
BODIES = {
    "/v1/chat/completions": b'{"messages":[{"role":"user","content":"a"}],"max_tokens":5,"temperature":0.5,"n":1,'
    b'"stop":["a"],"logit_bias":{"1":5},"seed":1,"top_k":5,"logprobs":true,"top_logprobs":1,"min_p":0.5,"stream":true,'
    b'"response_format":{"type":"json_schema","json_schema":{"schema":{"enum":["a",1]}}},"chat_template_kwargs":{"a":1}}',
    "/v1/chat/completions?": b'{"messages":[{"role":"user","content":[{"type":"text","text":"a"}]},{"role":"assistant",'
    b'"tool_calls":[{"id":"1","function":{"name":"f","arguments":"{}"}}]},{"role":"tool","content":"a"}],"max_tokens":5,'
    b'"tools":[{"type":"function","function":{"name":"f","parameters":{"type":"object","required":["a"]}}}],'
    b'"tool_choice":{"function":{"name":"f"}},"parallel_tool_calls":false}',
    "/v1/completions": b'{"prompt":[[1,2],"a"],"max_tokens":5,"echo":true,"logprobs":1,"n":1,"stop":"a","top_p":0.5}',
    "/v1/embeddings": b'{"input":["a",[1,2]],"encoding_format":"base64","dimensions":128}',
    "/tokenize": b'{"content":"a","add_special":true,"with_pieces":true}',
    "/detokenize": b'{"tokens":[1,2]}',
}


def fuzz(server: RunningServer, count: int, seed: int) -> dict[int, int]:
    """Send changed bodies; return how many gave each status."""
    generator, statuses = random.Random(seed), dict[int, int]()
    for _ in range(count):
        path = generator.choice(sorted(BODIES))
        body = mutated(generator, BODIES[path])
        response = server.http.post(path, content=body, headers=JSON)
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
        assert response.status_code in (200, 400), (path, body, response.text)
        assert "internal_error" not in response.text, (path, body)
        if response.status_code == 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
            assert "Traceback" not in response.text
    return statuses


def test_no_body_makes_the_server_fail(server: RunningServer) -> None:
    """`TRITGGUF_FUZZED_BODIES` says how many bodies are tried."""
    count = int(os.environ.get("TRITGGUF_FUZZED_BODIES", "300"))
    statuses = fuzz(server, count, seed=count)
    assert min(statuses[200], statuses[400]) > count / 10
    server.check_idle()


def test_long_texts_do_not_keep_others_waiting(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have threads of their own: those of the others stay free."""
    read, entered, tokenized = threading.Event(), threading.Semaphore(0), tokens._tokenized

    def slow(*arguments: Any) -> Any:
        entered.release()
        assert read.wait(MOST_SECONDS)
        return tokenized(*arguments)

    monkeypatch.setattr(tokens, "_tokenized", slow)
    with ThreadPoolExecutor(12) as clients:
        text = "a " * 200_000
        post = functools.partial(httpx.post, json={"content": text}, timeout=MOST_SECONDS)
        answers = [clients.submit(post, f"{server.url}/tokenize") for _ in range(12)]
        assert entered.acquire(timeout=MOST_SECONDS)
        assert server.post("/v1/completions", prompt="a", max_tokens=1).status_code == 200
        read.set()
        assert [answer.result(MOST_SECONDS).status_code for answer in answers] == [200] * 12


def test_a_panic_of_a_library_ends_one_request(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Panics of libraries in Rust are exceptions that `except Exception` does not catch."""

    def panic(*_: Any) -> Any:
        raise BaseException("a panic")

    with monkeypatch.context() as patched:
        patched.setattr(Sampler, "sample", panic)
        response = server.post("/v1/completions", prompt="a", max_tokens=2)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert server.post("/v1/completions", prompt="a", max_tokens=2).status_code == 200


def test_others_are_served_meanwhile(server: RunningServer) -> None:
    held = [server.connect() for _ in range(20)]
    for connection in held:
        connection.sendall(request_bytes("/v1/completions", b'{"prompt"', length=1000))
    assert server.post("/v1/completions", prompt="a", max_tokens=3).status_code == 200
    for connection in held:
        connection.close()


def test_a_request_for_each_half_of_a_connection(server: RunningServer) -> None:
    body = b'{"content": "a"}'
    with server.connect() as connection:
        connection.sendall(request_bytes("/tokenize", body) * 3)  # pipelined
        answer = b""
        while answer.count(b'"max_model_len"') < 3:
            answer += connection.recv(10_000)
    assert answer.count(b"HTTP/1.1 200 OK") == 3
    assert httpx.get(f"{server.url}/health", timeout=MOST_SECONDS).status_code == 200


def test_all_bodies_together_are_bounded() -> None:
    with running_server(scripted([40] * 100), most_body_bytes=1000) as server:
        held = [server.connect() for _ in range(17)]
        for connection in held:
            connection.sendall(request_bytes("/v1/completions", b" " * 950, length=1000))
        assert held[-1].recv(100).startswith(b"HTTP/1.1 503 ")
        for connection in held:
            connection.close()
        server.wait_until(lambda: not server.connections)
        assert server.post("/v1/completions", prompt="a", max_tokens=1).status_code == 200
