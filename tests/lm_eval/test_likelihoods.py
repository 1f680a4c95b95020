"""Log-likelihoods of many continuations: those of `model.score`, whatever runs beside them and shares a beginning."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tritgguf.errors import DamagedFileError, TritGgufError
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.generation.loaded_model import LoadedModel, load
from tritgguf.lm_eval.likelihoods import Continuation, Likelihood, log_likelihoods


def continuations() -> list[Continuation]:
    """Return 60 of random tokens: contexts that share much, a little and nothing, and last tokens that differ only."""
    generator = np.random.default_rng(7)
    shared = generator.integers(0, 400, 300).tolist()
    found = []
    for number in range(20):
        context = [*shared[: (0, 5, 90, 280)[number % 4]], *generator.integers(0, 400, 1 + number).tolist()]
        tokens = generator.integers(0, 400, 1 + number % 5).tolist()
        others = [[*tokens[:-1], 17], [*tokens[:-1], 18], [*tokens, 19]]
        found += [Continuation(context, other) for other in [tokens, *others][: 2 + number % 3]]
    generator.shuffle(found)
    return [Continuation(*map(list, one)) for one in found]


def score(model: LoadedModel, continuation: Continuation) -> Likelihood:
    scored = model.score(continuation.context, continuation.tokens)
    return Likelihood(scored.log_probability, scored.is_greedy)


def test_they_are_those_of_score_in_the_same_order(serving_model: LoadedModel) -> None:
    asked, done = continuations(), list[int]()
    found = log_likelihoods(serving_model.engine, asked, done.append)
    serving_model.engine.clear_prefix_cache()
    assert len(found) == len(asked) > 50
    for one, likelihood in zip(asked, found, strict=True):
        expected = score(serving_model, one)
        assert likelihood.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-6)
        assert likelihood.is_greedy is expected.is_greedy
    assert done == sorted(done)
    assert done[-1] == len(asked)
    serving_model.engine.check()


def test_whole_texts_run_side_by_side(serving_model: LoadedModel) -> None:
    """A pass takes 128 tokens at most of a text whose logits are all wanted."""
    serving_model.engine.clear_prefix_cache()
    texts = np.random.default_rng(6).integers(0, 400, (8, 600)).tolist()
    passes = tokens_of_passes(serving_model, [Continuation([number], text) for number, text in enumerate(texts)])
    assert sum(passes) == 8 * 600
    assert len(passes) < 14


def test_what_is_likeliest_is_greedy_and_nothing_else(serving_model: LoadedModel) -> None:
    context = [5, 6, 7, 8]
    tokens = list[int]()
    for _ in range(4):
        tokens.append(int(serving_model.logits([*context, *tokens])[-1].argmax()))
    wrong_first, wrong_last = [tokens[0] + 1, *tokens[1:]], [*tokens[:-1], tokens[-1] + 1]
    asked = [Continuation(context, one) for one in (tokens, wrong_first, wrong_last)]
    assert [one.is_greedy for one in log_likelihoods(serving_model.engine, asked)] == [True, False, False]


def tokens_of_passes(model: LoadedModel, asked: list[Continuation]) -> list[int]:
    """Return how many tokens each pass for these continuations evaluates."""
    evaluated = list[int]()
    forward = model.engine.model.forward

    def counting(batch, *arguments, **options):  # type: ignore[no-untyped-def]
        evaluated.append(len(batch.tokens))
        return forward(batch, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.engine.model, "forward", counting)
        log_likelihoods(model.engine, asked)
    return evaluated


def test_a_shared_context_is_evaluated_once(serving_model: LoadedModel) -> None:
    serving_model.engine.clear_prefix_cache()
    context = np.random.default_rng(3).integers(0, 400, 500).tolist()
    asked = [Continuation(context, [first, second, 9]) for first in range(6) for second in range(2)]
    assert sum(tokens_of_passes(serving_model, asked)) < len(context) + 12 * 5


def test_short_contexts_are_evaluated_once_in_full_passes(tiny_trit_file: Callable[..., GgufFile]) -> None:
    """Half of the contexts have four continuations, half have one."""
    model = load(tiny_trit_file("qwen2", 2).path, context=640, parallel=64, threads=1)
    numbers = np.random.default_rng(5).permutation(400)
    contexts = [[int(first), *range(3, 12)] for first in numbers[:100]]
    asked = [
        Continuation(context, [first, 1])
        for place, context in enumerate(contexts)
        for first in range(1 + place % 2 * 3)
    ]
    free = model.engine.pool.free_pages
    passes = tokens_of_passes(model, asked)
    assert sum(passes) == 100 * 11 + 50 * 3 * 2
    assert len(passes) <= 5
    assert model.engine.pool.free_pages == free - 1  # only the last context is kept


def test_nothing_is_left_behind_after_an_error(serving_model: LoadedModel) -> None:
    too_long = Continuation(list(range(1, 400)) * 2, [3])
    with pytest.raises(TritGgufError, match="context"):
        log_likelihoods(serving_model.engine, [*continuations(), too_long])
    assert not serving_model.engine.has_work
    serving_model.engine.check()


def test_logits_that_are_no_numbers_are_refused(serving_model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = serving_model.engine.model
    forward = model.forward

    def broken(batch, kv, logits, hidden=None):  # type: ignore[no-untyped-def]
        forward(batch, kv, logits, hidden)
        logits[:, 3] = np.nan

    monkeypatch.setattr(model, "forward", broken)
    with pytest.raises(DamagedFileError, match="not a number"):
        log_likelihoods(serving_model.engine, [Continuation([1, 2], [3])])


def test_no_continuations_have_no_likelihoods(serving_model: LoadedModel) -> None:
    assert log_likelihoods(serving_model.engine, []) == []
