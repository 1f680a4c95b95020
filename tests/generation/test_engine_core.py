"""Requests that have to give way, where that is easy to get wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scripted_model import END, ScriptedModel
from sequences import open_sequence

from tritgguf.formats.gguf_file import GgufFile
from tritgguf.generation.engine import Engine
from tritgguf.generation.request import Request, RunningRequest
from tritgguf.generation.sampling import Sampler, SamplingOptions

Files = Callable[..., GgufFile]


def greedy() -> Sampler:
    return Sampler(SamplingOptions(temperature=0))


def test_logits_of_a_request_that_had_to_give_way_come_once(tiny_trit_file: Files) -> None:
    sequence = open_sequence(tiny_trit_file(), context=512)
    generator = np.random.default_rng(0)
    prompt, other = generator.integers(3, 440, 250).tolist(), generator.integers(3, 440, 500).tolist()
    expected = sequence.forward(other, all_logits=True, generated=False)
    engine = Engine(sequence.model, context=512, parallel=2, pages=3)
    answer = engine.submit(Request(prompt, greedy(), max_tokens=30))
    logits = engine.submit(Request(other, wanted="logits"))
    half_way = 0
    while engine.step():
        half_way = max(half_way, logits.evaluated) if not answer.ended else half_way
    assert 250 < half_way < 500
    assert logits.evaluated_prompt_tokens > 500  # it did give way
    np.testing.assert_array_equal(engine.outputs(logits), expected)
    assert len(list(engine.tokens(answer))) == 30
    engine.check()


def test_a_short_request_has_its_first_token_in_three_passes_while_long_prompts_are_read() -> None:
    model: Any = ScriptedModel([40] * 400)
    engine = Engine(model, context=2100, parallel=6)
    answer = engine.submit(Request([3], greedy(), max_tokens=200))  # passes beside it take 48 tokens of prompts
    long_ones = [engine.submit(Request([place] * 2000, greedy(), max_tokens=2)) for place in (4, 5)]
    for _ in range(4):
        engine.step()
    for arrival in range(3):
        short = engine.submit(Request([6 + arrival] * 100, greedy(), max_tokens=2))
        passes = 0
        while not short.generated:
            engine.step()
            passes += 1
        assert passes <= 3
    assert not answer.ended and all(request.is_prompt for request in long_ones)


def test_the_only_request_gives_way_to_pages_of_the_cache_that_equal_its_own() -> None:
    """It holds copies of two pages that the cache holds too, and a third one with it: the cache cannot let go of any.

    It comes to that when two requests have computed the same text side by side.
    """
    model: Any = ScriptedModel([40, END])
    engine = Engine(model, context=1024, parallel=4, pages=5)
    pool, core, tokens = engine.pool, engine._core, [7] * 769
    request = RunningRequest(Request(tokens, greedy(), max_tokens=1), list(tokens), evaluated=768)
    first, second = pool.allocate(), pool.allocate()
    for sequence, length in ((first, 512), (second, 768)):
        pool.reserve(sequence, length)
        pool.advance(sequence, length)
    request.sequence = pool.allocate(pool.pages(second), 768)
    core.prefix_cache.insert(tokens[:512], pool.pages(first))
    core.prefix_cache.insert(tokens[:768], pool.pages(second))
    pool.free(first)
    pool.free(second)
    core.running.append(request)
    engine.check()
    assert pool.free_pages == 0
    assert list(engine.tokens(request)) == [40]
    engine.check()


def test_an_error_of_the_model_ends_the_requests_of_its_pass_alone() -> None:
    class FailingModel(ScriptedModel):
        def forward(self, *arguments: Any) -> None:
            if len(self.calls) == 2:
                self.calls.append([])
                raise RuntimeError("the model fails")
            super().forward(*arguments)

    model: Any = FailingModel([40] * 20)
    engine = Engine(model, context=64, parallel=2)
    failing = [engine.submit(Request([5, place], greedy())) for place in range(2)]
    later = engine.submit(Request([6], greedy(), max_tokens=3))
    for request in failing:
        found: list[int] = []
        try:
            for token in engine.tokens(request):
                found.append(token)
        except RuntimeError as error:
            assert str(error) == "the model fails"
        else:
            raise AssertionError("the error is lost")
        assert found == [40, 40]
    assert list(engine.tokens(later)) == [40] * 3
    engine.check()
    assert not engine.has_work
