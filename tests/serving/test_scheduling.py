"""Many requests at once: clients that leave, the queue, timeouts, fairness, and the end of the server."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from scripted_model import scripted
from serving import RunningServer, paced, request_bytes, running_server

from tritgguf.generation.scheduler import Budget

ENDLESS: dict[str, Any] = {"prompt": "a", "max_tokens": 1000}


def passes(server: RunningServer) -> int:
    return server.service.engine_thread.passes


def leave(server: RunningServer, body: dict[str, Any], *, when: Any) -> int:
    """Send a request and close the connection at some time; return how many passes ran until nothing was left of it."""
    with server.connect() as connection:
        connection.sendall(request_bytes("/v1/completions", json.dumps(body).encode()))
        server.wait_until(when)
    before = passes(server)
    server.wait_until(lambda: not server.service.engine_thread.engine.has_work)
    server.check_idle()
    return passes(server) - before


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_answer(stream: bool) -> None:
    with running_server(paced(0.05)) as server:
        assert leave(server, {**ENDLESS, "stream": stream}, when=lambda: passes(server) >= 3) <= 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_its_prompt_is_read(stream: bool) -> None:
    with running_server(paced(0.05, budget=Budget(tokens=10))) as server:
        body = {"prompt": [50] * 1500, "max_tokens": 10, "stream": stream}
        assert leave(server, body, when=lambda: passes(server) >= 3) <= 3


def test_a_client_that_leaves_while_it_waits() -> None:
    with running_server(paced(0.02, parallel=1)) as server, ThreadPoolExecutor() as pool:
        other = pool.submit(server.post, "/v1/completions", prompt="a", max_tokens=40, seed=1)
        server.wait_until(lambda: passes(server) >= 2)
        with server.connect() as connection:
            connection.sendall(request_bytes("/v1/completions", json.dumps(ENDLESS).encode()))
            server.wait_until(lambda: server.service.engine_thread.waiting == 1)
        server.wait_until(lambda: server.service.engine_thread.waiting == 0)
        assert not other.done()
        assert other.result().json()["usage"]["completion_tokens"] == 40


def test_clients_that_leave_scores_and_embeddings() -> None:
    with running_server(paced(0.05, budget=Budget(outputs=10))) as server:
        scored = {"prompt": [50] * 1500, "max_tokens": 0, "echo": True, "logprobs": 1}
        assert leave(server, scored, when=lambda: passes(server) >= 2) <= 3
        with server.connect() as connection:
            body = json.dumps({"input": [[50] * 1500] * 3}).encode()
            connection.sendall(request_bytes("/v1/embeddings", body))
            server.wait_until(lambda: server.service.requests == 1 and server.service.engine_thread.engine.has_work)
        server.wait_until(lambda: not server.service.engine_thread.engine.has_work)


def test_a_full_queue() -> None:
    with running_server(paced(0.01, parallel=2), queue=3) as server, ThreadPoolExecutor(8) as pool:
        running = [pool.submit(server.post, "/v1/completions", prompt="a", max_tokens=100) for _ in range(5)]
        server.wait_until(lambda: server.service.requests == 5)
        for path, body in (("/v1/completions", ENDLESS), ("/v1/embeddings", {"input": "a"})):
            refused = server.post(path, **body)
            assert refused.status_code == 503
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            assert refused.json()["error"]["code"] == "queue_full"
        refused = server.post("/v1/chat/completions", messages=[{"role": "user", "content": "a"}], stream=True)
        assert refused.status_code == 503
        assert server.http.get("/health").status_code == 200
        assert server.http.get("/slots").json()[1]["is_processing"]
        assert "llamacpp:requests_deferred 3.0" in server.http.get("/metrics").text
        assert [answer.result().status_code for answer in running] == [200] * 5
        assert server.post("/v1/completions", prompt="a", max_tokens=1).status_code == 200


def test_a_request_of_many_answers_leaves_room_for_others() -> None:
    with running_server(paced(0.01, parallel=2), queue=3) as server, ThreadPoolExecutor() as pool:
        many = pool.submit(server.post, "/v1/completions", prompt=["a"] * 15, n=4, max_tokens=4)
        server.wait_until(lambda: passes(server) >= 2)
        assert server.service.engine_thread.waiting == 0
        assert server.post("/v1/completions", prompt="a", max_tokens=10).status_code == 200
        assert not many.done()
        assert len(many.result().json()["choices"]) == 60


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long(stream: bool) -> None:
    with running_server(paced(0.02), timeout=0.3) as server:
        if stream:
            events = server.events("/v1/completions", **ENDLESS)
            assert len(events) > 3
            error = events[-1]["error"]
        else:
            response = server.post("/v1/completions", **ENDLESS)
            assert response.status_code == 504
            error = response.json()["error"]
        assert error["code"] == "timeout"
        assert "0.3 seconds" in error["message"]


def first_token_passes(server: RunningServer, body: dict[str, Any]) -> int:
    """Return how many passes run from a streamed request's arrival to its first token."""
    before = passes(server)
    with server.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        for line in response.iter_lines():
            if line.startswith("data: ") and json.loads(line[6:])["choices"][0]["text"]:
                return passes(server) - before
    raise AssertionError("there was no text")


