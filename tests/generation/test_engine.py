"""The engine: what a request gets does not depend on the others, to the last bit of its logits."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pytest
from guessing_drafter import GuessingDrafter
from hypothesis import given, settings
from hypothesis import strategies as st

from tritgguf.errors import BadRequestError
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.generation.engine import Engine
from tritgguf.generation.request import Request, RunningRequest
from tritgguf.generation.scheduler import Budget
from tritgguf.generation.speculation import Speculation
from tritgguf.runtime.model import Model

CONTEXT = 640
# Prompts have long common prefixes, which end inside and at the borders of pages of 256 tokens.
COMMON = np.random.default_rng(7).integers(0, 440, 600).tolist()


class Recorder:
    """Takes the likeliest token and keeps all logits that it has seen."""

    def __init__(self) -> None:
        self.logits: list[np.ndarray] = []

    def accept(self, tokens: Iterable[int]) -> None:
        pass

    def sample(self, logits: np.ndarray) -> int:
        self.logits.append(logits.copy())
        return int(logits.argmax())


def prompt(shared: int, own: int, seed: int) -> list[int]:
    """Return a prompt of so many common tokens, then others that no other seed has in this place."""
    return [*COMMON[:shared], *(440 + seed % 8 if k == 0 else (seed * 31 + k * 7) % 440 for k in range(own))]


def answer(model: Model, tokens: Sequence[int], count: int) -> tuple[list[int], list[np.ndarray]]:
    """Return the tokens and the logits that a prompt gets alone, in an engine of its own."""
    engine, recorder = Engine(model, context=CONTEXT, parallel=1), Recorder()
    request = engine.submit(Request(list(tokens), sampler=recorder, max_tokens=count, cache_prompt=False))
    return list(engine.tokens(request)), recorder.logits


@pytest.fixture(scope="module")
def model(
    request: pytest.FixtureRequest,
    tiny_trit_file: Callable[..., GgufFile],
    tiny_lfm2_file: GgufFile,
    tiny_qwen35_file: GgufFile,
) -> Model:
    """A model with keys and values alone; with the parameter "lfm2" one with short convolutions, "qwen35" states."""
    files = {"lfm2": tiny_lfm2_file, "qwen35": tiny_qwen35_file}
    file = files.get(getattr(request, "param", "qwen2"))
    return Model(tiny_trit_file("qwen2", 2) if file is None else file, threads=2)


@pytest.fixture(scope="module")
def alone(model: Model) -> Callable[[tuple[int, int, int], int], tuple[list[int], list[np.ndarray]]]:
    """Return a function from a prompt's description and a number of tokens to what it gets alone; kept."""
    known: dict[tuple[int, int, int], tuple[list[int], list[np.ndarray]]] = {}

    def get(description: tuple[int, int, int], count: int) -> tuple[list[int], list[np.ndarray]]:
        if description not in known or len(known[description][0]) < count:
            known[description] = answer(model, prompt(*description), count)
        tokens, logits = known[description]
        return tokens[:count], logits[:count]

    return get


DESCRIPTIONS = st.tuples(
    st.sampled_from([0, 3, 31, 200, 255, 256, 257, 400, 512]), st.integers(1, 40), st.integers(0, 7)
)
ARRIVALS = st.lists(
    st.tuples(st.integers(0, 12), DESCRIPTIONS, st.integers(1, 12), st.one_of(st.none(), st.integers(0, 25))),
    min_size=1,
    max_size=12,
)


