"""The plan of a forward pass: budgets, prompts beside answers, order, and which tokens have outputs."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tritgguf.generation.request import Request, RunningRequest
from tritgguf.generation.scheduler import Budget, plan

BUDGET = Budget(tokens=100, outputs=30, prompt_tokens_beside_answers=12)


def running(prompt: int, evaluated: int = 0, generated: int = 0, **options: Any) -> RunningRequest:
    """Return a request of so many tokens of prompt and answer, of which some are evaluated."""
    request = Request(list(range(prompt)), **options)
    return RunningRequest(request, list(range(prompt + generated)), evaluated)


def answering(prompt: int = 5, generated: int = 3) -> RunningRequest:
    """Return a request whose last generated token is to be evaluated."""
    return running(prompt, prompt + generated - 1, generated)


def planned(requests: list[RunningRequest], budget: Budget = BUDGET) -> list[tuple[int, int, bool, int]]:
    """Return for each chunk: its request's place, its tokens, whether they are a prompt's, and outputs."""
    return [
        (requests.index(chunk.request), chunk.tokens, chunk.is_prompt, chunk.outputs)
        for chunk in plan(requests, budget)
    ]


def test_nothing_to_do() -> None:
    assert plan([], BUDGET) == []


def test_a_prompt_goes_in_parts_and_the_last_token_has_an_output() -> None:
    assert planned([running(250)]) == [(0, 100, True, 0)]
    assert planned([running(250, 200)]) == [(0, 50, True, 1)]


def test_the_oldest_prompt_has_its_share_and_the_others_go_shortest_first() -> None:
    assert planned([running(60), running(70), running(5)]) == [(0, 60, True, 1), (1, 35, True, 0), (2, 5, True, 1)]
    assert planned([running(300), running(70), running(50)]) == [(0, 25, True, 0), (1, 25, True, 0), (2, 50, True, 1)]
    assert planned([running(300), running(70), running(70)]) == [(0, 25, True, 0), (1, 70, True, 1), (2, 5, True, 0)]
    assert planned([running(10), running(300), running(200)]) == [(0, 10, True, 1), (2, 90, True, 0)]


def passes_until_read(requests: list[RunningRequest], budget: Budget, late: RunningRequest | None = None) -> list[int]:
    """Return how many passes each request of a list takes until its prompt is read; `late` comes anew all the time."""
    passes = dict.fromkeys(requests, 0)
    count = 0
    while any(request.is_prompt for request in requests):
        count += 1
        others = [running(late.prompt_length)] if late is not None else []
        for chunk in plan(requests + others, budget):
            if chunk.is_prompt:
                chunk.request.evaluated += chunk.tokens
                passes[chunk.request] = count
        assert count < 1000
    return [passes[request] for request in requests]


@pytest.mark.parametrize("answers", [0, 3])
@pytest.mark.parametrize("long_prompts", [1, 4])
def test_a_short_prompt_is_read_in_three_passes_beside_long_ones(answers: int, long_prompts: int) -> None:
    short = running(100)
    requests = [running(2000, 300) for _ in range(long_prompts)] + [answering() for _ in range(answers)] + [short]
    assert passes_until_read([*requests], Budget())[-1] <= 3


def test_short_prompts_do_not_stop_a_long_one() -> None:
    (passes,) = passes_until_read([running(2000)], Budget(), late=running(500))
    assert passes <= -(-2000 // 128)  # a quarter of 512 each, and more when it is the shortest itself


def test_prompts_come_first_and_do_not_delay_answers() -> None:
    requests = [answering(), running(70), answering(), running(9)]
    assert planned(requests) == [(1, 3, True, 0), (3, 9, True, 1), (0, 1, False, 1), (2, 1, False, 1)]
    requests = [answering(), running(70, 66), answering(), running(9)]
    assert planned(requests) == [(1, 4, True, 1), (3, 8, True, 0), (0, 1, False, 1), (2, 1, False, 1)]


def test_many_answers_take_the_whole_budget() -> None:
    requests = [running(9), *(answering() for _ in range(120))]
    assert planned(requests) == [(place, 1, False, 1) for place in range(1, 101)]


def test_what_a_preempted_request_had_generated_comes_as_generated_tokens() -> None:
    request = running(20, 0, 30)
    assert planned([request]) == [(0, 20, True, 0)]
    request.evaluated = 20
    assert planned([request]) == [(0, 30, False, 1)]
    assert planned([request, answering()], Budget(tokens=10)) == [(0, 10, False, 0)]
    request.evaluated = 40
    assert planned([request, answering()], Budget(tokens=10)) == [(0, 10, False, 1)]
    assert planned([request, answering()], Budget(tokens=11)) == [(0, 10, False, 1), (1, 1, False, 1)]


@pytest.mark.parametrize("wanted", ["logits", "hidden"])
def test_outputs_of_a_prompt(wanted: str) -> None:
    assert planned([running(70, wanted=wanted)]) == [(0, 30, True, 30)]
    assert planned([running(70, 60, wanted=wanted)]) == [(0, 10, True, 10)]
    assert planned([running(70, 0, wanted=wanted, first_output=25)]) == [(0, 55, True, 30)]
    assert planned([running(70, 55, wanted=wanted, first_output=25)]) == [(0, 15, True, 15)]
    assert planned([running(70, 30, wanted=wanted, first_output=69)]) == [(0, 40, True, 1)]
    assert planned([running(170, 30, wanted=wanted, first_output=169)]) == [(0, 100, True, 0)]
    assert planned([running(70, 60, wanted=wanted, first_output=69)]) == [(0, 10, True, 1)]


@st.composite
def requests(draw: st.DrawFn) -> RunningRequest:
    prompt, wanted = draw(st.integers(1, 200)), draw(st.sampled_from(["tokens", "logits", "hidden"]))
    generated = draw(st.integers(0, 120)) if wanted == "tokens" else 0
    evaluated = draw(st.integers(0, prompt + generated - 1))
    return running(prompt, evaluated, generated, wanted=wanted, first_output=draw(st.integers(0, prompt - 1)))


@given(running_requests=st.lists(requests(), max_size=8), tokens=st.integers(1, 300), beside=st.integers(1, 60))
def test_every_plan_keeps_to_its_budget(running_requests: list[RunningRequest], tokens: int, beside: int) -> None:
    chunks = plan(running_requests, Budget(tokens, 30, beside))
    prompts = [chunk for chunk in chunks if chunk.is_prompt]
    answers = [chunk for chunk in chunks if not chunk.is_prompt]
    assert chunks == prompts + answers
    for kind in (prompts, answers):
        places = [running_requests.index(chunk.request) for chunk in kind]
        assert places == sorted(set(places))
    assert bool(chunks) == bool(running_requests)
    assert sum(chunk.tokens for chunk in chunks) <= tokens
    if answers:
        assert sum(chunk.tokens for chunk in prompts) <= beside
    for chunk in chunks:
        request = chunk.request
        assert 1 <= chunk.tokens <= request.pending
        assert chunk.is_prompt == (request.evaluated < request.prompt_length)
        evaluated = range(request.evaluated, request.evaluated + chunk.tokens)
        if request.request.wanted == "tokens":
            assert chunk.outputs == (len(request.tokens) - 1 in evaluated)
        else:
            assert chunk.outputs == sum(place >= request.request.first_output for place in evaluated) <= 30
