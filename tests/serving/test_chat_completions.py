"""/v1/chat/completions, judged by OpenAI's client."""

from __future__ import annotations

from typing import Any

import numpy as np
import openai
import pytest
from scripted_model import scripted
from serving import RunningServer, running_server

from tritgguf.generation.generate import generate
from tritgguf.generation.loaded_model import LoadedModel

HELLO: Any = [{"role": "user", "content": "Name three colors."}]


def chat(server: RunningServer, **options: Any) -> Any:
    return server.openai.chat.completions.create(**{"model": "tiny", "messages": HELLO, "max_tokens": 12, **options})


def streamed(server: RunningServer, **options: Any) -> tuple[str, list[Any]]:
    chunks = list(chat(server, stream=True, **options))
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices), chunks


def test_an_answer_is_the_librarys(server: RunningServer, serving_model: LoadedModel) -> None:
    expected = generate(serving_model, HELLO, max_tokens=12, temperature=0)
    answer = chat(server, temperature=0)
    assert answer.object == "chat.completion"
    assert answer.model == "tiny"
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == expected.text
    assert choice.finish_reason == {"stop": "stop", "length": "length"}[expected.finish_reason]
    assert answer.usage.prompt_tokens == len(expected.prompt_tokens)
    assert answer.usage.completion_tokens == len(expected.tokens)
    assert answer.usage.total_tokens == len(expected.prompt_tokens) + len(expected.tokens)


def test_a_stream_has_the_role_the_text_the_reason_and_the_usage(server: RunningServer) -> None:
    whole = chat(server, temperature=0).choices[0].message.content
    text, chunks = streamed(server, temperature=0, stream_options={"include_usage": True})
    assert text == whole
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 12
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-2].timings["predicted_n"] == 12
    assert streamed(server, temperature=0)[1][-1].choices[0].finish_reason == "length"


def test_timings_and_cached_tokens(server: RunningServer) -> None:
    messages: Any = [{"role": "user", "content": "An unusual beginning " * 3}]
    first, second = (chat(server, messages=messages) for _ in range(2))
    assert first.usage.prompt_tokens_details.cached_tokens < 20
    assert second.usage.prompt_tokens_details.cached_tokens == second.usage.prompt_tokens - 1
    assert second.timings["cache_n"] == second.usage.prompt_tokens - 1
    assert second.timings["prompt_n"] == 1
    assert first.timings["prompt_per_second"] > 0
    assert first.timings["predicted_per_second"] > 0
    uncached = chat(server, messages=messages, extra_body={"cache_prompt": False})
    assert uncached.usage.prompt_tokens_details.cached_tokens == 0