@pytest.mark.parametrize("model", ["qwen2", "lfm2", "qwen35"], indirect=True)
@settings(max_examples=25)
@given(
    arrivals=ARRIVALS,
    parallel=st.integers(1, 5),
    spare_pages=st.integers(0, 6),
    budget=st.builds(Budget, st.integers(5, 300), st.integers(1, 64), st.integers(1, 64)),
    draft_max=st.sampled_from([0, 1, 3, 12]),
)
def test_a_request_gets_what_it_gets_alone(
    model: Model,
    alone: Callable[[tuple[int, int, int], int], tuple[list[int], list[np.ndarray]]],
    arrivals: list[tuple[int, tuple[int, int, int], int, int | None]],
    parallel: int,
    spare_pages: int,
    budget: Budget,
    draft_max: int,
) -> None:
    """Requests arrive while others run, share prefixes, give way where pages are few, and are cancelled.

    Drafts, right ones and wrong ones, change nothing; a model with states has none.
    """
    draft_max = draft_max if model.config.state_shape[0] == 0 else 0
    answers: dict[RunningRequest, list[int]] = {}
    drafter = GuessingDrafter(lambda request: answers[request], 448)
    engine = Engine(
        model,
        context=CONTEXT,
        parallel=parallel,
        pages=4 + spare_pages,
        budget=budget,
        speculation=Speculation(drafter, draft_max) if draft_max else None,
    )
    running: list[tuple[RunningRequest, Recorder, tuple[int, int, int], int, int | None]] = []
    step = 0
    waiting = sorted(arrivals, key=lambda arrival: arrival[0])
    while waiting or engine.has_work:
        while waiting and waiting[0][0] <= step:
            _, description, count, cancelled_after = waiting.pop(0)
            recorder = Recorder()
            request = engine.submit(Request(prompt(*description), sampler=recorder, max_tokens=count))
            answers[request] = alone(description, count)[0]
            end = None if cancelled_after is None else step + cancelled_after
            running.append((request, recorder, description, count, end))
        engine.step()
        engine.check()
        step += 1
        for request, _, _, _, end in running:
            if request.sequence is not None:
                assert engine.pool.lengths[request.sequence] == request.evaluated
            if end is not None and step >= end:
                engine.cancel(request)
        assert step < 5000
    for request, recorder, description, count, _ in running:
        tokens, logits = alone(description, count)
        found = request.tokens[request.prompt_length :]
        if not request.cancelled:
            assert len(found) == count
        assert found == tokens[: len(found)]
        for ours, expected in zip(recorder.logits, logits, strict=False):
            np.testing.assert_array_equal(ours, expected)
    assert not drafter.known
    engine.clear_prefix_cache()
    engine.check()
    assert engine.pool.free_pages == 4 + spare_pages
    assert engine.pool.free_sequences == parallel


def test_only_new_tokens_are_evaluated(model: Model) -> None:
    """A second request with the same system prompt, and a chat's second turn."""
    engine = Engine(model, context=CONTEXT, parallel=2)

    def ask(tokens: list[int], count: int) -> RunningRequest:
        request = engine.submit(Request(tokens, sampler=Recorder(), max_tokens=count))
        assert len(list(engine.tokens(request))) == count
        return request

    first = ask([*COMMON[:500], 441, 442], 5)
    assert (first.cached, first.evaluated_prompt_tokens) == (0, 502)
    second = ask([*COMMON[:500], 443, 444, 445], 5)
    assert (second.cached, second.evaluated_prompt_tokens) == (500, 3)
    turn = ask([*first.tokens, 446, 447], 5)
    # The last token of an answer was never evaluated.
    assert (turn.cached, turn.evaluated_prompt_tokens) == (len(first.tokens) - 1, 3)
    engine.check()


def test_requests_that_come_together_share_what_they_have_in_common(model: Model) -> None:
    engine = Engine(model, context=CONTEXT, parallel=4)
    requests = [engine.submit(Request([*COMMON[:500], 440 + n], sampler=Recorder(), max_tokens=3)) for n in range(4)]
    while engine.step():
        engine.check()
    assert sum(request.evaluated_prompt_tokens for request in requests) == 501 + 3
    assert [len(request.tokens) for request in requests] == [504] * 4


def test_a_long_prompt_does_not_stall_answers(model: Model) -> None:
    """Every pass gives each running answer a token, however long the prompts are that arrive meanwhile."""
    engine = Engine(model, context=CONTEXT, parallel=3, budget=Budget(512, 128, 16))
    short = engine.submit(Request([1, 2, 3], sampler=Recorder(), max_tokens=40))
    engine.step()
    engine.submit(Request(COMMON[:600], sampler=Recorder(), max_tokens=1))
    for expected in range(2, 36):
        engine.step()
        assert len(short.generated) == expected


def test_giving_way_changes_nothing(model: Model) -> None:
    """Two answers that outgrow the pool: one waits, and goes on with the same bits."""
    prompts = [[*COMMON[:250], 441], [*COMMON[250:500], 442]]
    expected = [answer(model, tokens, 60) for tokens in prompts]
    engine = Engine(model, context=CONTEXT, parallel=2, pages=4)
    recorders = [Recorder(), Recorder()]
    requests = [
        engine.submit(Request(tokens, sampler=recorder, max_tokens=300))
        for tokens, recorder in zip(prompts, recorders, strict=True)
    ]
    gave_way = False
    while engine.step():
        engine.check()
        gave_way |= any(request.sequence is None and not request.ended for request in requests)
    assert gave_way
    for request, recorder, (tokens, logits) in zip(requests, recorders, expected, strict=True):
        assert request.tokens[251:311] == tokens
        for ours, alone in zip(recorder.logits[:60], logits, strict=True):
            np.testing.assert_array_equal(ours, alone)


class Failing(Recorder):
    """Fails at its k-th token: raises an error, or returns what is no token."""

    def __init__(self, call: int, what: BaseException | object) -> None:
        super().__init__()
        self._calls_left, self._what = call, what

    def sample(self, logits: np.ndarray) -> int:
        self._calls_left -= 1
        if self._calls_left:
            return super().sample(logits)
        if isinstance(self._what, BaseException):
            raise self._what
        return self._what  # type: ignore[return-value]


