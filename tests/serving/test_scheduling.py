"""Many requests at once: clients that leave, the queue, timeouts, fairness, and the end of the server."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from scripted_model import scripted
from serving import MOST_SECONDS, PacedModel, RunningServer, paced, request_bytes, running_server

from tritgguf.generation.scheduler import Budget

ENDLESS: dict[str, Any] = {"prompt": "a", "max_tokens": 1000}


def passes(server: RunningServer) -> int:
    return server.service.engine_thread.passes


def model_of(server: RunningServer) -> PacedModel:
    loaded: Any = server.service.model
    model: PacedModel = loaded.model
    return model


def leave(server: RunningServer, path: str, body: dict[str, Any], *, after: int) -> int:
    """Send a request to a server whose model is held, and close the connection after some passes.

    Return how many passes end from then on, until nothing is left of the request. One has begun before; it waits until
    the server has noticed that the client has left.
    """
    model = model_of(server)
    with server.connect() as connection:
        connection.sendall(request_bytes(path, json.dumps(body).encode()))
        model.wait_until_held()
        model.let(after)
        model.wait_until_held()
    server.wait_until(lambda: not server.service.engine_thread.jobs)
    before = len(model.passes)
    model.let()
    server.check_idle()
    model.hold()
    return len(model.passes) - before


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_answer(stream: bool) -> None:
    with running_server(paced(0.0, held=True)) as server:
        assert leave(server, "/v1/completions", {**ENDLESS, "stream": stream}, after=3) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_its_prompt_is_read(stream: bool) -> None:
    with running_server(paced(0.0, budget=Budget(tokens=10), held=True)) as server:
        body = {"prompt": [50] * 1500, "max_tokens": 10, "stream": stream}
        assert leave(server, "/v1/completions", body, after=3) == 1


def test_a_client_that_leaves_while_it_waits() -> None:
    with running_server(paced(0.0, parallel=1, held=True)) as server, ThreadPoolExecutor() as pool:
        other = pool.submit(server.post, "/v1/completions", prompt="a", max_tokens=40, seed=1)
        model_of(server).wait_until_held()
        with server.connect() as connection:
            connection.sendall(request_bytes("/v1/completions", json.dumps(ENDLESS).encode()))
            server.wait_until(lambda: server.service.engine_thread.waiting == 1)
        server.wait_until(lambda: server.service.engine_thread.waiting == 0)
        assert not other.done()
        model_of(server).let()
        assert other.result().json()["usage"]["completion_tokens"] == 40


def test_clients_that_leave_scores_and_embeddings() -> None:
    with running_server(paced(0.0, budget=Budget(outputs=10), held=True)) as server:
        scored = {"prompt": [50] * 1500, "max_tokens": 0, "echo": True, "logprobs": 1}
        assert leave(server, "/v1/completions", scored, after=2) == 1
        assert leave(server, "/v1/embeddings", {"input": [[50] * 1500] * 3}, after=0) == 1


def test_a_full_queue() -> None:
    with running_server(paced(0.0, parallel=2, held=True), queue=3) as server, ThreadPoolExecutor(8) as pool:
        running = [pool.submit(server.post, "/v1/completions", prompt="a", max_tokens=100) for _ in range(5)]
        server.wait_until(lambda: len(server.service.engine_thread.jobs) == 5)
        model_of(server).wait_until_held()
        model_of(server).let(1)
        server.wait_until(lambda: server.service.engine_thread.waiting == 3)
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
        model_of(server).let()
        assert [answer.result().status_code for answer in running] == [200] * 5
        assert server.post("/v1/completions", prompt="a", max_tokens=1).status_code == 200


def test_a_request_of_many_answers_leaves_room_for_others() -> None:
    with running_server(paced(0.01, parallel=2, held=True), queue=3) as server, ThreadPoolExecutor() as pool:
        many = pool.submit(server.post, "/v1/completions", prompt=["a"] * 15, n=4, max_tokens=40)
        model_of(server).wait_until_held()
        model_of(server).let(2)
        model_of(server).wait_until_held()
        assert server.service.engine_thread.waiting == 0
        model_of(server).let()
        assert server.post("/v1/completions", prompt="a", max_tokens=10).status_code == 200
        assert not many.done()
        model_of(server).seconds = 0.0
        assert len(many.result().json()["choices"]) == 60


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long(stream: bool) -> None:
    with running_server(paced(0.01), timeout=0.5) as server:
        if stream:
            events = server.events("/v1/completions", **ENDLESS)
            assert len(events) > 3
            error = events[-1]["error"]
        else:
            response = server.post("/v1/completions", **ENDLESS)
            assert response.status_code == 504
            error = response.json()["error"]
        assert error["code"] == "timeout"
        assert "0.5 seconds" in error["message"]


def first_text(server: RunningServer, body: dict[str, Any]) -> str:
    """Return the first text of a streamed answer."""
    with server.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        for line in response.iter_lines():
            if line.startswith("data: ") and (text := json.loads(line[6:])["choices"][0]["text"]):
                return str(text)
    raise AssertionError("there was no text")


@pytest.mark.parametrize("answers", [0, 1])
def test_a_short_request_does_not_wait_for_a_long_prompt(answers: int) -> None:
    with running_server(paced(0.0, parallel=8, context=4000, held=True)) as server, ThreadPoolExecutor() as pool:
        others = [pool.submit(server.post, "/v1/completions", prompt="b", max_tokens=30) for _ in range(answers)]
        long = pool.submit(server.post, "/v1/completions", prompt=[50] * 3500, max_tokens=2)
        server.wait_until(lambda: len(server.service.engine_thread.jobs) == answers + 1)
        model = model_of(server)
        model.wait_until_held()
        model.let(2)
        model.wait_until_held()
        short = pool.submit(first_text, server, {"prompt": [60] * 20, "max_tokens": 5})
        server.wait_until(lambda: len(server.service.engine_thread.jobs) == answers + 2)
        model.let(2)  # the one that runs when it arrives, and the one that reads its prompt
        assert short.result(MOST_SECONDS)
        assert not long.done()
        model.let()
        for answer in [*others, long]:
            assert answer.result().status_code == 200


def test_the_event_loop_answers_while_a_pass_runs() -> None:
    model = paced(0.0)
    opened, entered = threading.Event(), threading.Event()
    forward = model.model.forward

    def hold(*arguments: Any) -> None:
        entered.set()
        assert opened.wait(MOST_SECONDS)
        forward(*arguments)

    model.model.forward = hold
    with running_server(model) as server, ThreadPoolExecutor() as pool:
        answer = pool.submit(server.post, "/v1/completions", prompt="a", max_tokens=3)
        assert entered.wait(MOST_SECONDS)
        for path in ("/health", "/slots", "/metrics", "/v1/models"):
            assert server.http.get(path).status_code == 200
        assert server.post("/tokenize", content="a").status_code == 200
        assert not answer.done()
        opened.set()
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
