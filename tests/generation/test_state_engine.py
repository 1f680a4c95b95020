"""An engine of a model with states: what requests take over, where copies are made, and how many are kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tritgguf.errors import BadRequestError
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.generation.engine import Engine
from tritgguf.generation.loaded_model import load
from tritgguf.generation.request import Request, RunningRequest
from tritgguf.generation.sampling import Sampler, SamplingOptions
from tritgguf.generation.scheduler import Budget
from tritgguf.runtime.kv_pool import KVPool
from tritgguf.runtime.model import Model

CONTEXT = 1024
TEXT = np.random.default_rng(3).integers(3, 440, 900).tolist()


class FewCopies(Model):
    """A model whose pools keep so many copies of states."""

    copies = 3

    def new_kv_pool(
        self, *, context: int, sequences: int = 1, pages: int | None = None, cache_type: str | None = None
    ) -> KVPool:
        pages = pages or sequences * (context // 256 + 2)
        return KVPool(self.config, pages=pages, sequences=sequences, context=context, copies=self.copies)


@pytest.fixture(scope="module")
def model(tiny_qwen35_file: GgufFile) -> Model:
    return Model(tiny_qwen35_file, threads=2)


@pytest.fixture(scope="module")
def frugal(tiny_qwen35_file: GgufFile) -> FewCopies:
    return FewCopies(tiny_qwen35_file, threads=2)


def greedy() -> Sampler:
    return Sampler(SamplingOptions(temperature=0))


def run(engine: Engine, tokens: Sequence[int], count: int = 4) -> RunningRequest:
    """Run a request to its end."""
    request = engine.submit(Request(list(tokens), greedy(), max_tokens=count))
    assert len(list(engine.tokens(request))) == count
    engine.check()
    return request


def test_the_next_turn_of_a_chat(model: Model) -> None:
    """It goes on after all that was evaluated; with another answer before it, after all but the prompt's end."""
    engine = Engine(model, context=CONTEXT, parallel=2)
    first = run(engine, TEXT[:500])
    assert run(engine, [*first.tokens, 441, 442]).cached == len(first.tokens) - 1
    other = [*TEXT[:500], 443, 444]
    second = run(engine, other)
    assert second.cached == 492
    assert second.tokens == run(Engine(model, context=CONTEXT), other).tokens


def test_what_many_texts_begin_with(model: Model) -> None:
    """The second text that begins alike shows where to copy the state; the third one goes on from there."""
    engine = Engine(model, context=CONTEXT, parallel=1)
    texts = [[*TEXT[:300], *[440 + number] * 100] for number in range(3)]
    assert [run(engine, text).cached for text in texts] == [0, 0, 300]
    assert run(engine, texts[2][:350]).cached == 300


def test_texts_beside_one_another(model: Model) -> None:
    """One waits for the other to come to the end of what they have in common."""
    engine = Engine(model, context=CONTEXT, parallel=3)
    requests = [
        engine.submit(Request([*TEXT[:300], *[441 + place] * 100], greedy(), max_tokens=3)) for place in range(3)
    ]
    for request in requests:
        assert len(list(engine.tokens(request))) == 3
    engine.check()
    assert [request.cached for request in requests] == [0, 300, 300]


def test_short_texts_are_not_worth_a_copy_before_their_end(model: Model) -> None:
    engine = Engine(model, context=CONTEXT, parallel=1)
    first = run(engine, TEXT[:60])
    assert run(engine, [*TEXT[:60], 441]).cached == 0
    assert run(engine, [*first.tokens, 441]).cached == len(first.tokens) - 1


def test_logits_go_on_from_prompts_alone(model: Model) -> None:
    """A state after generated tokens is none that a prompt would have given."""
    engine, other = (Engine(model, context=CONTEXT, parallel=1) for _ in range(2))
    tokens = run(engine, TEXT[:100], 140).tokens[:235]
    found, alone = (one.submit(Request(tokens, wanted="logits", first_output=200)) for one in (engine, other))
    np.testing.assert_array_equal(engine.outputs(found), other.outputs(alone))
    assert found.cached == 92
    again = other.submit(Request([*tokens, 7], wanted="logits", first_output=210))
    assert other.outputs(again).shape == (26, 448)
    assert again.cached == 200