@pytest.mark.parametrize("call", [1, 3])
@pytest.mark.parametrize("what", [ArithmeticError("no"), KeyboardInterrupt(), -1, 448, 2**70, None, "a", 5.5])
def test_a_sampler_that_fails_ends_its_request_alone(
    model: Model,
    alone: Callable[[tuple[int, int, int], int], tuple[list[int], list[np.ndarray]]],
    call: int,
    what: object,
) -> None:
    engine, descriptions = Engine(model, context=CONTEXT, parallel=3), [(3, 5, 1), (31, 7, 2)]
    bad = engine.submit(Request([1, 2], sampler=Failing(call, what), max_tokens=6))
    others = [engine.submit(Request(prompt(*one), sampler=Recorder(), max_tokens=6)) for one in descriptions]
    interrupted = 0
    while engine.has_work:
        try:
            engine.step()
        except KeyboardInterrupt:
            interrupted += 1
    assert interrupted == isinstance(what, KeyboardInterrupt)
    assert bad.error is not None and len(bad.tokens) == 2 + call - 1
    for request, description in zip(others, descriptions, strict=True):
        assert request.tokens[request.prompt_length :] == alone(description, 6)[0]
    engine.check()


def test_no_memory_for_a_page_ends_its_request_alone(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model, context=CONTEXT, parallel=2)
    first = engine.submit(Request([1, 2, 3], sampler=Recorder(), max_tokens=8))
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr("tritgguf.runtime.kv_pool.aligned_zeros", lambda *arguments: (_ for _ in ()).throw(MemoryError))
        second = engine.submit(Request([4, 5, 6], sampler=Recorder(), max_tokens=8))
        engine.step()
        engine.step()
    assert isinstance(second.error, MemoryError)
    assert len(list(engine.tokens(first))) == 8
    engine.check()


def test_a_sampler_cannot_wait_for_its_own_engine(model: Model) -> None:
    engine = Engine(model, context=CONTEXT, parallel=2)

    class Waiting(Recorder):
        def sample(self, logits: np.ndarray) -> int:
            return next(engine.tokens(engine.submit(Request([1], sampler=Recorder(), max_tokens=1))))

    request = engine.submit(Request([1, 2], sampler=Waiting(), max_tokens=1))
    with pytest.raises(RuntimeError, match="cannot wait for the engine that calls it"):
        list(engine.tokens(request))


@pytest.mark.parametrize(
    "request_",
    [
        Request([1.5, 2]),  # type: ignore[list-item]
        Request([True, 2]),
        Request([1, 2], max_tokens=1.5),  # type: ignore[arg-type]
        Request([1, 2], max_tokens=-5),
        Request([1, 2], wanted="logits", first_output=1.0),  # type: ignore[arg-type]
    ],
)
def test_values_that_are_no_whole_numbers_are_refused_at_once(model: Model, request_: Request) -> None:
    engine = Engine(model, context=CONTEXT)
    with pytest.raises(BadRequestError, match="whole number"):
        engine.submit(request_)
    assert not engine.has_work


def test_ctrl_c_while_logits_are_computed_ends_their_request(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model, context=CONTEXT)
    request = engine.submit(Request(COMMON[:300], wanted="logits"))
    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            engine.outputs(request)
    engine.check()
    assert not engine.has_work


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_goes_on(model: Model) -> None:
    engine = Engine(model, context=CONTEXT)
    expected = engine.outputs(engine.submit(Request([1, 2, 3], wanted="logits", cache_prompt=False)))
    child = os.fork()
    if not child:  # in the child nothing but the exit code leads out
        with contextlib.suppress(BaseException):
            found = engine.outputs(engine.submit(Request([1, 2, 3], wanted="logits", cache_prompt=False)))
            os._exit(0 if np.array_equal(found, expected) else 1)
        os._exit(2)
    deadline = time.monotonic() + 300
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended[1] == 0


def test_a_pool_that_is_too_small_is_refused(model: Model) -> None:
    with pytest.raises(ValueError, match="smaller than a single request"):
        Engine(model, context=CONTEXT, pages=3)


def test_a_prompt_takes_over_what_is_kept_and_may_keep_nothing_itself(model: Model) -> None:
    engine = Engine(model, context=CONTEXT)
    engine.outputs(engine.submit(Request(COMMON[:300], wanted="logits", first_output=299)))
    free = engine.pool.free_pages
    for keep, cached in ((False, 300), (False, 300), (True, 300), (True, 320)):
        request = engine.submit(Request(COMMON[:330], wanted="logits", first_output=320, keep_prompt=keep))
        engine.outputs(request)
        assert request.cached == cached
        assert keep or engine.pool.free_pages == free
    engine.check()