def test_n_answers_and_seeds(server: RunningServer) -> None:
    options: dict[str, Any] = {"n": 3, "seed": 5, "temperature": 1.5}
    texts = [choice.message.content for choice in chat(server, **options).choices]
    assert len(set(texts)) == 3
    assert [choice.message.content for choice in chat(server, **options).choices] == texts
    assert chat(server, **{**options, "n": 1}).choices[0].message.content == texts[0]
    by_index = ["", "", ""]
    for chunk in chat(server, stream=True, **options):
        by_index[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert by_index == texts
    usage = chat(server, **options).usage
    assert usage.completion_tokens == 36
    assert usage.prompt_tokens == chat(server).usage.prompt_tokens
    for seed in (-1, -(2**63), 2**64 - 1):
        chat(server, seed=seed, max_tokens=1)


@pytest.mark.parametrize("stop", ["cd", ["xx", "cd"], ["cd", "bcde"], ["c" * 3, "cde"]])
def test_stop_strings_cross_tokens_and_are_never_shown(stop: Any) -> None:
    with running_server(scripted("abcdef")) as server:
        answer = chat(server, stop=stop)
    with running_server(scripted("abcdef")) as server:
        text, chunks = streamed(server, stop=stop)
    assert answer.choices[0].message.content == text == "ab"
    assert answer.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == "stop"


def test_a_beginning_of_a_stop_string_is_shown_in_the_end() -> None:
    with running_server(scripted("abc")) as server:
        assert streamed(server, stop="cx")[0] == "abc"


def test_limits_of_tokens(server: RunningServer) -> None:
    assert chat(server, max_tokens=3).usage.completion_tokens <= 3
    both = chat(server, max_tokens=50, max_completion_tokens=2, extra_body={"ignore_eos": True})
    assert both.usage.completion_tokens == 2
    nothing = chat(server, max_tokens=0)
    assert nothing.choices[0].message.content == ""
    assert nothing.usage.completion_tokens == 0
    full = chat(server, max_tokens=-1, temperature=0, extra_body={"ignore_eos": True})
    assert full.usage.total_tokens == 641  # the last token is not evaluated
    assert full.choices[0].finish_reason == "length"


def test_log_probabilities(server: RunningServer, serving_model: LoadedModel) -> None:
    answer = chat(server, logprobs=True, top_logprobs=3, temperature=0, max_tokens=5)
    content = answer.choices[0].logprobs.content
    prompt = generate(serving_model, HELLO, max_tokens=5, temperature=0)
    logits = serving_model.logits(prompt.prompt_tokens)[-1].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum())
    assert content[0].logprob == pytest.approx(expected.max(), abs=1e-5)
    np.testing.assert_allclose([t.logprob for t in content[0].top_logprobs], np.sort(expected)[::-1][:3], atol=1e-5)
    assert b"".join(bytes(entry.bytes) for entry in content).decode("utf-8", "replace")[:1]
    assert len(content) == len(prompt.tokens)
    chunks = streamed(server, logprobs=True, top_logprobs=3, temperature=0, max_tokens=5)[1]
    parts = [part for chunk in chunks if chunk.choices[0].logprobs for part in chunk.choices[0].logprobs.content]
    assert [part.logprob for part in parts] == [part.logprob for part in content]
    assert chat(server, max_tokens=1).choices[0].logprobs is None
    assert chat(server, max_tokens=1, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_log_probabilities_end_where_the_text_does() -> None:
    with running_server(scripted("abcdef")) as server:
        answer = chat(server, stop="cd", logprobs=True)
    assert "".join(entry.token for entry in answer.choices[0].logprobs.content) == "ab"


def test_logit_bias_and_penalties_reach_the_sampler(server: RunningServer) -> None:
    first = chat(server, temperature=0, logprobs=True, max_tokens=1).choices[0].logprobs.content[0]
    token = server.post("/tokenize", content=bytes(first.bytes).decode()).json()["tokens"][0]
    banned = chat(server, temperature=0, logprobs=True, max_tokens=1, logit_bias={str(token): -100})
    assert banned.choices[0].logprobs.content[0].bytes != first.bytes
    forced = chat(server, logit_bias={"65": 100}, max_tokens=3, extra_body={"ignore_eos": True})
    varied = chat(server, logit_bias={"65": 100}, max_tokens=3, presence_penalty=200)
    assert len(set(forced.choices[0].message.content)) == 1
    assert varied.choices[0].message.content != forced.choices[0].message.content
    extra = {"top_k": 5, "min_p": 0.1, "repeat_penalty": 1.2, "repeat_last_n": 3, "nonsense": 1}
    chat(server, top_p=0.5, frequency_penalty=0.5, user="me", extra_body=extra)


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("top_p", 2),
        ("min_p", -0.1),
        ("top_k", 1.5),
        ("repeat_penalty", 0),
        ("presence_penalty", []),
        ("n", 0),
        ("n", 10_000),
        ("max_tokens", -2),
        ("max_tokens", True),
        ("max_completion_tokens", "3"),
        ("top_logprobs", 21),
        ("stop", ["a"] * 17),
        ("stop", 3),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"448": 1}),
        ("logit_bias", {"1": 101}),
        ("seed", 1.5),
        ("seed", 2**64),
        ("stream", "yes"),
        ("messages", []),
        ("messages", "Hi"),
        ("messages", [{"content": "Hi"}]),
        ("messages", [{"role": "user", "content": 3}]),
        ("chat_template_kwargs", []),
    ],
)
def test_an_impossible_value_is_named(server: RunningServer, parameter: str, value: Any) -> None:
    error = server.error("/v1/chat/completions", **{"messages": HELLO, "max_tokens": 1, parameter: value})
    assert error["param"] == parameter
    assert parameter in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_beyond_the_context(server: RunningServer, stream: bool) -> None:
    messages: Any = [{"role": "user", "content": "word " * 700}]
    with pytest.raises(openai.BadRequestError) as caught:
        chat(server, messages=messages, stream=stream)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    assert "the context holds 640" in caught.value.message


def test_an_error_behind_the_first_token_ends_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    model = scripted("abcdef")
    forward = model.model.forward

    def fail_later(*arguments: Any) -> None:
        if len(model.model.calls) == 3:
            raise ValueError("/secret/path")
        forward(*arguments)

    monkeypatch.setattr(model.model, "forward", fail_later)
    with running_server(model) as server:
        events = server.events("/v1/chat/completions", messages=HELLO)
    assert events[-1]["error"]["code"] == "internal_error"
    assert "secret" not in str(events)


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        (b'"messages": [{"role": "user", "content": "a\\ud800b"}]', 200),  # as in the library: a replacement character
        (b'"temperature": "\\ud800", "\\ud801": 1', 400),
        (b'"logit_bias": {"\\ud800": 1}', 400),
        (b'"stop": "\\ud800"', 400),
    ],
)
def test_half_a_character_is_no_trouble(server: RunningServer, fields: bytes, status: int) -> None:
    body = b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, ' + fields + b"}"
    headers = {"content-type": "application/json"}
    assert server.http.post("/v1/chat/completions", content=body, headers=headers).status_code == status