@pytest.mark.parametrize("answers", [0, 1])
def test_a_short_request_does_not_wait_for_a_long_prompt(answers: int) -> None:
    with running_server(paced(0.05, parallel=8, context=4000)) as server, ThreadPoolExecutor() as pool:
        others = [pool.submit(server.post, "/v1/completions", prompt="b", max_tokens=30) for _ in range(answers)]
        long = pool.submit(server.post, "/v1/completions", prompt=[50] * 3500, max_tokens=2)
        server.wait_until(lambda: passes(server) >= 2)
        # One pass may be running when it arrives; the count sees the pass behind the first token's too.
        assert first_token_passes(server, {"prompt": [60] * 20, "max_tokens": 5}) <= 3
        assert not long.done()
        for answer in [*others, long]:
            assert answer.result().status_code == 200


def test_the_event_loop_answers_while_a_pass_runs() -> None:
    model = paced(0.0)
    held, entered = threading.Event(), threading.Event()
    forward = model.model.forward

    def hold(*arguments: Any) -> None:
        entered.set()
        assert held.wait(20)
        forward(*arguments)

    model.model.forward = hold
    with running_server(model) as server, ThreadPoolExecutor() as pool:
        answer = pool.submit(server.post, "/v1/completions", prompt="a", max_tokens=3)
        assert entered.wait(20)
        for path in ("/health", "/slots", "/metrics", "/v1/models"):
            assert server.http.get(path).status_code == 200
        assert server.post("/tokenize", content="a").status_code == 200
        assert not answer.done()
        held.set()
        assert answer.result().status_code == 200


def test_running_answers_end_before_the_server_does() -> None:
    with running_server(paced(0.01), shutdown_seconds=20) as server, ThreadPoolExecutor() as pool:
        answer = pool.submit(server.post, "/v1/completions", prompt="a", max_tokens=50)
        server.wait_until(lambda: passes(server) >= 2)
        server.end()
        assert answer.result().json()["usage"]["completion_tokens"] == 50


@pytest.mark.parametrize("stream", [False, True])
def test_answers_that_take_too_long_are_cut_when_the_server_ends(stream: bool) -> None:
    with running_server(paced(0.01), shutdown_seconds=0.3) as server, ThreadPoolExecutor() as pool:
        send: Any = server.events if stream else server.post
        answer: Any = pool.submit(send, "/v1/completions", **ENDLESS)
        server.wait_until(lambda: passes(server) >= 2)
        start = time.monotonic()
        server.end()
        error = answer.result()[-1]["error"] if stream else answer.result().json()["error"]
        assert error["code"] == "shutting_down"
        assert time.monotonic() - start < 10


def test_a_sampler_that_fails_ends_its_own_answer_only() -> None:
    model = scripted([40] * 500)
    with running_server(model) as server:
        model.model.forward = lambda *arguments: 1 / 0
        response = server.post("/v1/completions", prompt="a")
        assert response.status_code == 500
        assert response.json()["error"]["message"] == "the server has failed; its log says why"
        model.model.forward = type(model.model).forward.__get__(model.model)
        assert server.post("/v1/completions", prompt="a", max_tokens=3).status_code == 200
        assert server.http.get("/health").status_code == 200


def test_a_crowd_of_clients_leaves_nothing_behind(server: RunningServer) -> None:
    def client(number: int) -> int:
        body = {"prompt": [number % 50 + 60] * (number * 7 % 300 + 1), "max_tokens": number % 20, "seed": number}
        if number % 3:
            response = server.post("/v1/completions", **body, stream=bool(number % 2))
            return response.status_code
        with server.connect() as connection:
            connection.sendall(request_bytes("/v1/completions", json.dumps(body).encode()))
            time.sleep(number % 10 / 100)
        return 200

    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(client, range(60))) == {200}
    server.check_idle()
