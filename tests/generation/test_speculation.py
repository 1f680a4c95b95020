"""Speculative decoding changes how many passes an answer takes, and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from guessing_drafter import GuessingDrafter
from hypothesis import given
from hypothesis import strategies as st
from scripted_model import END, ScriptedModel

from tritgguf.formats.gguf_file import GgufFile
from tritgguf.generation.engine import Engine
from tritgguf.generation.lookup import Lookup
from tritgguf.generation.request import Request, RunningRequest
from tritgguf.generation.sampling import Sampler, SamplingOptions
from tritgguf.generation.speculation import Speculation, draft_lengths
from tritgguf.runtime.kv_pool import KVPool
from tritgguf.runtime.model import Model
from tritgguf.runtime.token_batch import TokenBatch

VOCABULARY = 448
PROMPT = [5, 6, 7, 8, 9, 5, 6, 7]


@pytest.fixture(scope="module")
def model(tiny_trit_file: Callable[..., GgufFile]) -> Model:
    return Model(tiny_trit_file("qwen2", 2), threads=2)


def engine_of(model: Model, answer: Sequence[int] | None, *, draft_max: int = 8, seed: int = 0) -> Engine:
    """Return an engine that guesses an answer; None: without speculation."""
    if answer is None:
        return Engine(model, context=640, parallel=4)
    drafter = GuessingDrafter(lambda request: answer, VOCABULARY, seed)
    return Engine(model, context=640, parallel=4, speculation=Speculation(drafter, draft_max))


def run(engine: Engine, request: Request) -> RunningRequest:
    """Run a request to its end."""
    running = engine.submit(request)
    while not running.ended:
        engine.step()
        engine.check()
    return running


SAMPLING = {
    "greedy": SamplingOptions(temperature=0),
    "sampled": SamplingOptions(temperature=1.5, top_k=0, top_p=1, min_p=0, seed=5),
    "defaults": SamplingOptions(seed=9),
    "penalties": SamplingOptions(seed=3, repeat_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.5),
}


@pytest.mark.parametrize("options", SAMPLING.values(), ids=list(SAMPLING))
@pytest.mark.parametrize("seed", range(3))
def test_tokens_log_probabilities_and_random_numbers_stay_the_same(
    model: Model, options: SamplingOptions, seed: int
) -> None:
    samplers = [Sampler(options, top_logprobs=2) for _ in range(2)]
    plain = run(engine_of(model, None), Request(PROMPT, samplers[0], max_tokens=60))
    answer = plain.tokens[len(PROMPT) :]
    engine = engine_of(model, answer, seed=seed)
    ours = run(engine, Request(PROMPT, samplers[1], max_tokens=60))
    assert ours.tokens == plain.tokens and ours.finish_reason == plain.finish_reason
    assert samplers[1].logprobs == samplers[0].logprobs
    assert samplers[1].sample(np.ones(VOCABULARY, np.float32)) == samplers[0].sample(np.ones(VOCABULARY, np.float32))
    assert (ours.evaluated, ours.decoded_tokens) == (plain.evaluated, plain.decoded_tokens)
    assert 0 < ours.accepted_tokens < ours.drafted_tokens


class EveryThird:
    """A constraint: the n-th token of an answer is one of those that leave n mod 3."""

    def __init__(self) -> None:
        self._count = 0

    def mask(self) -> np.ndarray:
        return np.where(np.arange(VOCABULARY) % 3 == self._count % 3, np.float32(0), np.float32(-np.inf))

    def accept(self, token: int) -> None:
        assert self.mask()[token] == 0
        self._count += 1


@pytest.mark.parametrize("right", [True, False])
def test_a_constraint_sees_the_tokens_of_the_answer_alone(model: Model, right: bool) -> None:
    """Whether or not the draft keeps to it."""
    samplers = [Sampler(SamplingOptions(seed=8), constraint=EveryThird()) for _ in range(2)]
    plain = run(engine_of(model, None), Request(PROMPT, samplers[0], max_tokens=40))
    answer = plain.tokens[len(PROMPT) :]
    engine = engine_of(model, answer if right else [token + 1 for token in answer])
    ours = run(engine, Request(PROMPT, samplers[1], max_tokens=40))
    assert ours.tokens == plain.tokens
    assert [token % 3 for token in answer[:6]] == [0, 1, 2, 0, 1, 2]
    assert ours.drafted_tokens > 0 and (ours.accepted_tokens > 0) == right


class MarkovModel(ScriptedModel):
    """The next token depends on the last one alone; only tokens 0 to 5 come."""

    def __init__(self) -> None:
        super().__init__([])
        self.table = np.full((VOCABULARY, VOCABULARY), -np.inf, np.float32)
        self.table[:, :6] = np.random.default_rng(1).normal(0, 1, (VOCABULARY, 6))

    def forward(self, batch: TokenBatch, kv: KVPool, logits: Any, hidden: Any = None) -> None:
        assert kv.writable(batch.sequences, batch.positions)
        if logits is not None:
            logits[:] = self.table[batch.tokens[batch.outputs]]

    def probabilities(self, token: int) -> np.ndarray:
        """Return those of the next token, float64 [6]."""
        weights: np.ndarray = np.exp(self.table[token, :6].astype(np.float64))
        return weights / weights.sum()


def test_sampled_tokens_have_the_probabilities_of_the_model() -> None:
    """Chi-squared test of the second to fourth token, of which a draft has the likeliest ones, or others."""
    model: Any = MarkovModel()
    drafts, draws, counts = [[0, 0, 0, 0], [3, 2, 1, 0], [5, 5, 5, 5]], 6000, Counter[tuple[int, ...]]()
    engines, accepted, drafted = [engine_of(model, draft) for draft in drafts], 0, 0
    for seed in range(draws):
        engine = engines[seed % len(engines)]
        sampler = Sampler(SamplingOptions(temperature=1, top_k=0, top_p=1, min_p=0, seed=seed))
        request = engine.submit(Request([5], sampler, max_tokens=4, cache_prompt=False))
        counts[tuple(engine.tokens(request))[1:]] += 1
        accepted, drafted = accepted + request.accepted_tokens, drafted + request.drafted_tokens
    assert 0.05 < accepted / drafted < 0.5
    first = model.probabilities(5)
    pairs = np.array([model.probabilities(token) for token in range(6)])
    expected = draws * np.einsum("a,ab,bc,cd->bcd", first, pairs, pairs, pairs)
    found = np.array([[[counts[b, c, d] for d in range(6)] for c in range(6)] for b in range(6)])
    assert found.sum() == draws
    statistic, freedom = float(((found - expected) ** 2 / expected).sum()), expected.size - 1
    assert statistic < freedom + 4 * np.sqrt(2 * freedom)


def test_a_stop_token_inside_a_draft_ends_the_answer() -> None:
    model: Any = ScriptedModel([40, 41, 42, END, 43, 44])
    engine = engine_of(model, [40, 41, 42, END, 43, 44])
    request = run(engine, Request([5], greedy(), stop_tokens=frozenset([END])))
    assert (request.tokens[1:], request.finish_reason) == ([40, 41, 42], "stop")


class Always(GuessingDrafter):
    """Guesses as many tokens as it may, all of them right."""

    def expect(self, requests: Sequence[RunningRequest], most: Sequence[int]) -> list[list[float]]:
        return [[1.0] * count for count in most]

    def draft(self, requests: Sequence[RunningRequest], lengths: Sequence[int]) -> list[list[int]]:
        first = [len(request.tokens) - request.prompt_length for request in requests]
        answers = [self._answer(request) for request in requests]
        return [
            list(answer[start : start + length]) for answer, start, length in zip(answers, first, lengths, strict=True)
        ]


def eager(model: Any, answer: Sequence[int], context: int = 64, draft_max: int = 7) -> Engine:
    drafter = Always(lambda request: answer, VOCABULARY)
    return Engine(model, context=context, parallel=2, speculation=Speculation(drafter, draft_max))


def test_eight_tokens_come_in_one_pass() -> None:
    script = list(range(40, 60))
    model: Any = ScriptedModel(script)
    request = run(eager(model, script), Request([5], greedy(), max_tokens=17))
    assert request.tokens[1:] == script[:17] and request.finish_reason == "length"
    assert model.calls == [[5], script[:8], script[8:16]]
    assert (request.drafted_tokens, request.accepted_tokens, request.decoded_tokens) == (14, 14, 16)


def test_nothing_is_drafted_beyond_the_largest_number_of_tokens_or_the_context() -> None:
    script = list(range(40, 60))
    model: Any = ScriptedModel(script)
    run(eager(model, script), Request([5], greedy(), max_tokens=5))
    assert model.calls == [[5], script[:4]]  # the fifth token is not evaluated
    model = ScriptedModel(script)
    request = run(eager(model, script, context=12), Request([5, 6, 7], greedy()))
    assert request.tokens[3:] == script[:10] and request.finish_reason == "context"
    assert model.calls == [[5, 6, 7], script[:8], script[8:9]]


def test_rejected_tokens_leave_no_pages_and_no_prefix() -> None:
    wrong, script = [400] * 300, [40 + place % 7 for place in range(300)]
    model: Any = ScriptedModel(script)
    engine = eager(model, wrong, context=512)
    request = engine.submit(Request([5] * 254, greedy(), max_tokens=9))
    for evaluated in (254, 255, 256):  # drafts reach into the second page
        engine.step()
        engine.check()
        assert request.evaluated == engine.pool.lengths[0] == evaluated
        assert (engine.pool.references > 0).sum() == 1
    assert [len(call) for call in model.calls] == [254, 8, 7] and request.accepted_tokens == 0
    engine.cancel(request)
    for tokens, cached in (([5] * 254 + [40, 400, 400], 255), ([5] * 254 + [40, 41, 400], 256)):
        follower = run(engine, Request(tokens, greedy(), max_tokens=1))
        assert follower.cached == cached


def test_a_draft_takes_no_page_from_another_request() -> None:
    """Two requests fill the pool but for a page: the draft that would need it is left out, none gives way."""
    script = [40] * 400
    model: Any = ScriptedModel(script)
    drafter = Always(lambda request: script, VOCABULARY)
    engine = Engine(model, context=512, parallel=2, pages=3, speculation=Speculation(drafter, 7))
    requests = [engine.submit(Request([seed] * 250, greedy(), max_tokens=5)) for seed in (5, 6)]
    while engine.step():
        engine.check()
    assert all(request.tokens[250:] == [40] * 5 for request in requests)
    assert [request.evaluated_prompt_tokens for request in requests] == [250, 250]


def test_an_error_of_the_drafter_ends_the_requests_that_generate() -> None:
    class Failing(Always):
        def draft(self, requests: Sequence[RunningRequest], lengths: Sequence[int]) -> list[list[int]]:
            raise MemoryError

    model: Any = ScriptedModel([40] * 20)
    engine = Engine(model, context=64, parallel=2, speculation=Speculation(Failing(lambda request: [], VOCABULARY), 4))
    request = engine.submit(Request([5], greedy(), max_tokens=5))
    with pytest.raises(MemoryError):
        list(engine.tokens(request))
    engine.check()
    assert not engine.has_work


def test_lookup_saves_passes_of_a_text_that_repeats_itself() -> None:
    script = [100 + place % 30 for place in range(200)]
    model: Any = ScriptedModel(script)
    engine = Engine(model, context=512, parallel=1, speculation=Speculation(Lookup()))
    request = run(engine, Request([5], greedy(), max_tokens=200))
    assert request.tokens[1:] == script
    assert len(model.calls) < 60
    assert request.accepted_tokens > 0.9 * request.drafted_tokens > 100


def greedy() -> Sampler:
    return Sampler(SamplingOptions(temperature=0))


def test_drafts_are_as_long_as_they_save_time() -> None:
    assert draft_lengths([[0.5, 0.2]], 1, 0.0) == [0]
    assert draft_lengths([[0.95**place for place in range(1, 17)]], 1, 0.0)[0] in range(5, 12)
    assert draft_lengths([[1.0] * 16], 1, 0.0) == [15]
    assert draft_lengths([[1.0] * 16], 1, 10.0) == [0]  # drafting takes longer than decoding
    assert draft_lengths([[], [0.9, 0.8, 0.7]], 5, 0.0)[0] == 0


@given(
    expected=st.lists(st.lists(st.floats(0, 1), max_size=16), max_size=8),
    others=st.integers(0, 30),
    step_cost=st.floats(0, 1),
)
def test_drafts_stay_within_what_is_offered(expected: list[list[float]], others: int, step_cost: float) -> None:
    expected = [sorted(probabilities, reverse=True) for probabilities in expected]
    generated = len(expected) + others
    if not generated:
        return
    lengths = draft_lengths(expected, generated, step_cost)
    assert all(0 <= length <= len(offered) for length, offered in zip(lengths, expected, strict=True))
    assert not any(lengths) or generated + sum(lengths) <= 64
