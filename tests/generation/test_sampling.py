"""Sampling: llama.cpp's rules, each against its definition."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scripted_model import scripted

from tritgguf.errors import BadRequestError, TritGgufError
from tritgguf.generation.generate import generate
from tritgguf.generation.sampling import Sampler, SamplingOptions, TokenLogprobs

ALL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
logit_arrays = arrays(np.float32, st.integers(1, 300), elements=st.floats(-30, 30, width=32))
# Without ties, so that "the k largest" is one set.
distinct_logits = st.lists(st.integers(-300, 300), min_size=1, max_size=100, unique=True).map(
    lambda values: np.array(values, np.float32) / 10
)


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def distribution(logits: np.ndarray, **options: float) -> dict[int, float]:
    tokens, probabilities = Sampler(SamplingOptions(**{**ALL, **options})).distribution(logits)  # type: ignore[arg-type]
    return dict(zip(tokens.tolist(), probabilities.tolist(), strict=True))


# -- greedy


@given(logits=logit_arrays)
def test_temperature_zero_takes_the_largest(logits: np.ndarray) -> None:
    assert Sampler(SamplingOptions(temperature=0)).sample(logits) == logits.argmax()


@given(logits=logit_arrays, temperature=st.floats(0.1, 5), seed=st.integers(0, 99))
def test_top_1_is_greedy(logits: np.ndarray, temperature: float, seed: int) -> None:
    sampler = Sampler(SamplingOptions(temperature=temperature, top_k=1, seed=seed))
    assert sampler.sample(logits) == logits.argmax()


# -- the samplers, one by one


@given(logits=distinct_logits)
def test_without_restrictions_it_is_the_softmax(logits: np.ndarray) -> None:
    found = distribution(logits)
    np.testing.assert_allclose([found[token] for token in range(len(logits))], softmax(logits), rtol=1e-9)


@given(logits=distinct_logits, count=st.integers(1, 120))
def test_top_k_keeps_the_k_largest_in_order(logits: np.ndarray, count: int) -> None:
    expected = np.argsort(-logits)[:count].tolist()
    found = distribution(logits, top_k=count)
    assert list(found) == expected
    np.testing.assert_allclose(list(found.values()), softmax(logits[expected]), rtol=1e-9)


@given(logits=distinct_logits, mass=st.floats(0, 1))
def test_top_p_keeps_the_smallest_set_with_that_mass(logits: np.ndarray, mass: float) -> None:
    kept = list(distribution(logits, top_p=mass))
    probabilities = softmax(logits)
    assert kept == np.argsort(-logits)[: len(kept)].tolist()
    assert kept
    total = math.fsum(probabilities[kept])
    assert total >= mass - 1e-9
    assert total - probabilities[kept[-1]] < mass + 1e-9 or len(kept) == 1


@given(logits=distinct_logits, share=st.floats(0.001, 1))
def test_min_p_keeps_what_is_probable_enough(logits: np.ndarray, share: float) -> None:
    found = distribution(logits, min_p=share)
    ratio = softmax(logits) / softmax(logits).max()
    assert set(found) >= set(np.flatnonzero(ratio > share * (1 + 1e-6)))
    assert not set(found) & set(np.flatnonzero(ratio < share * (1 - 1e-6)))
    assert found


@given(logits=distinct_logits, temperature=st.floats(0.05, 20))
def test_temperature_divides_logits(logits: np.ndarray, temperature: float) -> None:
    found = distribution(logits, temperature=temperature)
    expected = softmax(logits.astype(np.float64) / temperature)
    np.testing.assert_allclose([found[token] for token in range(len(logits))], expected, rtol=1e-6, atol=1e-12)


def test_top_p_and_min_p_come_before_the_temperature() -> None:
    logits = np.log(np.array([0.6, 0.3, 0.1], np.float32))
    # At this temperature everything is about as likely; the sets are those at temperature 1.
    assert list(distribution(logits, temperature=100.0, top_p=0.5)) == [0]
    assert list(distribution(logits, temperature=100.0, min_p=0.4)) == [0, 1]


def test_top_p_counts_within_top_k() -> None:
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    # Of the two that top-k leaves, the first has 4/7 of the mass.
    assert list(distribution(logits, top_k=2, top_p=0.55)) == [0]
    assert list(distribution(logits, top_k=0, top_p=0.55)) == [0, 1]


@given(
    logits=logit_arrays,
    options=st.fixed_dictionaries(
        {
            "temperature": st.floats(0.01, 5),
            "top_k": st.integers(-1, 50),
            "top_p": st.floats(0, 1),
            "min_p": st.floats(0, 1),
        }
    ),
)
def test_probabilities_sum_to_one_and_fall(logits: np.ndarray, options: dict[str, float]) -> None:
    probabilities = list(distribution(logits, **options).values())
    assert math.fsum(probabilities) == pytest.approx(1)
    assert probabilities == sorted(probabilities, reverse=True)


# -- repeat penalty


def penalized(logits: list[float], recent: list[int], **options: float) -> list[float]:
    sampler = Sampler(SamplingOptions(**options))  # type: ignore[arg-type]
    sampler.accept(recent)
    given_logits = np.array(logits, np.float32)
    result = sampler._adjusted(given_logits)
    assert given_logits.tolist() == np.array(logits, np.float32).tolist()
    return [float(value) for value in result]


def test_the_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    logits = [4.0, -4.0, 0.0, 4.0, -4.0]
    assert penalized(logits, [0, 1, 2], repeat_penalty=2.0) == [2.0, -8.0, 0.0, 4.0, -4.0]
    assert penalized(logits, [0, 1, 2], repeat_penalty=0.5) == [8.0, -2.0, 0.0, 4.0, -4.0]


def test_a_token_is_penalized_once_however_often_it_came() -> None:
    assert penalized([4.0, 4.0], [0, 0, 0], repeat_penalty=2.0) == [2.0, 4.0]


def test_only_recent_tokens_are_penalized() -> None:
    assert penalized([4.0, 4.0, 4.0], [0, 1, 2], repeat_penalty=2.0, repeat_last_n=2) == [4.0, 2.0, 2.0]
    assert penalized([4.0, 4.0, 4.0], [0, 1, 2], repeat_penalty=2.0, repeat_last_n=0) == [4.0, 4.0, 4.0]
    assert penalized([4.0, 4.0, 4.0], [0, *[1] * 100], repeat_penalty=2.0, repeat_last_n=-1) == [2.0, 2.0, 4.0]


def test_the_penalty_applies_to_greedy_choice() -> None:
    sampler = Sampler(SamplingOptions(temperature=0, repeat_penalty=1.5))
    logits = np.array([1.0, 1.2], np.float32)
    assert sampler.sample(logits) == 1
    sampler.accept([1])
    assert sampler.sample(logits) == 0


# -- presence and frequency penalty, logit bias


def after_answering(logits: list[float], answer: list[int], **options: Any) -> list[float]:
    """Return the adjusted logits behind a prompt and some generated tokens."""
    sampler = Sampler(SamplingOptions(temperature=0, **options))
    sampler.accept([0, 0, 1])  # a prompt
    for token in answer:
        row = np.zeros(len(logits), np.float32)
        row[token] = 1000
        assert sampler.sample(row) == token
        sampler.accept([token])
    return [float(value) for value in sampler._adjusted(np.array(logits, np.float32))]


def test_presence_and_frequency_count_the_answer_alone() -> None:
    logits = [4.0, 4.0, 4.0, 4.0]
    assert after_answering(logits, [], presence_penalty=1.0, frequency_penalty=1.0) == logits
    assert after_answering(logits, [2, 3, 2], presence_penalty=1.5) == [4.0, 4.0, 2.5, 2.5]
    assert after_answering(logits, [2, 3, 2], frequency_penalty=0.5) == [4.0, 4.0, 3.0, 3.5]
    assert after_answering(logits, [2, 3, 2], presence_penalty=1.0, frequency_penalty=-0.5) == [4.0, 4.0, 4.0, 3.5]


def test_the_whole_answer_counts_however_long_it_is() -> None:
    assert after_answering([4.0, 4.0], [1] * 100, frequency_penalty=0.125, repeat_last_n=3) == [4.0, -8.5]


def test_another_answer_of_the_same_sampler_counts_anew() -> None:
    sampler = Sampler(SamplingOptions(temperature=0, presence_penalty=5.0))
    logits = np.array([1.0, 2.0], np.float32)
    for _ in range(2):
        sampler.accept([1])  # a prompt, though the answer before ended with the same token
        assert sampler.sample(logits) == 1
        sampler.accept([1])
        assert sampler.sample(logits) == 0
        sampler.accept([0])


def test_logit_bias_is_added_and_minus_100_bans() -> None:
    logits = np.array([1.0, 2.0, 1000.0], np.float32)
    assert Sampler(SamplingOptions(temperature=0, logit_bias={0: 1.5, 2: -100})).sample(logits) == 0
    assert Sampler(SamplingOptions(temperature=0, logit_bias={0: -1.5, 2: -99.5})).sample(logits) == 2
    assert logits.tolist() == [1.0, 2.0, 1000.0]


@pytest.mark.parametrize("options", [{"temperature": 0.0}, ALL, {}, {"top_k": 2}, {**ALL, "top_k": 3}])
@pytest.mark.parametrize("size", [3, 300])
def test_what_is_banned_never_comes(options: dict[str, Any], size: int) -> None:
    banned = {token: -100 for token in range(size) if token != 1}
    sampler = Sampler(SamplingOptions(**options, logit_bias=banned, seed=0))
    assert {sampler.sample(np.zeros(size, np.float32)) for _ in range(20)} == {1}


def test_everything_banned_is_an_error() -> None:
    with pytest.raises(BadRequestError, match="bans every token"):
        Sampler(SamplingOptions(logit_bias={0: -100, 1: -100})).sample(np.zeros(2, np.float32))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("restrictions", [{}, {"top_k": 2}])
def test_the_smallest_temperature_takes_the_largest(restrictions: dict[str, Any]) -> None:
    options: dict[str, Any] = {"top_k": 0, "top_p": 1, "min_p": 0, **restrictions}
    sampler = Sampler(SamplingOptions(temperature=5e-324, seed=1, **options))
    assert sampler.sample(np.array([1, 3, 2], np.float32)) == 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [5e-324, 1e-300, 1e308])
@pytest.mark.parametrize(
    "options", [{"repeat_penalty": 1}, {"presence_penalty": 1}, {"presence_penalty": -1}, {"frequency_penalty": -1}]
)
def test_penalties_of_any_size_leave_what_is_banned_banned(options: dict[str, float], size: float) -> None:
    sizes: dict[str, Any] = {name: sign * size for name, sign in options.items()}
    sampler = Sampler(SamplingOptions(**sizes, logit_bias={0: -100}, top_k=0, top_p=1, min_p=0, seed=1))
    sampler.accept([0, 1, 2])
    for _ in range(20):
        token = sampler.sample(np.array([0.5, 0, -1, 2], np.float32))
        assert 0 < token < 4
        sampler.accept([token])


def test_a_bias_for_a_token_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(BadRequestError, match="token 2, the model has 2"):
        Sampler(SamplingOptions(logit_bias={2: 1})).sample(np.zeros(2, np.float32))
    with pytest.raises(BadRequestError, match="token 99999, the model has 448"):
        generate(scripted([40]), "Hi", logit_bias={99999: 1})


# -- constraints


class OnlyOnce:
    """Allows every token of a vocabulary once."""

    def __init__(self, size: int) -> None:
        self.seen = list[int]()
        self._mask = np.zeros(size, np.float32)

    def mask(self) -> np.ndarray:
        return self._mask

    def accept(self, token: int) -> None:
        self.seen.append(token)
        self._mask[token] = -np.inf


@pytest.mark.parametrize("options", [{"temperature": 0.0}, ALL, {}, {"top_k": 5}])
def test_a_constraint_advances_with_the_sampled_tokens_and_not_with_the_prompt(options: dict[str, Any]) -> None:
    constraint = OnlyOnce(400)
    sampler = Sampler(SamplingOptions(**options, seed=3), constraint=constraint)
    sampler.accept([7, 8])
    for _ in range(400):
        logits = np.arange(400, dtype=np.float32) % 7
        sampler.accept([sampler.sample(logits)])
    assert sorted(constraint.seen) == list(range(400))


# -- log probabilities


@given(logits=logit_arrays, top=st.integers(0, 30))
def test_logprobs_are_those_of_the_raw_logits(logits: np.ndarray, top: int) -> None:
    options = SamplingOptions(temperature=2.0, top_k=3, repeat_penalty=1.5, logit_bias={0: 3}, seed=1)
    sampler = Sampler(options, top_logprobs=top)
    sampler.accept([0])
    token = sampler.sample(logits)
    expected = np.log(softmax(logits))
    (found,) = sampler.logprobs
    assert found.token == token
    assert found.logprob == pytest.approx(expected[token], abs=1e-5)
    assert len(found.top) == min(top, len(logits))
    np.testing.assert_allclose([value for _, value in found.top], np.sort(expected)[::-1][:top], atol=1e-5)
    np.testing.assert_allclose(
        [expected[other] for other, _ in found.top], [value for _, value in found.top], atol=1e-5
    )


def test_logprobs_are_kept_only_on_request() -> None:
    logits = np.zeros(4, np.float32)
    sampler = Sampler(SamplingOptions(temperature=0))
    sampler.sample(logits)
    assert sampler.logprobs == []
    sampler = Sampler(SamplingOptions(temperature=0), top_logprobs=0)
    sampler.sample(logits)
    assert sampler.logprobs == [TokenLogprobs(0, -math.log(4), ())]
    with pytest.raises(BadRequestError, match="top-logprobs must be 0 or more"):
        Sampler(SamplingOptions(), top_logprobs=-1)


# -- drawing


@given(seed=st.integers(0, 2**64), logits=logit_arrays)
def test_the_same_seed_draws_the_same(seed: int, logits: np.ndarray) -> None:
    first, second = (Sampler(SamplingOptions(temperature=2.0, seed=seed)) for _ in range(2))
    assert [first.sample(logits) for _ in range(5)] == [second.sample(logits) for _ in range(5)]


def test_without_a_seed_there_is_a_new_one_each_time_and_it_can_be_used_again() -> None:
    logits = np.zeros(1000, np.float32)
    options = {**ALL}
    samplers = [Sampler(SamplingOptions(**options)) for _ in range(2)]  # type: ignore[arg-type]
    drawn = [[sampler.sample(logits) for _ in range(20)] for sampler in samplers]
    assert drawn[0] != drawn[1]
    again = Sampler(SamplingOptions(**options, seed=samplers[0].seed))  # type: ignore[arg-type]
    assert [again.sample(logits) for _ in range(20)] == drawn[0]


def test_tokens_are_drawn_as_often_as_they_should() -> None:
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    sampler = Sampler(SamplingOptions(**ALL, seed=1))  # type: ignore[arg-type]
    logits = np.log(probabilities).astype(np.float32)
    counts = np.bincount([sampler.sample(logits) for _ in range(8000)], minlength=4)
    # Four standard deviations of a binomial.
    assert (np.abs(counts - 8000 * probabilities) < 4 * np.sqrt(8000 * probabilities * (1 - probabilities))).all()


@given(size=st.integers(1, 1500), share=st.floats(0, 1), seed=st.integers(0, 999))
def test_equal_tokens_are_drawn_by_equal_parts_of_the_random_number(size: int, share: float, seed: int) -> None:
    allowed = np.flatnonzero(np.random.default_rng(seed).random(size) < share)
    if not len(allowed):
        allowed = np.array([size - 1])
    logits = np.full(size, -np.inf, np.float32)
    logits[allowed] = 1.5
    sampler = Sampler(SamplingOptions(**ALL, seed=seed))  # type: ignore[arg-type]
    numbers = np.random.Generator(np.random.PCG64(seed)).random(20)
    assert [sampler.sample(logits) for _ in numbers] == [allowed[int(number * len(allowed))] for number in numbers]


@given(logits=logit_arrays, seed=st.integers(0, 99))
def test_what_is_drawn_was_kept(logits: np.ndarray, seed: int) -> None:
    sampler = Sampler(SamplingOptions(top_k=5, seed=seed))
    assert sampler.sample(logits) in sampler.distribution(logits)[0]


# -- bad input


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {}, {"top_k": 0}])
def test_logits_that_are_no_numbers_are_an_error(value: float, options: dict[str, float]) -> None:
    logits = np.zeros(500, np.float32)
    logits[77] = value
    with pytest.raises(TritGgufError, match="no numbers"):
        Sampler(SamplingOptions(**options)).sample(logits)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 1.1},
        {"top_p": -0.1},
        {"min_p": math.nan},
        {"min_p": 2},
        {"repeat_penalty": 0},
        {"repeat_penalty": -1},
        {"repeat_penalty": math.inf},
        {"repeat_last_n": -2},
        {"top_k": -2},
        {"repeat_last_n": 1 << 70},
        {"seed": -2},
        {"presence_penalty": math.inf},
        {"frequency_penalty": math.nan},
        {"frequency_penalty": "1"},
        {"logit_bias": {-1: 1}},
        {"logit_bias": {1: 101}},
        {"logit_bias": {1: math.nan}},
        {"logit_bias": {"1": 1}},
        {"logit_bias": {1: "1"}},
        {"logit_bias": [1]},
    ],
)
def test_impossible_options(options: dict[str, Any]) -> None:
    name = next(iter(options)).replace("_", "-")
    with pytest.raises(TritGgufError, match=f"^{name} must be"):
        SamplingOptions(**options)