def test_a_cancelled_request_leaves_what_it_has(model: Model) -> None:
    engine = Engine(model, context=CONTEXT, parallel=1, budget=Budget(100, 64, 32))
    request = engine.submit(Request(TEXT[:500], greedy(), max_tokens=3))
    for _ in range(3):
        engine.step()
    engine.cancel(request)
    engine.check()
    assert run(engine, TEXT[:400]).cached == 300


def test_copies_are_few_and_the_least_recently_used_go(frugal: FewCopies) -> None:
    engine = Engine(frugal, context=CONTEXT, parallel=1)
    for number in range(6):
        run(engine, [440 + number, *TEXT[:150]])
        assert len(engine._core.held_states()) <= frugal.copies
    assert run(engine, [445, *TEXT[:150], 7]).cached == 143
    assert run(engine, [440, *TEXT[:150], 7]).cached == 0
    engine.clear_prefix_cache()
    engine.check()
    assert engine.pool.states is not None and engine.pool.states.copies_left == frugal.copies


REQUESTS = st.lists(
    st.tuples(
        st.integers(0, 8), st.sampled_from([0, 70, 128, 256, 300]), st.integers(1, 90), st.integers(0, 3),
        st.integers(1, 6), st.one_of(st.none(), st.integers(0, 12)), st.booleans(),
    ),
    min_size=1, max_size=10,
)  # fmt: skip


@settings(max_examples=25)
@given(arrivals=REQUESTS, parallel=st.integers(1, 3), budget=st.builds(Budget, st.integers(20, 200)))
def test_any_requests_with_few_copies(
    frugal: FewCopies, arrivals: list[tuple[int, int, int, int, int, int | None, bool]], parallel: int, budget: Budget
) -> None:
    """Chats, logits and cancelled requests in any order: results are those of a request alone, and nothing leaks."""
    engine, running, step = Engine(frugal, context=CONTEXT, parallel=parallel, budget=budget), [], 0
    waiting = sorted(arrivals, key=lambda arrival: arrival[0])
    while waiting or engine.has_work:
        while waiting and waiting[0][0] <= step:
            _, shared, own, seed, count, end, scores = waiting.pop(0)
            tokens = [*TEXT[:shared], *(440 + seed if place == 0 else TEXT[-place - seed] for place in range(own))]
            request = Request(tokens, greedy(), count)
            if scores:
                request = Request(tokens, wanted="logits", first_output=len(tokens) // 2)
            running.append((engine.submit(request), None if end is None else step + end))
        engine.step()
        engine.check()
        step += 1
        for submitted, last in running:
            if last is not None and step >= last:
                engine.cancel(submitted)
        assert step < 3000
    for submitted, _ in running:
        if submitted.cancelled:
            continue
        alone = Engine(frugal, context=CONTEXT, parallel=1)
        expected = alone.submit(submitted.request)
        while alone.step():
            pass
        if submitted.outputs is None:
            assert submitted.tokens == expected.tokens
        else:
            np.testing.assert_array_equal(submitted.outputs, expected.outputs)
    engine.clear_prefix_cache()
    engine.check()
    assert engine.pool.states is not None and engine.pool.states.copies_left == frugal.copies


@pytest.mark.parametrize("guess", ["lookup", "draft"])
def test_guessed_tokens_could_not_be_taken_back(tiny_qwen35_file: GgufFile, guess: str) -> None:
    path = tiny_qwen35_file.path
    with pytest.raises(BadRequestError, match=r"a model with states .* cannot take guessed tokens back; leave out"):
        if guess == "lookup":
            load(path, context=CONTEXT, lookup=True)
        else:
            load(path, context=CONTEXT, draft=path)
