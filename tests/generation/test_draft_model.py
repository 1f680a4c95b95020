"""Drafts of a second model: they follow the requests, and change nothing but the number of passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tritgguf
from tritgguf.errors import BadRequestError, TritGgufError
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.generation.draft_model import DraftModel
from tritgguf.generation.engine import Engine
from tritgguf.generation.request import Request, RunningRequest
from tritgguf.generation.sampling import Sampler, SamplingOptions
from tritgguf.generation.speculation import Speculation
from tritgguf.runtime.model import Model
from tritgguf.runtime.single_sequence import SingleSequence

CONTEXT = 640
PROMPT = np.random.default_rng(3).integers(0, 440, 520).tolist()


@pytest.fixture(scope="module")
def models(tiny_trit_file: Callable[..., GgufFile]) -> tuple[Model, Model]:
    """A model and the same with fewer trits, which often guesses right."""
    return Model(tiny_trit_file("qwen2", 3), threads=2), Model(tiny_trit_file("qwen2", 2), threads=2)


class Willing(DraftModel):
    """Drafts where it can, whether or not it is worth it."""

    def expect(self, requests: Sequence[RunningRequest], most: Sequence[int]) -> list[list[float]]:
        return [[1.0] * len(expected) for expected in super().expect(requests, most)]


def willing(draft: Model, sequences: int = 4, pages: int | None = None) -> Willing:
    pool = draft.new_kv_pool(context=CONTEXT, sequences=sequences, pages=pages)
    return Willing(draft, pool, vocabulary=448, step_cost=0.0)


def run(engine: Engine, drafter: DraftModel | None, prompts: list[list[int]], count: int, seed: int) -> list[list[int]]:
    """Return the answers to prompts that come together, greedy and sampled ones in turns."""
    requests = []
    for place, prompt in enumerate(prompts):
        options = SamplingOptions(temperature=0) if place % 2 else SamplingOptions(seed=seed + place, top_k=3)
        requests.append(engine.submit(Request(prompt, Sampler(options), max_tokens=count)))
    while engine.step():
        engine.check()
        if drafter is not None:
            drafter.check()
    return [request.tokens[request.prompt_length :] for request in requests]


@pytest.mark.parametrize("pages", [12, 2])
def test_drafts_are_the_likeliest_continuations_of_the_text(
    tiny_trit_file: Callable[..., GgufFile], pages: int
) -> None:
    """The keys and values of the draft model follow what was accepted and what was not."""
    exact = Model(tiny_trit_file("qwen2", 2), threads=2, exact=True)  # prompts and generated tokens are computed alike
    drafts = list[tuple[list[int], list[int]]]()

    class Checked(Willing):
        def draft(self, requests: Sequence[RunningRequest], lengths: Sequence[int]) -> list[list[int]]:
            found = super().draft(requests, lengths)
            drafts.extend((list(request.tokens), list(draft)) for request, draft in zip(requests, found, strict=True))
            return found

    pool = exact.new_kv_pool(context=CONTEXT, sequences=3, pages=pages)
    drafter = Checked(exact, pool, vocabulary=448, step_cost=0.0)
    engine = Engine(
        Model(tiny_trit_file("qwen2", 3), threads=2), context=CONTEXT, parallel=3, speculation=Speculation(drafter, 5)
    )
    run(engine, drafter, [PROMPT[:250], PROMPT[:40], PROMPT[9:12]], 14, 0)
    sequence = SingleSequence(exact, CONTEXT)
    compared = 0
    for tokens, draft in drafts:
        sequence.truncate(0)
        logits = sequence.forward(tokens)
        for token in draft:
            assert token == logits.argmax()
            logits = sequence.forward([token])
            compared += 1
    assert compared > 30


def test_long_prompts_are_read_in_several_passes(models: tuple[Model, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tritgguf.generation.draft_model._TOKENS_AT_ONCE", 100)
    drafter = willing(models[1])
    engine = Engine(models[0], context=CONTEXT, parallel=2, speculation=Speculation(drafter, 4))
    request = engine.submit(Request(PROMPT[:350], Sampler(SamplingOptions(temperature=0)), max_tokens=12))
    drafted = []
    while engine.step():
        drafted.append(request.drafted_tokens)
    assert drafted[:4] == [0, 0, 0, 0] and drafted[4] == 4  # the prompt, three times 100 tokens, the rest


def test_bad_drafts_are_given_up_and_tried_again(models: tuple[Model, Model]) -> None:
    class Wrong(DraftModel):
        def draft(self, requests: Sequence[RunningRequest], lengths: Sequence[int]) -> list[list[int]]:
            super().draft(requests, lengths)
            for request in requests:
                follower = self._followers[request]
                follower.draft = [447 for _ in follower.draft]
            return [list(self._followers[request].draft) for request in requests]

    pool = models[1].new_kv_pool(context=CONTEXT, sequences=1)
    drafter = Wrong(models[1], pool, vocabulary=448, step_cost=0.1)
    engine = Engine(models[0], context=CONTEXT, parallel=1, speculation=Speculation(drafter, 8))
    request = engine.submit(Request(PROMPT[:9], Sampler(SamplingOptions(temperature=0)), max_tokens=500))
    passes = []
    while engine.step():
        passes.append(request.drafted_tokens)
    tried = np.diff(passes).nonzero()[0]
    assert request.accepted_tokens < 0.1 * request.drafted_tokens
    assert 3 <= len(tried) <= 8 and tried[-1] > 200


def test_a_chat_goes_on_without_reading_it_again(models: tuple[Model, Model]) -> None:
    drafter = willing(models[1])
    engine = Engine(models[0], context=CONTEXT, parallel=2, speculation=Speculation(drafter, 4))
    read = list[int]()
    evaluate = drafter._evaluate

    def counted(chunks: Any, generated: bool) -> None:
        read.extend(len(tokens) for _, tokens in chunks)
        evaluate(chunks, generated)

    drafter._evaluate = counted  # type: ignore[method-assign]
    first = engine.submit(Request(PROMPT[:300], Sampler(SamplingOptions(temperature=0)), max_tokens=10))
    answer = list(engine.tokens(first))
    assert max(read) > 290
    read.clear()
    second = engine.submit(
        Request([*PROMPT[:300], *answer, *PROMPT[300:320]], Sampler(SamplingOptions(temperature=0)), max_tokens=10)
    )
    list(engine.tokens(second))
    assert 20 <= max(read) < 40


def test_tokens_that_the_draft_model_does_not_have(models: tuple[Model, Model]) -> None:
    """They fill up the other model's vocabulary; a text with one has no drafts."""
    drafter = willing(models[1])
    drafter._model = mock.Mock(wraps=models[1], config=mock.Mock(vocab_size=440, context_length=CONTEXT))
    engine = Engine(models[0], context=CONTEXT, parallel=1, speculation=Speculation(drafter, 4))
    request = engine.submit(Request([5, 6, 444, 7], Sampler(SamplingOptions(temperature=0)), max_tokens=5))
    assert len(list(engine.tokens(request))) == 5
    assert request.drafted_tokens == 0


