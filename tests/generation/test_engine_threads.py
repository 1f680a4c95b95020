"""Many threads with one engine: every request gets what it gets alone, and nothing is left when all have ended.

`TRITGGUF_SOAK_SECONDS` says how long each model is kept busy; by default once for a hundred requests.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from scripted_model import VOCABULARY, ScriptedModel

from tritgguf.formats.gguf_file import GgufFile
from tritgguf.generation.engine import Engine
from tritgguf.generation.request import Request, RunningRequest
from tritgguf.generation.sampling import Sampler, SamplingOptions
from tritgguf.runtime.kv_pool import KVPool
from tritgguf.runtime.model import Model
from tritgguf.runtime.token_batch import TokenBatch

THREADS, CONTEXT, PARALLEL = 100, 600, 6
SECONDS = float(os.environ.get("TRITGGUF_SOAK_SECONDS", "0"))
MOST_SECONDS = 300 + 2 * SECONDS  # a hang, on any machine
Files = Callable[..., GgufFile]


class CountingModel(ScriptedModel):
    """Answers with a number that depends on all tokens of a sequence, which it finds in the pool's pages alone."""

    def __init__(self) -> None:
        super().__init__([])
        self.owner: int | None = None

    def forward(
        self, batch: TokenBatch, kv: KVPool, logits: np.ndarray | None, hidden: np.ndarray | None = None
    ) -> None:
        assert self.owner is None, "two threads run the model at once"
        self.owner = threading.get_ident()
        assert kv.writable(batch.sequences, batch.positions)
        rows = iter(range(len(batch.outputs)))
        for place, (token, position, sequence) in enumerate(
            zip(batch.tokens.tolist(), batch.positions.tolist(), batch.sequences.tolist(), strict=True)
        ):
            numbers = [kv._storage[page] for page in kv.pages(sequence)]
            before = int(numbers[(position - 1) // 256][(position - 1) % 256]) if position else 0
            state = numbers[position // 256][position % 256] = (31 * before + token + 1) % 65521
            if place in batch.outputs:
                row = next(rows)
                if logits is not None:
                    logits[row] = 0
                    logits[row, int(state) % VOCABULARY] = 9
                if hidden is not None:
                    hidden[row] = state
        time.sleep(0)
        self.owner = None


def random_request(generator: np.random.Generator) -> Request:
    """Return a request of a random kind and length; many begin alike."""
    start = np.random.default_rng(int(generator.integers(3))).integers(3, 440, 400)[: generator.integers(0, 400)]
    prompt = [*start.tolist(), *generator.integers(3, 440, generator.integers(1, 60)).tolist()]
    wanted: Any = generator.choice(["tokens"] * 6 + ["logits", "hidden"])
    if wanted != "tokens":
        return Request(prompt, wanted=wanted, first_output=int(generator.integers(len(prompt))))
    options = SamplingOptions(temperature=float(generator.choice([0, 0.8])), seed=int(generator.integers(99)))
    return Request(prompt, Sampler(options), max_tokens=int(generator.integers(0, 20)), stop_tokens=frozenset([2]))


def result(engine: Engine, request: Request) -> Any:
    running = engine.submit(request)
    return list(engine.tokens(running)) if request.wanted == "tokens" else engine.outputs(running)


class Client(threading.Thread):
    """Asks for one random request; some change their minds, before, between or after its tokens."""

    def __init__(self, engine: Engine, seed: int) -> None:
        super().__init__(daemon=True)
        self.engine, self.seed = engine, seed
        self.error: BaseException | None = None
        self.found: Any = None
        generator = np.random.default_rng(seed)
        self.cancels_after = int(generator.integers(0, 15)) if generator.random() < 0.3 else None
        self.delay = float(generator.random() * 0.2)

    def request(self) -> Request:
        return random_request(np.random.default_rng((self.seed, 1)))

    def run(self) -> None:
        try:
            time.sleep(self.delay)
            request = self.request()
            if self.cancels_after is None or request.wanted != "tokens":
                self.found = result(self.engine, request)
            else:
                running = self.engine.submit(request)
                self.found = list(self._until_cancelled(running, self.cancels_after))
        except BaseException as error:
            self.error = error

    def _until_cancelled(self, running: RunningRequest, count: int) -> Iterator[int]:
        tokens = self.engine.tokens(running)
        for _ in range(count):
            token = next(tokens, None)
            if token is None:
                return
            yield token
        self.engine.cancel(running)

    def check(self, expected: Any) -> None:
        if self.error is not None:
            raise self.error
        if self.cancels_after is not None and isinstance(expected, list):
            expected = expected[: self.cancels_after]
        np.testing.assert_array_equal(self.found, expected)


@pytest.fixture(params=["real", "scripted"])
def model(request: pytest.FixtureRequest, tiny_trit_file: Files) -> Any:
    return Model(tiny_trit_file(), threads=2) if request.param == "real" else CountingModel()


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """Show what every thread does and end the process where one waits for ever."""
    faulthandler.dump_traceback_later(MOST_SECONDS, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def new_engine(model: Any, pages: int | None = None) -> Engine:
    return Engine(model, context=CONTEXT, parallel=PARALLEL, pages=pages)


@pytest.mark.parametrize("pages", [None, 6])
def test_a_hundred_threads_get_what_each_gets_alone(model: Any, pages: int | None) -> None:
    seed, end = 0, time.monotonic() + SECONDS
    while not seed or time.monotonic() < end:
        engine = new_engine(model, pages)
        clients = [Client(engine, seed + place) for place in range(THREADS)]
        seed += THREADS
        for client in clients:
            client.start()
        for client in clients:
            client.join(MOST_SECONDS)
            assert not client.is_alive()
        engine.check()
        assert not engine.has_work
        assert engine.pool.free_sequences == PARALLEL
        for client in clients:
            alone = new_engine(model)
            client.check(result(alone, client.request()))


def test_other_calls_are_safe_meanwhile(model: Any) -> None:
    engine = new_engine(model)
    clients = [Client(engine, 1000 + place) for place in range(20)]
    for client in clients:
        client.start()
    while any(client.is_alive() for client in clients):
        engine.check()
        engine.clear_prefix_cache()
        engine.step()
    for client in clients:
        client.check(result(new_engine(model), client.request()))
    engine.clear_prefix_cache()
    engine.check()
    assert engine.pool.free_pages == len(engine.pool.references)
