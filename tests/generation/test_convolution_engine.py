"""An engine of a model with short convolutions: what requests share, and how long a draft may be."""

from __future__ import annotations

import numpy as np
import pytest

from tritgguf.errors import BadRequestError
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.generation.engine import Engine
from tritgguf.generation.loaded_model import load
from tritgguf.generation.request import Request, RunningRequest
from tritgguf.generation.sampling import Sampler, SamplingOptions
from tritgguf.runtime.model import Model

CONTEXT = 640
TEXT = np.random.default_rng(3).integers(3, 440, 500).tolist()


def run(engine: Engine, tokens: list[int], count: int = 4) -> RunningRequest:
    """Run a request to its end."""
    request = engine.submit(Request(tokens, Sampler(SamplingOptions(temperature=0)), max_tokens=count))
    assert len(list(engine.tokens(request))) == count
    engine.check()
    return request


@pytest.fixture(scope="module")
def model(tiny_lfm2_file: GgufFile) -> Model:
    return Model(tiny_lfm2_file, threads=2)


@pytest.mark.parametrize(
    ("shared", "cached"),
    [
        (503, 503),  # all that was evaluated: the next turn of a chat
        (480, 480),  # within the last positions of the second page
        (300, 256),  # before them: whole pages
        (250, 250),  # within the last positions of the first page
        (200, 0),
    ],
)
def test_what_a_request_takes_over(model: Model, shared: int, cached: int) -> None:
    engine = Engine(model, context=CONTEXT, parallel=2)
    first = run(engine, TEXT)
    tokens = [*first.tokens[:shared], 441, 442, 443]
    second = run(engine, tokens)
    assert second.cached == cached
    alone = run(Engine(model, context=CONTEXT, parallel=1), tokens)
    assert shared > len(TEXT) or second.tokens == alone.tokens  # generated tokens have other activations than prompts


def test_requests_beside_one_another_share_whole_pages(model: Model) -> None:
    engine = Engine(model, context=CONTEXT, parallel=2)
    samplers = [Sampler(SamplingOptions(temperature=0)) for _ in range(2)]
    requests = [
        engine.submit(Request([*TEXT[:300], *[441 + place] * 100], sampler, max_tokens=3))
        for place, sampler in enumerate(samplers)
    ]
    for request in requests:
        assert len(list(engine.tokens(request))) == 3
    assert [request.cached for request in requests] == [0, 256]


@pytest.mark.parametrize("entries", [{"lookup": True}, {"draft": True}])
def test_a_draft_that_could_not_be_taken_back(tiny_lfm2_file: GgufFile, entries: dict[str, bool]) -> None:
    path = tiny_lfm2_file.path
    guesses = {"lookup": True} if "lookup" in entries else {"draft": path}
    with pytest.raises(BadRequestError, match=r"--draft-max \(draft_max\) is 31, but .* can take back 30 tokens"):
        load(path, context=CONTEXT, draft_max=31, **guesses)


def test_its_own_draft_model(tiny_lfm2_file: GgufFile) -> None:
    """A draft model with convolutions is cut back as the model is; answers stay the same."""
    path, options = tiny_lfm2_file.path, SamplingOptions(temperature=0)
    requests = [Request(TEXT[:300], Sampler(options), max_tokens=40) for _ in range(2)]
    plain, drafting = load(path, context=CONTEXT), load(path, context=CONTEXT, draft=path, draft_max=30)
    drafting.engine._core._speculation._drafter.step_cost = 0.0  # type: ignore[union-attr]
    expected, found = (
        list(one.engine.tokens(one.engine.submit(request)))
        for one, request in zip((plain, drafting), requests, strict=True)
    )
    assert found == expected