def test_loading(tiny_trit_file: Callable[..., GgufFile]) -> None:
    path, draft = tiny_trit_file("qwen2", 3).path, tiny_trit_file("qwen2", 2).path
    model = tritgguf.load(path, context=300, draft=draft, draft_max=3)
    plain = tritgguf.load(path, context=300)
    prompts = ["Name three colors.", "The dog", "Count: 1 2 3"]
    options: Any = {"max_tokens": 20, "seed": 4, "raw": True}
    answers, expected = tritgguf.generate(model, prompts, **options), tritgguf.generate(plain, prompts, **options)
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]


def test_impossible_options_are_one_line(tiny_trit_file: Callable[..., GgufFile]) -> None:
    path = tiny_trit_file("qwen2", 3).path
    with pytest.raises(BadRequestError, match=r"llama-1\.gguf has another vocabulary than .*, from token \d+ on"):
        tritgguf.load(path, draft=tiny_trit_file("llama", 1).path)
    with pytest.raises(BadRequestError, match="not by both"):
        tritgguf.load(path, draft=path, lookup=True)
    with pytest.raises(BadRequestError, match="must be 1 or more, not 0"):
        tritgguf.load(path, lookup=True, draft_max=0)
    with pytest.raises(TritGgufError, match=r"none\.gguf"):
        tritgguf.load(path, draft=path.with_name("none.gguf"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft_max": 0}, "must be 1 or more, not 0"),
        ({"lookup": True}, "not by both"),
        ({"cache_type": "q9"}, "a cache cannot hold q9"),
        ({"context": 1 << 50}, "needs .* bytes of memory"),
        ({"prefill_bits": 7}, "7"),
    ],
)
def test_options_are_checked_before_a_draft_is_fetched(
    tiny_trit_file: Callable[..., GgufFile], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    def fetch(*arguments: Any) -> None:
        raise AssertionError("this must not be reached")

    monkeypatch.setattr("tritgguf.generation.loaded_model._draft_file", fetch)
    with pytest.raises(BadRequestError, match=message):
        tritgguf.load(tiny_trit_file("qwen2", 3).path, draft="org/draft:d1", **options)


def test_a_model_that_drafts_for_itself_is_always_right(models: tuple[Model, Model]) -> None:
    drafter = willing(models[0])
    engine = Engine(models[0], context=CONTEXT, speculation=Speculation(drafter, 6))
    request = engine.submit(Request(PROMPT[:9], Sampler(SamplingOptions(temperature=0)), max_tokens=60))
    answer = list(engine.tokens(request))
    plain = Engine(models[0], context=CONTEXT)
    assert answer == list(plain.tokens(plain.submit(Request(PROMPT[:9], request.request.sampler, max_tokens=60))))
    # Prompts of few tokens are read as generated tokens: the same bits.
    assert request.accepted_tokens >= 0.9 * request.drafted_tokens > 40


@settings(max_examples=12)
@given(
    lengths=st.lists(st.integers(1, 520), min_size=1, max_size=6),
    count=st.integers(1, 40),
    draft_max=st.integers(1, 9),
    pages=st.integers(4, 10),
    draft_pages=st.integers(1, 8),
    seed=st.integers(0, 100),
)
def test_answers_stay_the_same_where_pages_are_few_on_either_side(
    models: tuple[Model, Model],
    lengths: list[int],
    count: int,
    draft_max: int,
    pages: int,
    draft_pages: int,
    seed: int,
) -> None:
    prompts = [PROMPT[-length:] if length % 2 else PROMPT[:length] for length in lengths]
    expected = run(Engine(models[0], context=CONTEXT, parallel=1), None, prompts, count, seed)
    drafter = willing(models[1], 3, draft_pages)
    engine = Engine(models[0], context=CONTEXT, parallel=3, pages=pages, speculation=Speculation(drafter, draft_max))
    assert run(engine, drafter, prompts, count, seed) == expected
    assert not drafter._followers
    drafter._prefixes.clear()
    drafter.check()
    assert drafter._pool.free_pages == draft_pages
