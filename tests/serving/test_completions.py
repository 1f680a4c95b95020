"""/v1/completions, judged by OpenAI's client, by lm-eval's reader, and by `model.score`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scripted_model import scripted
from serving import RunningServer, running_server

from tritgguf.generation.generate import generate
from tritgguf.generation.loaded_model import LoadedModel


def complete(server: RunningServer, prompt: Any, **options: Any) -> Any:
    return server.openai.completions.create(**{"model": "tiny", "prompt": prompt, "temperature": 0, **options})


def test_texts_go_on_as_in_the_library(server: RunningServer, serving_model: LoadedModel) -> None:
    prompts = ["The quick brown", "Name three", "Weights are"]
    expected = generate(serving_model, prompts, raw=True, max_tokens=7, temperature=0)
    answer = complete(server, prompts, max_tokens=7)
    assert [choice.text for choice in answer.choices] == [generation.text for generation in expected]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage.prompt_tokens == sum(len(generation.prompt_tokens) for generation in expected)
    assert answer.usage.completion_tokens == sum(len(generation.tokens) for generation in expected)
    as_tokens = [generation.prompt_tokens for generation in expected]
    assert [choice.text for choice in complete(server, as_tokens, max_tokens=7).choices] == [g.text for g in expected]
    assert complete(server, as_tokens[0], max_tokens=7).choices[0].text == expected[0].text


def test_n_answers_to_each_prompt_in_order(server: RunningServer) -> None:
    options: dict[str, Any] = {"max_tokens": 6, "temperature": 1.2, "seed": 3}
    both = [choice.text for choice in complete(server, ["The", "Name"], n=2, **options).choices]
    assert both[:2] == [choice.text for choice in complete(server, "The", n=2, **options).choices]
    assert both[2:] == [choice.text for choice in complete(server, "Name", n=2, **options).choices]
    sizes = [complete(server, text).usage.prompt_tokens for text in ("The", "Name")]
    assert complete(server, ["The", "Name"], n=2, **options).usage.prompt_tokens == sum(sizes)


def test_the_default_is_sixteen_tokens_and_text_streams(server: RunningServer) -> None:
    body: Any = {"ignore_eos": True}
    whole = complete(server, "The", extra_body=body)
    assert whole.usage.completion_tokens == 16
    chunks = list(complete(server, "The", stream=True, stream_options={"include_usage": True}, extra_body=body))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage.completion_tokens == 16
    assert chunks[-2].choices[0].finish_reason == "length"


def test_echo_puts_the_prompt_first(server: RunningServer) -> None:
    after = complete(server, "The quick", max_tokens=4).choices[0].text
    assert complete(server, "The quick", max_tokens=4, echo=True).choices[0].text == "The quick" + after
    assert complete(server, "The quick", max_tokens=0, echo=True).choices[0].text == "The quick"
    chunks = list(complete(server, "The quick", max_tokens=4, echo=True, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "The quick" + after
    chunks = list(complete(server, "The quick", max_tokens=0, echo=True, stream=True))
    assert [chunk.choices[0].text for chunk in chunks] == ["The quick", ""]


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_log_probabilities_of_the_prompt_are_those_of_score(
    server: RunningServer, serving_model: LoadedModel, max_tokens: int
) -> None:
    tokens = serving_model.tokenizer.encode("The quick brown fox jumps over", add_special=True, parse_special=False)
    for prompt in (tokens, tokens[:1], tokens * 40):
        found = complete(server, prompt, max_tokens=max_tokens, echo=True, logprobs=2).choices[0].logprobs
        assert len(found.tokens) == len(found.token_logprobs) == len(found.text_offset) == len(prompt) + max_tokens
        assert found.token_logprobs[0] is found.top_logprobs[0] is None
        if len(prompt) > 1:
            expected = serving_model.score(prompt[:1], prompt[1:])
            given = found.token_logprobs[1 : len(prompt)]
            np.testing.assert_allclose(given, expected.log_probabilities, atol=1e-5)
            best = [max(top.values()) for top in found.top_logprobs[1 : len(prompt)]]
            assert (given == best) == expected.is_greedy
            assert all(value <= most for value, most in zip(given, best, strict=True))


def test_streamed_log_probabilities_have_the_places_of_whole_ones(server: RunningServer) -> None:
    options: dict[str, Any] = {"max_tokens": 4, "echo": True, "logprobs": 0, "temperature": 0}
    whole = complete(server, "The quick", **options).choices[0].logprobs.text_offset
    chunks = list(complete(server, "The quick", stream=True, **options))
    assert [place for chunk in chunks for place in chunk.choices[0].logprobs.text_offset] == whole


def test_text_offsets_are_places_in_the_text(server: RunningServer) -> None:
    choice = complete(server, "The \U0001f422 quick", max_tokens=0, echo=True, logprobs=0).choices[0]
    assert choice.text == "The \U0001f422 quick"
    for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
        assert offset == 4 if token.startswith("bytes:") else choice.text.startswith(token, offset)


def test_lm_eval_reads_likelihoods(server: RunningServer, serving_model: LoadedModel) -> None:
    models = pytest.importorskip("lm_eval.models.openai_completions")
    pairs = [("The quick brown", " fox jumps"), ("Name", " three primary colors")]
    tokens, lengths, expected = [], [], []
    for context, continuation in pairs:
        before, after = (
            serving_model.tokenizer.encode(t, add_special=False, parse_special=False) for t in (context, continuation)
        )
        tokens.append(before + after)
        lengths.append(len(before))
        expected.append(serving_model.score(before, after))
    payload = {"prompt": tokens, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    outputs = server.post("/v1/completions", **payload).json()
    found = models.LocalCompletionsAPI.parse_logprobs(outputs, tokens=tokens, ctxlens=lengths)
    for (log_likelihood, is_greedy), score in zip(found, expected, strict=True):
        assert log_likelihood == pytest.approx(score.log_probability, abs=1e-4)
        assert is_greedy == score.is_greedy


def test_behind_an_echo_the_token_that_ends_the_answer_counts() -> None:
    """lm-eval takes the last log probability away; without this one it would lose one of the prompt's."""
    options: dict[str, Any] = {"max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
    prompt = [40, 41, 42]
    with running_server(scripted([]), alias="tiny") as running:  # which ends every answer at once
        whole = complete(running, prompt, **options).choices[0]
        chunks = list(complete(running, prompt, stream=True, **options))
        alone = complete(running, prompt, **{**options, "echo": False}).choices[0]
    assert whole.finish_reason == "stop"
    assert len(whole.logprobs.token_logprobs) == len(prompt) + 1
    assert [value for chunk in chunks for value in chunk.choices[0].logprobs.token_logprobs] == (
        whole.logprobs.token_logprobs
    )
    assert alone.logprobs.token_logprobs == []


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("prompt", []),
        ("prompt", [[]]),
        ("prompt", ["a", 3]),
        ("prompt", [1, -1]),
        ("prompt", ["a"] * 300),
        ("prompt", ""),
        ("logprobs", 21),
        ("best_of", 3),
        ("suffix", "end"),
        ("echo", "no"),
    ],
)
def test_an_impossible_value_is_named(server: RunningServer, parameter: str, value: Any) -> None:
    error = server.error("/v1/completions", **{"prompt": "a", "max_tokens": 1, parameter: value})
    assert error["param"] == parameter
    assert parameter in error["message"]


@pytest.mark.parametrize(("path", "param"), [("/v1/completions", "prompt"), ("/v1/embeddings", "input")])
def test_a_prompt_that_is_too_long_or_has_tokens_that_do_not_exist_is_named(
    server: RunningServer, path: str, param: str
) -> None:
    missing: list[Any] = [[448], [[1], [2, 448]]]
    too_long: list[Any] = ["word " * 700, [[1], [1] * 700]]
    for prompt in missing:
        error = server.error(path, **{param: prompt})
        assert error["param"] == param
        assert "from 0 to 447" in error["message"]
    for prompt in too_long:
        error = server.error(path, **{param: prompt})
        assert (error["param"], error["code"]) == (param, "context_length_exceeded")
